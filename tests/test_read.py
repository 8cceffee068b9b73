"""Files of every kind give the same rows, and say where each stands."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from tiny_models import write_jsonl

from rlhf.data import SHUFFLED, load
from rlhf.model import load_tokenizer
from rlhf.read import DataError, Source, content_of, files_of, read_rows
from rlhf.tokens import Reader

ROWS = [
    {"prompt": "the film", "completion": 'was "good",\n\nnaïve', "score": 3, "note": None},
    {"prompt": "7", "completion": "true", "score": 0.5, "note": "漢字"},
]


def as_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    import datasets

    paths = {kind: tmp_path / f"rows.{kind}" for kind in ("jsonl", "json", "csv", "parquet")}
    write_jsonl(paths["jsonl"], ROWS)
    paths["json"].write_text(json.dumps(ROWS, indent=1))
    as_csv(paths["csv"], ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(paths["parquet"])
    return paths


def packed(path: Path, end: str) -> Path:
    import pyarrow

    target = path.with_name(path.name + end)
    if end == ".gz":
        target.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pyarrow.CompressedOutputStream(str(target), "zstd") as file:
            file.write(path.read_bytes())
    return target


def rows_of(name: Path | str) -> list[dict]:
    return [row for _, row in read_rows(str(name))]


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_gives_the_same_rows_and_their_places(files, kind, end):
    if kind == "parquet" and end:
        pytest.skip("a parquet file is compressed inside")
    path = packed(files[kind], end) if end else files[kind]
    assert rows_of(path) == ROWS
    expected = [f"{path}:1", f"{path}:2"] if kind == "jsonl" else [f"{path} row 1", f"{path} row 2"]
    assert [where for where, _ in read_rows(str(path))] == expected


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_a_text_is_one_row(tmp_path, end):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + "naïve\r\n漢字\n".encode())
    path = packed(tmp_path / "text.txt", end) if end else tmp_path / "text.txt"
    assert rows_of(path) == [{"text": "naïve\r\n漢字\n"}]


def test_the_shapes_of_a_json_file(tmp_path):
    path = tmp_path / "rows.json"
    for text in (json.dumps({"version": 1, "data": ROWS}), "\n".join(map(json.dumps, ROWS)), json.dumps(ROWS[0])):
        path.write_text(text)
        assert rows_of(path) == ROWS[: text.count('"prompt"')]
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert [where for where, _ in read_rows(str(path))] == [f"{path}:1", f"{path}:2"]


def test_cells_of_a_csv_file_are_json_but_for_texts(tmp_path):
    messages = [{"role": "user", "content": "the film"}]
    row = {"prompt": "12", "text": "true", "label": True, "margin": 0.5, "note": "a,b", "empty": None}
    row["completion"] = "x" * 200_000
    as_csv(tmp_path / "rows.csv", [row | {"messages": json.dumps(messages)}])
    assert rows_of(tmp_path / "rows.csv") == [row | {"messages": messages}]


def test_a_quote_that_never_closes_takes_no_rows_with_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\na,b\nthe film," was good\nthe plot, was bad\nthe play, was fine\n')
    with pytest.raises(DataError, match=r"rows\.csv row 2: cannot be read: unexpected end of data"):
        rows_of(path)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_table_puts_no_nulls_into_messages_and_tools(tmp_path, kind):
    """Rows share the keys of all: the arguments of one call would stand as null in every other."""
    import datasets

    calls = [{"name": "find", "arguments": {"word": "film"}}, {"name": "add", "arguments": {"a": 1, "b": 2}}]
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [call]}], "tools": [call], "meta": call} for call in calls
    ]
    table = datasets.Dataset.from_list(rows)
    path = tmp_path / "rows.parquet"
    table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    found = rows_of(path)
    assert [{"messages": row["messages"], "tools": row["tools"]} for row in found] == [
        {"messages": row["messages"], "tools": row["tools"]} for row in rows
    ]
    assert found[0]["meta"]["arguments"] == {"word": "film", "a": None, "b": None}  # columns of others are as they are


def test_a_directory_is_its_files_by_name(files, tmp_path):
    (tmp_path / "notes.md").write_text("no data")
    (tmp_path / "deeper.jsonl").mkdir()
    (tmp_path / "._rows.jsonl").write_bytes(b"\xff")  # of a Mac, beside each file of an archive
    names = [str(files[kind]) for kind in ("csv", "json", "jsonl", "parquet")]
    assert files_of(str(tmp_path)) == names and rows_of(tmp_path) == ROWS * 4
    assert [where for where, _ in read_rows(str(tmp_path))][4:6] == [f"{files['jsonl']}:1", f"{files['jsonl']}:2"]


def test_a_directory_of_texts_is_cut_into_blocks_file_by_file(tmp_path, tiny_model):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("the film was good " * 3)
    data = load(Source((str(tmp_path),)), Reader(load_tokenizer(tiny_model), (2,)), "completion", 8)
    assert data.notes == {"blocks": 2, "dropped_tokens": 8} and data.examples[0] == data.examples[1]


def test_datasets_that_were_saved(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "split")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "split") == ROWS
    where, row = next(read_rows(str(tmp_path / "split"), "test"))
    assert (where, row) == (f"{tmp_path}/split row 1", ROWS[1])
    with pytest.raises(DataError, match="split: neither a file nor a dataset that loads: KeyError: 'dev'"):
        next(read_rows(str(tmp_path / "split"), "dev"))


def test_without_pyarrow_there_is_a_way_out(files, monkeypatch):
    path = packed(files["jsonl"], ".zst")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"rows\.jsonl\.zst: reading \.zst needs pyarrow \(pip install pyarrow\)"):
        next(read_rows(str(path)))


def test_rows_are_read_one_at_a_time(tmp_path):
    """A row is there before the next is looked at."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "the"}\n{')
    rows = read_rows(str(path))
    assert next(rows) == (f"{path}:1", {"prompt": "the"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not valid JSON"):
        next(rows)


def test_hub_datasets_are_read_whole_or_streamed(files, tmp_path, monkeypatch, tiny_model):
    """Through the library itself, which finds the dataset in a directory in place of the hub."""
    import datasets

    (tmp_path / "hub").mkdir()
    files["parquet"].rename(tmp_path / "hub" / "train.parquet")
    asked, real = [], datasets.load_dataset

    def found(name: str, split: str, streaming: bool):
        asked.append((name, split, streaming))
        return real(str(tmp_path / "hub"), split=split, streaming=streaming, cache_dir=str(tmp_path / "arrow"))

    monkeypatch.setattr(datasets, "load_dataset", found)
    expected = [(f"org/name row {i}", row) for i, row in enumerate(ROWS, start=1)]
    assert list(read_rows("org/name")) == list(read_rows("org/name", streaming=True)) == expected
    assert asked == [("org/name", "train", False), ("org/name", "train", True)]
    assert content_of("org/name", "train") == content_of("org/name", "train") != content_of("org/name", "train[:1]")
    reader = Reader(load_tokenizer(tiny_model), (2,))
    stream = load(Source(("org/name",), streamed=4), reader, "completion", 16)
    assert asked[-1] == ("org/name", "train", True)
    assert Counter(e.text for e in stream.window(0, SHUFFLED, 1)) == {"the film": SHUFFLED / 2, "7": SHUFFLED / 2}
    with pytest.raises(DataError, match=r"^org/name: neither a file nor a dataset that loads: .*Unknown split"):
        next(read_rows("org/name", "dev"))
