"""The baseline of a reward model: a linear score of word counts, learnt from the same comparisons.

What it can't do is read: a reward model that orders held-out responses no better has learnt which words are liked.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from rlhf.comparisons import Judged

L2 = (1e-3, 1e-2, 1e-1, 1.0)  # weights of half the squared norm, beside a mean over the comparisons
INNER = 5  # one training row in so many chooses among them
CONSTANT = ""  # a word of every step, as right and wrong ones need not be as many


@dataclass(frozen=True)
class Difference:
    """Word counts of a comparison's better side, less those of its worse."""

    counts: dict[str, int]
    objective: int
    weight: float
    row: int


def baseline_margins(train: list[Judged], held_out: list[Judged], tokenizer) -> Tensor:
    """(P,) float64, better - worse of the held-out comparisons. Each objective has a logistic regression of its own;
    its penalty is the one of L2 that orders every INNER-th training row best after learning from the others."""
    learnt, judged = differences(train, tokenizer), differences(held_out, tokenizer)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(w for d in learnt for w in d.counts))}
    margins = torch.zeros(len(judged), dtype=torch.float64)
    for objective in sorted({d.objective for d in learnt}):
        mine = [d for d in learnt if d.objective == objective]
        inner, rest = [d for d in mine if d.row % INNER == 0], [d for d in mine if d.row % INNER]
        losses = {l2: loss(inner, fit(rest, vocabulary, l2), vocabulary) for l2 in L2} if inner and rest else {1.0: 0.0}
        weight = fit(mine, vocabulary, min(losses, key=losses.get))
        wanted = [i for i, d in enumerate(judged) if d.objective == objective]
        if wanted:
            margins[wanted] = scores([judged[i] for i in wanted], weight, vocabulary)
    return margins


def differences(rows: list[Judged], tokenizer) -> list[Difference]:
    found = []
    for number, row in enumerate(rows):
        words = _words(row, tokenizer)
        for c in row.comparisons:
            better, worse = ({} if i is None else words[i] for i in (c.better, c.worse))
            counts = {w: n for w in {**better, **worse} if (n := better.get(w, 0) - worse.get(w, 0))}
            found.append(Difference(counts, c.objective, c.weight, number))
    return found


def _words(row: Judged, tokenizer) -> list[Counter]:
    """Words and marks of each place: of a whole response, or of its step alone."""
    found, ends = [], [-1] * len(row.completions)
    of_steps = any(None in (c.better, c.worse) for c in row.comparisons)
    for completion, token in row.places:
        ids, ends[completion] = row.completions[completion][ends[completion] + 1 : token + 1], token
        text = tokenizer.decode(ids, skip_special_tokens=True).lower()
        found.append(Counter(re.findall(r"\w+|[^\w\s]", text) + [CONSTANT] * of_steps))
    return found


def fit(learnt: list[Difference], vocabulary: dict[str, int], l2: float) -> Tensor:  # (V, 1)
    """The penalised optimum, which is one point: nothing is drawn at random."""
    weight, bags = torch.zeros(len(vocabulary), 1, dtype=torch.float64, requires_grad=True), _bags(learnt, vocabulary)
    share = torch.tensor([d.weight for d in learnt], dtype=torch.float64)
    precise = {"tolerance_grad": 1e-7, "tolerance_change": 1e-12, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weight], max_iter=200, **precise)

    def objective() -> Tensor:
        optimizer.zero_grad()
        margins = embedding_bag(weight=weight, mode="sum", **bags)[:, 0]
        value = share @ softplus(-margins) / share.sum() + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(objective)
    return weight.detach()


def loss(judged: list[Difference], weight: Tensor, vocabulary: dict[str, int]) -> float:
    share = torch.tensor([d.weight for d in judged], dtype=torch.float64)
    return float(share @ softplus(-scores(judged, weight, vocabulary)) / share.sum())


def scores(judged: list[Difference], weight: Tensor, vocabulary: dict[str, int]) -> Tensor:  # (P,)
    return embedding_bag(weight=weight, mode="sum", **_bags(judged, vocabulary))[:, 0]


def _bags(judged: list[Difference], vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """Of known words; others weigh nothing."""
    known = [[(vocabulary[w], n) for w, n in d.counts.items() if w in vocabulary] for d in judged]
    lengths = torch.tensor([0, *map(len, known)])
    ids, counts = zip(*(pair for pairs in known for pair in pairs)) if any(known) else ((), ())
    counts = torch.tensor(counts, dtype=torch.float64)
    return {
        "input": torch.tensor(ids, dtype=torch.long),
        "offsets": lengths.cumsum(0)[:-1],
        "per_sample_weights": counts,
    }
