"""What reward models learn from: which of two scores is the higher.

A ranking of K responses is all its K(K-1)/2 pairs, each response scored once (arXiv 2203.02155, eq. 1); a pair is a
ranking of two. With several objectives each has its own pairs and its own head. A step of a response is right if its
score is above 0, and wrong if it is below: a comparison with a score that is always 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from rlhf.config import RewardConfig
from rlhf.data import Dataset, Stream, load
from rlhf.forward import objective_scores
from rlhf.model import Scorer
from rlhf.read import DataError, Source
from rlhf.reward import step_ends
from rlhf.tokens import TokenExample
from rlhf.types import SequenceBatch, cumulated, pad_sequences, plan_passes


@dataclass(frozen=True)
class Comparison:
    better: int | None  # which of the row's places; None is a score of 0
    worse: int | None
    objective: int = 0
    margin: float = 0.0  # by which it should be better
    weight: float = 1.0  # in the sum over a batch


@dataclass(frozen=True, kw_only=True)
class Judged(TokenExample):
    """A row whose completions are scored once each."""

    places: list[tuple[int, int]]  # (completion, its token) of every score
    comparisons: list[Comparison]

    @property
    def lengths(self) -> list[int]:
        return [len(self.prompt) + len(completion) for completion in self.completions]

    @property
    def weight(self) -> float:
        return sum(c.weight for c in self.comparisons)


@dataclass(frozen=True)
class ComparisonBatch:
    """M scores are read, each by every head, and P pairs of them compared."""

    sequences: SequenceBatch
    places: Tensor  # (M,) int64, which of the N tokens are scored
    better: Tensor  # (P,) int64, place * heads + head, or M * heads: a score of 0
    worse: Tensor  # (P,) int64
    margins: Tensor  # (P,) float32
    weights: Tensor  # (P,) float32


# Rows to comparisons


def load_judged(config: RewardConfig, model: Scorer) -> Dataset | Stream:
    """Every row of the dataset that compares something. The dataset's notes count what is left out."""
    steps = config.reward_type == "process"
    data = load(Source.of(config), model, "steps" if steps else "ranking", config.max_length)
    separator = _separator(config, model) if steps else []

    def judged(example: TokenExample, notes: Counter) -> Judged | None:
        try:
            if steps:
                return of_steps(example, separator, model, config, notes)
            return of_ranking(example, config.objectives, notes)
        except DataError:
            if config.on_bad_row == "error":
                raise
            notes["skipped_rows"] += 1
            return None

    return data.mapped(judged)


def of_ranking(example: TokenExample, objectives: list[str], notes: Counter) -> Judged | None:
    """A completion that stands twice counts at its better place. None where nothing is left to compare."""
    completions = list(map(list, dict.fromkeys(map(tuple, example.completions))))
    notes["duplicate_completions"] += len(example.completions) - len(completions)
    signs = _signs(example, objectives)
    margin = _margin(example, signs)
    pairs = list(combinations(range(len(completions)), 2))
    comparisons = [
        Comparison(*(pair if sign > 0 else reversed(pair)), head, margin, 1 / len(pairs))
        for head, sign in signs.items()
        for pair in pairs
    ]
    if not comparisons:
        notes["dropped_without_comparison"] += 1
        return None
    places = [(number, len(completion) - 1) for number, completion in enumerate(completions)]
    return _judged(example, completions, places, comparisons)


def _signs(example: TokenExample, objectives: list[str]) -> dict[int, int]:
    """1 for each head by which the ranking is best first, -1 where it is worst first."""
    named = example.columns.get("objective")
    if not objectives:
        if named is not None:
            raise DataError(f"{example.where}: objective: the row names {named!r:.80}: give --objectives the names")
        return {0: 1}
    given = {named: 1} if isinstance(named, str) else named
    if not isinstance(given, dict) or not all(map(_is_number, (v for v in given.values() if v is not None))):
        raise DataError(f"{example.where}: objective: expected a name, or numbers by name, got {named!r:.80}")
    if unknown := given.keys() - set(objectives):
        raise DataError(f"{example.where}: objective: expected some of {objectives}, got {sorted(unknown)[0]!r}")
    return {objectives.index(name): 1 if value > 0 else -1 for name, value in given.items() if value}


