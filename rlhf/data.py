"""The examples of a run and their order.

The order is a function of (seed, epoch), so a run continues from one integer: how many examples it has seen.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from rlhf.config import ConfigError
from rlhf.order import epoch_order, permutation
from rlhf.read import DataError, Source, Tally, content_of, files_of
from rlhf.rows import Form
from rlhf.store import Examples, state_of, stored_examples
from rlhf.tokens import Reader, TokenExample, file_examples, token_examples
from rlhf.types import PromptBatch

SHUFFLED = 1024  # examples of a stream that are shuffled at a time
Mapping = Callable[[TokenExample, Counter], TokenExample | None]  # of an example; it adds to the notes


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
        places = [[i for i in range(count) if (i in held) == side] for side in (False, True)]
        kind = Examples if isinstance(self.examples, Examples) else list  # of examples with more than these hold
        sides = [kind(self.examples[i] for i in side) for side in places]
        parts, start = [], 0
        for size, taken in self._parts:
            kept = sum(i not in held for i in range(start, start + size))
            parts.append((kept, max(1, round(kept * taken / size)) if kept else 0))
            start += size
        if not sides[0]:
            raise ConfigError(f"eval_fraction: {fraction} of {count} rows leaves none to train on: lower it")
        trained = {_said(example) for example in sides[0]} if held else set()
        notes = self.notes | {"held_out_rows_also_trained": sum(_said(example) in trained for example in sides[1])}
        return Dataset(sides[0], notes, tuple(parts), self.reasons), Dataset(sides[1], {})

    def mapped(self, function: Mapping) -> Dataset:
        """What the function makes of each example; those that it makes nothing of are left out."""
        found, parts, notes, start = [], [], Counter(self.notes), 0
        for size, taken in self._parts:
            kept = [e for example in self.examples[start : start + size] if (e := function(example, notes)) is not None]
            parts.append((len(kept), round(len(kept) * taken / size)))
            found += kept
            start += size
        if not found:
            raise DataError(f"no usable row: {dict(notes)}")
        return replace(self, examples=found, parts=tuple(parts), notes=dict(notes))

    def fingerprint(self) -> str:
        """Of all that training reads. Of a column that is no JSON the type counts: its repr may hold an address."""
        return fingerprint((e.prompt, e.completions, e.text, e.columns, e.counted) for e in self.examples)


class Stream:
    """Stands where a Dataset does, and has no end: a dataset that ends begins again.

    Rows come in the order of the files and are shuffled within blocks of SHUFFLED. Several datasets take turns, by
    their weights, or equally. What a window holds depends on its place and the seed alone; it is reached by reading
    all that stands before it, from the beginning where an earlier one is asked for.
    """

    def __init__(self, source: Source, reader: Reader, form: Form, max_length: int):
        self.source, self.reader, self.form, self.longest_prompt = source, reader, form, max_length
        self.function: Mapping = lambda example, notes: example
        self._begin()
        for name in source.names:  # refuses now, not in the middle of a run, what cannot be read at all
            next(self._endless(name))
        self._begin()

    def mapped(self, function: Mapping) -> Stream:
        """What the function makes of each example; those that it makes nothing of are left out."""
        found = copy.copy(self)
        found.function = function
        found._begin()
        return found

    def _begin(self) -> None:
        self.tally, self._number, self._block = Tally(self.source.on_bad_row), -1, []
        self._coming = self._mixed()

    def __len__(self) -> int:
        """Examples that the run takes, which are an epoch for want of an end."""
        return self.source.streamed

    @property
    def notes(self) -> dict[str, int]:
        """Of the rows that were read so far, which are some more than were used."""
        return dict(self.tally.notes)

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(self.tally.reasons)

    def window(self, start: int, stop: int, seed: int) -> list[TokenExample]:
        places = [divmod(i, SHUFFLED) for i in range(start, stop)]
        return [self._block_at(number)[permutation(SHUFFLED, f"{seed}/{number}")[i]] for number, i in places]

    def _block_at(self, number: int) -> list[TokenExample]:
        if number < self._number:
            self._begin()
        while self._number < number:
            self._block, self._number = list(islice(self._coming, SHUFFLED)), self._number + 1
        return self._block

    def _mixed(self) -> Iterator[TokenExample]:
        """Whose turn it is: of the dataset that is furthest behind its share."""
        weights = self.source.weights or (1.0,) * len(self.source.names)
        passes, due = [self._endless(name) for name in self.source.names], [0.0] * len(weights)
        while True:
            due = [owed + weight / sum(weights) for owed, weight in zip(due, weights)]
            turn = max(range(len(due)), key=due.__getitem__)
            due[turn] -= 1
            yield next(passes[turn])

    def _endless(self, name: str) -> Iterator[TokenExample]:
        while True:
            empty = True
            for file in files_of(name):
                for example in self._of_file(file):
                    if (found := self.function(example, self.tally.notes)) is not None:
                        empty = False
                        yield found
            if empty:
                raise DataError(f"{name}: no usable row: {self.notes}")

    def _of_file(self, file: str) -> Iterator[TokenExample]:
        return file_examples(file, self.source, self.reader, self.form, self.longest_prompt, self.tally)

    def split(self, fraction: float, seed: int) -> tuple[Stream, Dataset]:
        if fraction:
            way_out = "a stream has no rows to hold out"
            raise ConfigError(f"eval_fraction: expected 0 with dataset_streaming, got {fraction}: {way_out}")
        return self, Dataset((), {})

    def fingerprint(self) -> str:
        """Of the tokenizer, of the content of local files, and the names of hub datasets."""
        files = [file for name in self.source.names for file in files_of(name)]
        contents = (content_of(file, self.source.split, streaming=True) for file in files)
        return fingerprint([state_of(self.reader), *contents])


def fingerprint(rows: Iterable) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()


def _said(example: TokenExample) -> int:
    return hash((tuple(example.prompt), *map(tuple, example.completions)))


def prompt_batch(examples: list[TokenExample]) -> PromptBatch:
    names = {name for e in examples for name in e.columns}
    columns = {name: [e.columns.get(name) for e in examples] for name in sorted(names)}
    return PromptBatch([e.prompt for e in examples], [e.text for e in examples], columns)


def plan(count: int, batch_size: int, epochs: float, max_steps: int) -> list[tuple[int, int]]:
    """The window of each optimizer step: `epochs` passes exactly, the last step cut short, or else max_steps steps."""
    seen = max_steps * batch_size if max_steps > 0 else math.ceil(count * epochs)
    return [(start, min(start + batch_size, seen)) for start in range(0, seen, batch_size)]


def load(source: Source, reader: Reader, form: Form, max_length: int) -> Dataset | Stream:
    """Every row of the source as tokens, or what gives them as they are needed."""
    if source.streamed:
        return Stream(source, reader, form, max_length)
    examples, parts, tally = Examples(), [], Tally(source.on_bad_row)
    for number, name in enumerate(source.names):
        before = len(examples)
        for file in files_of(name):
            examples.extend(stored_examples(file, source, reader, form, max_length, tally))
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
    examples = Examples(token_examples(rows, reader, form, max_length, tally))
    return Dataset(examples, dict(tally.notes), reasons=tuple(tally.reasons))
