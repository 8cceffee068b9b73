"""The examples of a run and their order.

The order is a function of (seed, epoch), so a run continues from one integer: how many examples it has seen.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rlhf.read import DataError, Source, Tally, files_of
from rlhf.rows import Form
from rlhf.tokens import Reader, TokenExample, file_examples, token_examples
from rlhf.types import PromptBatch


@dataclass(frozen=True)
class Dataset:
    examples: Sequence[TokenExample]
    notes: dict[str, int]  # what was cut, dropped or skipped, and how often
    parts: tuple[tuple[int, int], ...] = ()  # of each dataset: examples, and how many of them an epoch takes
    reasons: tuple[str, ...] = ()  # why the first of the skipped rows were

    def __len__(self) -> int:
        """Examples in an epoch."""
        return sum(taken for _, taken in self._parts)

    @property
    def _parts(self) -> tuple[tuple[int, int], ...]:
        return self.parts or ((len(self.examples),) * 2,)

    @property
    def longest_prompt(self) -> int:
        return max(len(example.prompt) for example in self.examples)

    def window(self, start: int, stop: int, seed: int) -> list[TokenExample]:
        """Examples start..stop of the endless stream of epochs, each epoch in its own order."""
        places = [divmod(i, len(self)) for i in range(start, stop)]
        return [self.examples[epoch_order(self._parts, seed, epoch)[i]] for epoch, i in places]

    def split(self, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """(rest, held out), both in file order; what is held out stands once, whatever its dataset's weight."""
        count = len(self.examples)
        held = set(permutation(count, f"{seed}/eval")[: int(count * fraction)])
        sides = [[e for i, e in enumerate(self.examples) if (i in held) == side] for side in (False, True)]
        parts, start = [], 0
        for size, taken in self._parts:
            kept = sum(i not in held for i in range(start, start + size))
            parts.append((kept, round(kept * taken / size)))
            start += size
        return Dataset(sides[0], self.notes, tuple(parts), self.reasons), Dataset(sides[1], {})

    def fingerprint(self) -> str:
        """Of all that training reads. Of a column that is no JSON the type counts: its repr may hold an address."""
        return fingerprint((e.prompt, e.completions, e.text, e.columns, e.counted) for e in self.examples)


def fingerprint(rows: Iterable) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()


def prompt_batch(examples: list[TokenExample]) -> PromptBatch:
    names = {name for e in examples for name in e.columns}
    columns = {name: [e.columns.get(name) for e in examples] for name in sorted(names)}
    return PromptBatch([e.prompt for e in examples], [e.text for e in examples], columns)


def plan(count: int, batch_size: int, epochs: float, max_steps: int) -> list[tuple[int, int]]:
    """The window of each optimizer step: `epochs` passes exactly, the last step cut short, or else max_steps steps."""
    seen = max_steps * batch_size if max_steps > 0 else math.ceil(count * epochs)
    return [(start, min(start + batch_size, seen)) for start in range(0, seen, batch_size)]


@lru_cache(maxsize=4)
def permutation(n: int, key: str) -> list[int]:
    order = list(range(n))
    random.Random(key).shuffle(order)
    return order


@lru_cache(maxsize=4)
def epoch_order(parts: tuple[tuple[int, int], ...], seed: int, epoch: int) -> list[int]:
    """Which example stands where. Of a dataset that an epoch takes in part, epochs take one part after the other of its
    own shuffled passes: every example comes before one comes again."""
    chosen, start = [], 0
    for number, (count, taken) in enumerate(parts):
        copies, rest = divmod(taken, count) if count else (0, 0)
        chosen += list(range(start, start + count)) * copies
        for i in range(epoch * rest, (epoch + 1) * rest):
            chosen.append(start + permutation(count, f"{seed}/{number}/{i // count}")[i % count])
        start += count
    return [chosen[i] for i in permutation(len(chosen), f"{seed}/{epoch}")]


def load(source: Source, reader: Reader, form: Form, max_length: int) -> Dataset:
    """Every row of the source as tokens."""
    examples, parts, tally = [], [], Tally(source.on_bad_row)
    for number, name in enumerate(source.names):
        before = len(examples)
        for file in files_of(name):
            examples += file_examples(file, source, reader, form, max_length, tally)
        size = len(examples) - before
        taken = round(size * source.weights[number]) if source.weights else size
        if not taken:
            raise DataError(f"{name}: dataset_weights: {source.weights[number]} of {size} rows is none")
        parts.append((size, taken))
    return Dataset(examples, dict(tally.notes), tuple(parts), tuple(tally.reasons))


def tokenize(
    rows: Iterable[tuple[str, dict]],  # file:line, row
    reader: Reader,
    form: Form,
    max_length: int,
    tally: Tally | None = None,  # of what reads the rows; by default a row that cannot be used is an error
) -> Dataset:
    tally = tally or Tally()
    examples = list(token_examples(rows, reader, form, max_length, tally))
    return Dataset(examples, dict(tally.notes), reasons=tuple(tally.reasons))
