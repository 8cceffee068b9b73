"""Examples in flat arrays, and the cache of them: the same examples, and only where everything is as it was."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
from dataclasses import replace

import pytest
from tiny_models import write_jsonl

from rlhf import store
from rlhf.data import Dataset, load
from rlhf.model import load_tokenizer
from rlhf.read import DataError, Source
from rlhf.store import Examples
from rlhf.tokens import Reader, TokenExample

LIST = [
    TokenExample([1], [], "a", {}),
    TokenExample([2, 3], [[4], [5, 6, 7]], "bc", {"label": 1.5}),
    TokenExample([8], [[]], "", {"x": [None, {"y": "\ud800"}]}),
    TokenExample([9, 2**31 - 1], [[10, 11, 12]], "漢", {}, [True, False, True]),
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }} {% endfor %}"
    "{{ 'assistant ' * add_generation_prompt }}"
)


@pytest.fixture
def reader(tiny_model) -> Reader:
    return Reader(load_tokenizer(tiny_model), (2,))


def test_flat_examples_are_the_list_of_them():
    flat = Examples(LIST)
    assert list(flat) == LIST and flat[1:3] == LIST[1:3] and flat[-1] == LIST[-1] and flat[::-2] == LIST[::-2]
    with pytest.raises(IndexError):
        flat[4]
    flat.extend(Examples(LIST[2:]))
    flat.extend(Examples())
    assert list(flat) == [*LIST, *LIST[2:]] and flat == Examples([*LIST, *LIST[2:]]) != Examples(LIST)
    assert Dataset(flat, {}).fingerprint() == Dataset([*LIST, *LIST[2:]], {}).fingerprint()


@pytest.fixture
def rows(tmp_path) -> str:
    rows = [{"prompt": "the film", "completion": f" was {word}", "n": i} for i, word in enumerate(["good", "bad"])]
    name = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": "the"}])
    return name


def cached(tmp_path, rows: str, reader: Reader, form: str = "completion", max_length: int = 16, **changes) -> Dataset:
    source = Source((rows,), on_bad_row="skip", cache_dir=str(tmp_path / "cache"))
    return load(replace(source, **changes), reader, form, max_length)


def files(tmp_path) -> list[str]:
    return sorted(os.listdir(tmp_path / "cache"))


def test_a_hit_reads_no_row_and_gives_the_same_dataset(tmp_path, rows, reader, monkeypatch):
    plain = cached(tmp_path, rows, reader, cache_dir=None)
    assert not (tmp_path / "cache").exists()
    first = cached(tmp_path, rows, reader)
    monkeypatch.setattr(store, "file_examples", None)  # a call fails
    second = cached(tmp_path, rows, reader)
    assert plain == first == second and plain.fingerprint() == second.fingerprint() and len(files(tmp_path)) == 1
    assert second.notes["skipped_rows"] == 1 and second.reasons[0].startswith(f"{rows}:3: ")
    moved = shutil.move(rows, tmp_path / "moved.jsonl")
    assert cached(tmp_path, str(moved), reader) == first


def test_whatever_changes_the_examples_changes_the_file(tmp_path, rows, reader, monkeypatch):
    first = cached(tmp_path, rows, reader)
    ways = [
        lambda: cached(tmp_path, rows, reader, max_length=3),
        lambda: cached(tmp_path, rows, reader, form="prompt"),
        lambda: cached(tmp_path, rows, replace(reader, eos_ids=(1,))),
        lambda: cached(tmp_path, rows, replace(reader, vocab_size=18)),
    ]
    for number, way in enumerate(ways, start=2):
        assert way() is not None and len(files(tmp_path)) == number
    reader.tokenizer.chat_template = TEMPLATE
    cached(tmp_path, rows, reader)
    reader.tokenizer.add_tokens(["was good"])
    assert cached(tmp_path, rows, reader).fingerprint() != first.fingerprint()
    assert len(files(tmp_path)) == 7
    with pytest.raises(DataError, match=r"rows\.jsonl:3: expected the column 'completion'"):
        cached(tmp_path, rows, reader, on_bad_row="error")
    with open(rows, "a") as file:
        file.write('{"prompt": "the", "completion": " plot"}\n')
    assert len(cached(tmp_path, rows, reader)) == 3 and len(files(tmp_path)) == 8
    reader.tokenizer.split_special_tokens = True
    cached(tmp_path, rows, reader)
    assert len(files(tmp_path)) == 9
    monkeypatch.setattr(store, "_code", lambda: ["of another version"])
    cached(tmp_path, rows, reader)
    assert len(files(tmp_path)) == 10


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 0.99, "cut", "empty"])
def test_a_damaged_file_is_written_again(tmp_path, rows, reader, place):
    first = cached(tmp_path, rows, reader)
    (name,) = files(tmp_path)
    path = tmp_path / "cache" / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    if place in ("cut", "empty"):
        damaged = damaged[: -7 if place == "cut" else 0]
    else:
        damaged[int(place * len(whole))] ^= 0x41
    path.write_bytes(damaged)
    assert cached(tmp_path, rows, reader) == first
    assert path.read_bytes() == whole and files(tmp_path) == [name]


def test_dialogues_and_datasets_of_several_files(tmp_path, reader):
    reader.tokenizer.chat_template = TEMPLATE
    turns = [{"role": role, "content": "the film"} for role in ("user", "assistant") * 2]
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / "rows").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "rows" / name, [{"messages": turns[: 2 if name == "b.jsonl" else 4]}])
    first, second = (cached(tmp_path, str(tmp_path / "rows"), reader, "dialogue", 32) for _ in range(2))
    assert first == second and len(files(tmp_path)) == 2  # a and c are the same
    assert [e.counted.count(True) for e in second.examples] == [6, 3, 6]


def test_columns_that_json_does_not_give_back_are_not_kept(tmp_path, reader):
    import datasets

    rows = [{"prompt": "the", "day": datetime.date(2026, 1, 1)}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for _ in range(2):
        data = cached(tmp_path, str(tmp_path / "rows.parquet"), reader, "prompt")
        assert data.examples[0].columns["day"] == datetime.date(2026, 1, 1)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, rows, reader):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^dataset_cache_dir: cannot be written: "):
        cached(tmp_path, rows, reader, cache_dir=str(tmp_path / "file" / "cache"))


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, rows, reader):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # as a disk would, in the middle of the file
    try:
        with pytest.raises(DataError, match=r"^dataset_cache_dir: cannot be written: "):
            cached(tmp_path, rows, reader)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not files(tmp_path)
