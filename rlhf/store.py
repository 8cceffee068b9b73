"""Token examples in flat arrays, in memory and in the files of a cache."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from rlhf.read import DataError, Source, Tally, content_of
from rlhf.rows import Form
from rlhf.tokens import Reader, TokenExample, file_examples

FORMAT = 2  # of the cache, and of what rows become: another number is another cache


class Examples(Sequence[TokenExample]):
    """4 bytes a token, where lists of Python's integers take some 40. An example is made when it is asked for."""

    def __init__(self, examples: Iterable[TokenExample] = ()):
        self.tokens = array("i")
        self.ends = array("q")  # of each prompt and completion, in tokens
        self.lasts = array("q")  # of each example, in ends
        self.others: list[list] = []  # of each example: text, columns, and 0 or 1 a token that counts, or None
        for example in examples:
            for ids in (example.prompt, *example.completions):
                self.tokens.extend(ids)
                self.ends.append(len(self.tokens))
            self.lasts.append(len(self.ends))
            counted = None if example.counted is None else "".join("01"[counts] for counts in example.counted)
            self.others.append([example.text, example.columns, counted])

    def __len__(self) -> int:
        return len(self.others)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        first, last = self.lasts[index - 1] if index else 0, self.lasts[index]
        starts = [self.ends[first - 1] if first else 0, *self.ends[first:last]]
        prompt, *completions = [self.tokens[start:stop].tolist() for start, stop in pairwise(starts)]
        text, columns, counted = self.others[index]
        return TokenExample(prompt, completions, text, columns, counted and [mark == "1" for mark in counted])

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
    key = [FORMAT, content_of(name, source.split), _state_of(reader), form, max_length, source.on_bad_row]
    path = Path(source.cache_dir) / f"{hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()}.safetensors"
    own = Tally(source.on_bad_row)
    if (examples := read(path, own)) is None:
        examples = Examples(file_examples(name, source, reader, form, max_length, own))
        write(path, examples, own)
    tally.add(own)
    return examples


def _state_of(reader: Reader) -> list:
    import tokenizers

    tokenizer = reader.tokenizer
    return [
        tokenizers.__version__, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
        tokenizer.special_tokens_map, list(reader.eos_ids), reader.vocab_size,
    ]  # fmt: skip


def write(path: Path, examples: Examples, tally: Tally) -> None:
    """The file, whole or not at all; none where a column holds what JSON does not give back (a date, an image)."""
    import numpy
    from safetensors.numpy import save_file

    try:
        record = json.dumps([examples.others, tally.notes, tally.reasons])
    except TypeError:
        return
    if json.loads(record)[0] != examples.others:
        return
    arrays = {name: numpy.frombuffer(getattr(examples, name), dtype) for name, dtype in DTYPES.items()}
    arrays["record"] = numpy.frombuffer(record.encode(), "uint8")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary, {"sha256": _digest(arrays)})
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"dataset_cache_dir: cannot be written: {error}") from error


def read(path: Path, tally: Tally) -> Examples | None:
    """What was written, or None where it is not there or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if metadata.get("sha256") != _digest(arrays):
        return None
    examples = Examples()
    for name in DTYPES:
        getattr(examples, name).frombytes(arrays[name].tobytes())
    examples.others, notes, tally.reasons = json.loads(arrays["record"].tobytes())
    tally.notes.update(notes)
    return examples


DTYPES = {"tokens": "int32", "ends": "int64", "lasts": "int64"}


def _digest(arrays: dict) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].size} ".encode())
        digest.update(arrays[name])
    return digest.hexdigest()
