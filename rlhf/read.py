"""Files, directories and hub datasets to rows: one at a time, each with the place where it stands.

`.txt`, `.jsonl`, `.json` and `.csv`, all of them also `.gz` or `.zst`, and `.parquet` are read here, without the type
inference (and the copy on disk) of `datasets`, which reads what is on the hub and what it saved itself.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from rlhf.config import TrainConfig, UsageError
from rlhf.files import sum_of

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
PACKED = ("", ".gz", ".zst")
SUFFIXES = tuple(kind + end for kind in KINDS for end in PACKED if not (kind == ".parquet" and end))
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # of datasets.save_to_disk
TEXTS = ("prompt", "completion", "chosen", "rejected", "text")  # columns of a CSV file that are never numbers
OF_CHAT = (
    "prompt",
    "messages",
    "completion",
    "chosen",
    "rejected",
    "completions",
    "ranking",
    "tools",
    "chat_template_kwargs",
)  # columns that a chat template reads
DEEPEST = 64  # lists and objects in one another; templates and tool schemas have a dozen
REASONS = 5  # kept of the rows that were skipped
BOM = b"\xef\xbb\xbf"
DAMAGE = (OSError, EOFError, zlib.error)  # what reading a file raises


class DataError(UsageError):
    """A file or row that can't be used; the message begins with file:line."""


def refuse(error: DataError) -> None:
    raise error


class Tally:
    """What became of rows. The first that cannot be used is an error, or all are counted and some reasons kept."""

    def __init__(self, on_bad_row: str = "error"):  # or skip
        self.on_bad_row, self.notes, self.reasons = on_bad_row, Counter(), []

    def bad(self, error: DataError) -> None:
        if self.on_bad_row == "error":
            raise error
        self.notes["skipped_rows"] += 1
        if len(self.reasons) < REASONS and str(error) not in self.reasons:
            self.reasons.append(str(error))

    def add(self, other: Tally) -> None:
        self.notes.update(other.notes)
        self.reasons = [*self.reasons, *other.reasons][:REASONS]


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    names: tuple[str, ...]  # files, directories or hub ids
    split: str = "train"  # of a hub dataset
    weights: tuple[float, ...] = ()  # how often the rows of each stand in an epoch; by default once
    on_bad_row: str = "error"  # or skip
    cache_dir: str | None = None  # of what rows became
    streamed: int = 0  # examples that a run takes of them as it goes; 0: all are read before it

    @staticmethod
    def of(config: TrainConfig) -> Source:
        batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return Source(
            tuple(config.dataset_name),
            config.dataset_split,
            tuple(config.dataset_weights),
            config.on_bad_row,
            config.dataset_cache_dir,
            config.max_steps * batch_size if config.dataset_streaming else 0,
        )


def kind_of(name: str) -> str:
    """The suffix of a file that is read here, less its compression; else ''."""
    return next((s.removesuffix(".gz").removesuffix(".zst") for s in SUFFIXES if name.endswith(s)), "")


def files_of(name: str) -> list[str]:
    """The files of a directory that can be read, hidden ones left out, in the order of names; else the name itself."""
    folder = Path(name)
    if not folder.is_dir() or any((folder / mark).is_file() for mark in SAVED):
        return [name]
    found = sorted(str(p) for p in folder.iterdir() if p.is_file() and kind_of(p.name) and not p.name.startswith("."))
    if not found:
        raise DataError(f"{name}: a directory without a file ending in one of {', '.join(SUFFIXES)}")
    return found


def read_rows(
    name: str,
    split: str = "train",  # of a hub dataset, or of a saved one that has splits
    bad: Callable[[DataError], None] = refuse,  # takes the lines that are no rows
    streaming: bool = False,  # a hub dataset: without a copy on disk
) -> Iterator[tuple[str, dict]]:
    """(file:line, row) of a file, a directory or a hub dataset. A plain text is one row with the column `text`."""
    if not Path(name).exists() and (kind_of(name) or name.startswith((".", "/", "~"))):
        raise DataError(f"{name}: no such file")
    if Path(name).is_file() and not kind_of(name):
        raise DataError(f"{name}: expected a file ending in one of {', '.join(SUFFIXES)}")
    if files_of(name) != [name]:
        for file in files_of(name):
            yield from read_rows(file, split, bad)
    elif not Path(name).is_file():
        yield from _with_datasets(name, split, streaming)
    elif kind_of(name) == ".txt":
        yield name, {"text": read_text(name)}
    else:
        yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[kind_of(name)](name, bad)


def content_of(name: str, split: str, streaming: bool = False) -> list[str]:
    """What stands for all that a name gives to read: sums of files; of a hub dataset the sum that `datasets` has, or
    the name where it is not to be loaded."""
    path = Path(name)
    if path.exists():
        try:
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            return [split, *(f"{kind_of(file.name)} {sum_of(file)}" for file in files)]
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error}") from error
    if streaming or not name or kind_of(name):
        return [split, name]
    return [split, name, _table(name, split, False)._fingerprint]


