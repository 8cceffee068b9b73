"""Token examples in flat arrays, in memory and in the files of a cache."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy
import torch

from rlhf.files import bytes_of, keep, kept
from rlhf.read import DataError, Source, Tally, content_of
from rlhf.rows import Form
from rlhf.tokens import Reader, TokenExample, file_examples

CODE = ("read.py", "chat.py", "rows.py", "tokens.py", "store.py")  # by which rows become what is kept


DTYPES = {"tokens": "int32", "ends": "int64", "lasts": "int64"}  # of the arrays of Examples


class Examples(Sequence[TokenExample]):
    """4 bytes a token, where lists of Python's integers take some 40. An example is made when it is asked for."""

    def __init__(self, examples: Iterable[TokenExample] = ()):
        self.tokens = array("i")
        self.ends = array("q")  # of each prompt and completion, in tokens
        self.lasts = array("q")  # of each example, in ends
        self.others: list[list] = []  # of each example: text, columns, 0 or 1 a token that counts, or None, and where
        for example in examples:
            for ids in (example.prompt, *example.completions):
                self.tokens.extend(ids)
                self.ends.append(len(self.tokens))
            self.lasts.append(len(self.ends))
            counted = None if example.counted is None else "".join("01"[counts] for counts in example.counted)
            self.others.append([example.text, example.columns, counted, example.where])

    def __len__(self) -> int:
        return len(self.others)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        first, last = self.lasts[index - 1] if index else 0, self.lasts[index]
        starts = [self.ends[first - 1] if first else 0, *self.ends[first:last]]
        prompt, *completions = [self.tokens[start:stop].tolist() for start, stop in pairwise(starts)]
        text, columns, counted, where = self.others[index]
        return TokenExample(prompt, completions, text, columns, counted and [mark == "1" for mark in counted], where)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Examples) and vars(self) == vars(other)

    def extend(self, more: Examples) -> None:
        tokens, ends = len(self.tokens), len(self.ends)
        self.tokens += more.tokens
        self.ends.extend(end + tokens for end in more.ends)
        self.lasts.extend(last + ends for last in more.lasts)
        self.others += more.others


def stored_examples(
    name: str,  # a file, or a hub dataset
    source: Source,
    reader: Reader,
    form: Form,
    max_length: int,
    tally: Tally,
) -> Examples:
    """`file_examples`, or what they were when the same content was read with the same tokenizer in the same way."""
    if source.cache_dir is None or not reader.tokenizer.is_fast:
        return Examples(file_examples(name, source, reader, form, max_length, tally))
    key = [_code(), content_of(name, source.split), state_of(reader), form, max_length, source.on_bad_row]
    key = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()
    path, own = Path(source.cache_dir) / f"{key}.safetensors", Tally(source.on_bad_row)
    if (examples := read(path, key, own)) is None:
        examples = Examples(file_examples(name, source, reader, form, max_length, own))
        write(path, key, examples, own)
    tally.add(own)
    return examples


@cache
def _code() -> list[str]:
    """What computes: another version of it is another cache."""
    import tokenizers
    import transformers

    ours = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in CODE)).hexdigest()
    return [ours, tokenizers.__version__, transformers.__version__]


def state_of(reader: Reader) -> list:
    """What rows become tokens by."""
    tokenizer = reader.tokenizer
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return [
        rules, tokenizer.split_special_tokens, tokenizer.chat_template, tokenizer.special_tokens_map,
        list(reader.eos_ids), reader.vocab_size,
    ]  # fmt: skip


def write(path: Path, key: str, examples: Examples, tally: Tally) -> None:
    """The file; none where a column holds what JSON does not give back (a date, an image)."""
    try:
        record = json.dumps([examples.others, tally.notes, tally.reasons])
    except TypeError:
        return
    if json.loads(record)[0] != examples.others:
        return
    tensors = {name: torch.tensor(numpy.frombuffer(getattr(examples, name), dtype)) for name, dtype in DTYPES.items()}
    tensors["record"] = torch.frombuffer(bytearray(record.encode()), dtype=torch.uint8)
    try:
        keep(path, key, tensors)
    except OSError as error:
        raise DataError(f"dataset_cache_dir: cannot be written: {error}") from error


def read(path: Path, key: str, tally: Tally) -> Examples | None:
    """What was written, or None where it is not there or damaged."""
    if (tensors := kept(path, key)) is None:
        return None
    examples = Examples()
    for name in DTYPES:
        getattr(examples, name).frombytes(bytes_of(tensors[name]))
    examples.others, notes, tally.reasons = json.loads(bytes_of(tensors["record"]))
    tally.notes.update(notes)
    return examples