def _margin(example: TokenExample, signs: dict[int, int]) -> float:
    margin = example.columns.get("margin")
    if margin is None:
        return 0.0
    if not _is_number(margin):
        raise DataError(f"{example.where}: margin: expected a number, got {margin!r:.80}")
    if len(example.completions) > 2 or len(signs) > 1 or -1 in signs.values():
        raise DataError(f"{example.where}: margin: belongs to one pair in one objective, chosen first: take it out")
    return float(margin)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def of_steps(
    example: TokenExample, separator: list[int], model: Scorer, config: RewardConfig, notes: Counter
) -> Judged | None:
    """The steps as one completion, each judged at its last token, where `rlhf ppo` reads the score (reward.step_ends):
    the end of the separator after it, or the EOS token. The last steps go where the whole is too long."""
    ids, ends = [], []
    room = max(config.max_length - len(example.prompt), config.max_length // 2)
    for number, step in enumerate(example.completions, start=1):
        last, ended = number == len(example.completions), step[-1] in model.eos_ids
        body = step[:-1] if ended and not last else step
        joined = [*ids, *body, *([] if last else separator)]
        if len(joined) > room or (model.eos_ids and not ended):  # a step that was cut has no end
            break
        ids, ends = joined, [*ends, len(joined) - 1]
    notes["cut_steps"] += len(example.completions) - len(ends)
    if not ends:
        notes["dropped_without_step"] += 1
        return None
    if step_ends(ids, model.tokenizer, config.step_separator) != ends:
        raise DataError(
            f"{example.where}: completions: a step is empty or holds the step_separator {config.step_separator!r}, "
            "which ends a step"
        )
    labels = example.columns["labels"]
    comparisons = [Comparison(*((i, None) if labels[i] else (None, i))) for i in range(len(ends))]
    example = replace(example, prompt=example.prompt[-(config.max_length - len(ids)) :])
    return _judged(example, [ids], [(0, end) for end in ends], comparisons)


def _separator(config: RewardConfig, model: Scorer) -> list[int]:
    ids = model.tokenizer(config.step_separator, add_special_tokens=False)["input_ids"]
    if step_ends([*ids, *ids], model.tokenizer, config.step_separator) != [len(ids) - 1, 2 * len(ids) - 1]:
        raise DataError(f"step_separator: expected a text that the tokenizer keeps, got {config.step_separator!r}")
    return ids


def _judged(example: TokenExample, completions: list, places: list, comparisons: list) -> Judged:
    fields = {"text": example.text, "columns": example.columns, "where": example.where}
    return Judged(example.prompt, completions, **fields, places=places, comparisons=comparisons)


# Rows to batches


def passes(rows: list[Judged], config: RewardConfig, packed: bool) -> Iterator[list[Judged]]:
    """Rows of each forward pass, whole: per_device_train_batch_size of them, or as many as have micro_batch_tokens."""
    for part in _parts(rows, config.per_device_train_batch_size, config.micro_batch_tokens, packed):
        yield [rows[i] for i in part]


def _parts(rows: list[Judged], count: int, tokens: int | None, packed: bool) -> list[list[int]]:
    """A row with more tokens than the budget has a pass of its own."""
    if tokens is None:
        return [list(range(start, min(start + count, len(rows)))) for start in range(0, len(rows), count)]
    if packed:
        return plan_passes([sum(row.lengths) for row in rows], tokens, packed)
    parts, width, held = [], 0, 0
    for i in sorted(range(len(rows)), key=lambda i: -max(rows[i].lengths)):  # the first is the widest of its part
        held += len(rows[i].completions)
        if not parts or held * width > tokens:
            parts.append([])
            width, held = max(rows[i].lengths), len(rows[i].completions)
        parts[-1].append(i)
    return parts


def collate(rows: list[Judged], model: Scorer) -> ComparisonBatch:
    """The first completion of every row, then the second of every row that has one, and so on."""
    order = [(r, i) for i in range(max(len(row.completions) for row in rows)) for r, row in enumerate(rows)]
    order = [(r, i) for r, i in order if i < len(rows[r].completions)]
    prompts, completions = [rows[r].prompt for r, _ in order], [rows[r].completions[i] for r, i in order]
    sequences = pad_sequences(prompts, completions, model.pad_id)
    starts = dict(zip(order, (cumulated(sequences.lengths)[:-1] + sequences.prompt_lengths).tolist()))
    heads, places, pairs = model.module.score.out_features, [], []
    nothing = sum(len(row.places) for row in rows) * heads
    for r, row in enumerate(rows):
        first = len(places)
        places += [starts[r, completion] + token for completion, token in row.places]
        for c in row.comparisons:
            ends = [nothing if i is None else (first + i) * heads + c.objective for i in (c.better, c.worse)]
            pairs.append((*ends, c.margin, c.weight))
    known = (torch.tensor(x).to(model.device) for x in (places, *zip(*pairs)))
    return ComparisonBatch(sequences.to(model.device), *known)


def place_scores(model: Scorer, batch: ComparisonBatch) -> Tensor:  # (M, heads) float32
    return objective_scores(model, batch.sequences).index_select(0, batch.places)


@torch.no_grad()
def score_rows(model: Scorer, rows: list[Judged], config: RewardConfig) -> list[Tensor]:
    """(places, heads) float32 of every row, on the host."""
    found: dict[int, Tensor] = {}
    for part in _parts(rows, config.per_device_train_batch_size, config.micro_batch_tokens, model.packed):
        scores = place_scores(model, collate([rows[i] for i in part], model)).cpu()
        found |= dict(zip(part, scores.split([len(rows[i].places) for i in part])))
    return [found[i] for i in range(len(rows))]