def read_text(path: str) -> str:
    return _decode(path, _read(path))


def check_text(where: str, text: str) -> str:
    """Refuses half of a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: not text: {error.object[error.start]!a} stands for no character") from error
    return text


def _open(path: str) -> BinaryIO:
    if path.endswith(".zst"):
        try:
            import pyarrow
        except ImportError as error:
            raise DataError(f"{path}: reading .zst needs pyarrow (pip install pyarrow), or unpack the file") from error
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _read(path: str) -> bytes:
    try:
        with _open(path) as file:
            return file.read()
    except DAMAGE as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _decode(where: str, data: bytes) -> str:
    try:
        return data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error


def _jsonl(path: str, bad: Callable[[DataError], None]) -> Iterator[tuple[str, dict]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.removeprefix(BOM).strip():
                    continue
                try:
                    row = _row(f"{path}:{number}", _parsed(f"{path}:{number}", line.rstrip()))
                except DataError as error:
                    bad(error)
                else:
                    yield f"{path}:{number}", row
    except DAMAGE as error:
        raise DataError(f"{path}:{number}: cannot be read: {error}") from error


def _json(path: str, bad: Callable[[DataError], None]) -> Iterator[tuple[str, dict]]:
    """A list of objects, alone or as `data` of an object; one object; or lines of objects, whatever the name says."""
    try:
        value = _parsed(path, _read(path))
    except DataError as error:
        if "Extra data" not in str(error):
            raise
        yield from _jsonl(path, bad)
        return
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    for number, entry in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"{path} row {number}"
        try:
            row = _row(where, entry)
        except DataError as error:
            bad(error)
        else:
            yield where, row


def _parsed(where: str, data: bytes) -> object:
    """Strict JSON: a key that stands twice and NaN, which readers take each in their own way, are refused."""
    text = _decode(where, data)
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: not valid JSON: {error.msg.removesuffix(' at')} at {place}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON: write null")


def _row(where: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
    if _deeper(value, DEEPEST):
        raise DataError(f"{where}: lists and objects stand in one another more than {DEEPEST} deep")
    return value


def _deeper(value: dict | list, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value
    return any(isinstance(x, (dict, list)) and (levels == 1 or _deeper(x, levels - 1)) for x in children)


def _csv(path: str, bad: Callable[[DataError], None]) -> Iterator[tuple[str, dict]]:
    """Columns of text stay text; elsewhere a cell that is JSON (a number, true, a list of messages) is read as that.
    An empty cell is null."""
    csv.field_size_limit(2**31 - 1)  # of the process; the default, 131,072 characters, is shorter than some dialogues
    number = 0
    try:
        with _open(path) as file:
            lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
            rows = csv.DictReader(lines, strict=True)  # else a quote that never closes takes all rows after it
            if len(set(rows.fieldnames or ())) < len(rows.fieldnames or ()):
                raise DataError(f"{path}: a column stands twice: {', '.join(rows.fieldnames)}")
            for number, cells in enumerate(rows, start=1):
                where = f"{path} row {number}"
                try:
                    if None in cells:
                        raise DataError(f"{where}: more cells than the {len(rows.fieldnames)} columns")
                    row = {name: _cell(where, name, text) for name, text in cells.items()}
                except DataError as error:
                    bad(error)
                else:
                    yield where, row
    except (*DAMAGE, csv.Error) as error:
        raise DataError(f"{path} row {number + 1}: cannot be read: {error}") from error


def _cell(where: str, name: str, text: str | None) -> object:
    if not text:
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {name}: not UTF-8 at character {error.start}") from error
    if name in TEXTS:
        return text
    try:
        return _parsed(where, {"True": "true", "False": "false"}.get(text, text).encode())
    except DataError:
        return text


def _parquet(path: str, bad: Callable[[DataError], None]) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            rows = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(1024))
            for number, row in enumerate(rows, start=1):
                yield f"{path} row {number}", _of_table(row)
    except (*DAMAGE, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read after row {number}: {' '.join(str(error).split())}") from error


def _of_table(row: dict) -> dict:
    """Less the nulls that a table puts into messages and tools for keys which other rows have."""
    return {name: _without_nulls(value) if name in OF_CHAT else value for name, value in row.items()}


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _with_datasets(name: str, split: str, streaming: bool) -> Iterator[tuple[str, dict]]:
    table, number = _table(name, split, streaming), 0
    try:
        for number, row in enumerate(table, start=1):
            yield f"{name} row {number}", _of_table(row)
    except Exception as error:  # of the network, of codecs
        told = " ".join(str(error).split())
        raise DataError(f"{name} row {number + 1}: cannot be read: {type(error).__name__}: {told}") from error


def _table(name: str, split: str, streaming: bool):
    import datasets  # a second of imports that files do without

    try:
        if Path(name).is_dir():
            table = datasets.load_from_disk(name)
            return table[split] if isinstance(table, datasets.DatasetDict) else table
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # datasets raises a dozen unrelated types for "it is not there" and "it is not valid"
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{name}: neither a file nor a dataset that loads: {told}") from error
