"""Streams: the same examples whichever way a window is reached, and no more read than is needed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from tiny_models import sentence, write_jsonl

from rlhf import reward_model, sft
from rlhf.config import ConfigError, RewardConfig, SFTConfig
from rlhf.data import SHUFFLED, Stream, load
from rlhf.model import load_tokenizer
from rlhf.read import DataError, Source
from rlhf.tokens import BLOCK, Reader

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def reader(tiny_model) -> Reader:
    return Reader(load_tokenizer(tiny_model), (2,))


def numbered(path, count: int, prefix: str = "") -> str:
    return write_jsonl(path, [{"prompt": f"the {prefix}{i}"} for i in range(count)])


def stream(reader: Reader, *names: str, **options) -> Stream:
    return load(Source(names, **{"streamed": 10_000} | options), reader, "prompt", 8)


def texts(data: Stream, start: int, stop: int, seed: int = 1) -> list[str]:
    return [example.text for example in data.window(start, stop, seed)]


def test_a_window_is_the_same_whichever_way_it_is_reached(tmp_path, reader):
    name = numbered(tmp_path / "rows.jsonl", 3_000)
    straight = stream(reader, name)
    whole = texts(straight, 0, 6_000)
    steps = [text for start in range(0, 6_000, 250) for text in texts(straight, start, start + 250)]
    assert steps == whole  # from the beginning again, step by step
    resumed = stream(reader, name)
    assert texts(resumed, 2_345, 2_700) == whole[2_345:2_700]
    assert texts(resumed, 100, 200) == whole[100:200]
    assert texts(resumed, 5_990, 6_000) == whole[5_990:]
    assert texts(resumed, 0, 500, seed=2) != whole[:500]


def test_every_row_comes_once_before_one_comes_again_but_for_a_block(tmp_path, reader):
    data = stream(reader, numbered(tmp_path / "rows.jsonl", 2 * SHUFFLED))
    first, second = (texts(data, 2 * SHUFFLED * k, 2 * SHUFFLED * (k + 1)) for k in range(2))
    assert sorted(first) == sorted(second) and len(set(first)) == 2 * SHUFFLED and first != second
    assert {text.split()[1] for text in first[:SHUFFLED]} == {str(i) for i in range(SHUFFLED)} != first[:SHUFFLED]


def test_datasets_take_turns_by_their_weights(tmp_path, reader):
    names = [numbered(tmp_path / f"{prefix}.jsonl", 50, prefix) for prefix in "ab"]
    for weights, share in (((), 0.5), ((3.0, 1.0), 0.75), ((1.0, 3.0), 0.25)):
        found = Counter(text[4] for text in texts(stream(reader, *names, weights=weights), 0, SHUFFLED))
        assert found == {"a": SHUFFLED * share, "b": SHUFFLED * (1 - share)}


def test_no_more_is_read_than_is_needed(tmp_path, reader):
    path = tmp_path / "rows.jsonl"
    numbered(path, 3 * BLOCK)
    with path.open("a") as file:
        file.write("{\n")
    data = stream(reader, str(path))
    texts(data, 0, 2 * SHUFFLED)
    assert data.notes["rows"] == 2 * BLOCK
    with pytest.raises(DataError, match=rf"rows\.jsonl:{3 * BLOCK + 1}: not valid JSON"):
        texts(data, 2 * SHUFFLED, 4 * SHUFFLED)
    skipping = stream(reader, str(path), on_bad_row="skip")
    assert len(texts(skipping, 0, 4 * SHUFFLED)) == 4 * SHUFFLED and skipping.notes["skipped_rows"] == 1
    texts(skipping, 4 * SHUFFLED, 7 * SHUFFLED)
    assert len(skipping.reasons) == 1 and skipping.reasons[0].startswith(f"{path}:{3 * BLOCK + 1}: ")


def test_what_cannot_be_read_is_refused_at_once(tmp_path, reader):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        stream(reader, numbered(tmp_path / "rows.jsonl", 3), str(tmp_path / "absent.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: no usable row"):
        stream(reader, str(tmp_path / "empty.jsonl"))


def test_a_fingerprint_is_that_of_the_content(tmp_path, reader):
    name = numbered(tmp_path / "rows.jsonl", 3)
    before = stream(reader, name).fingerprint()
    assert stream(reader, name).fingerprint() == before
    numbered(tmp_path / "rows.jsonl", 4)
    assert stream(reader, name).fingerprint() != before
    numbered(tmp_path / "rows.jsonl", 3)
    assert stream(reader, name).fingerprint() == before
    assert stream(replace(reader, eos_ids=(1,)), name).fingerprint() != before  # other tokens


def test_a_stream_needs_an_end_and_holds_nothing_out(tiny_model, tmp_path, pairs):
    base = {"model_name_or_path": tiny_model, "dataset_name": pairs, "output_dir": str(tmp_path), "device": "cpu"}
    with pytest.raises(ConfigError, match="max_steps: expected a number >= 1 with dataset_streaming"):
        SFTConfig(**base, dataset_streaming=True)
    config = RewardConfig(**base, max_length=16, dataset_streaming=True, max_steps=1)
    with pytest.raises(ConfigError, match=r"eval_fraction: expected 0 with dataset_streaming, got 0\.1"):
        reward_model.train(config)
    streamed = RewardConfig(**base, max_length=16, dataset_streaming=True, max_steps=2, eval_fraction=0.0)
    assert reward_model.train(streamed).metrics["epoch"] == 1.0


def test_a_run_continues_where_its_stream_stopped(tiny_model, tmp_path):
    """Six steps, and three continued by three more: the same losses."""
    rows = [{"prompt": sentence(i, 2), "completion": " " + sentence(i + 50, 3 + i % 5)} for i in range(30)]
    base = {"model_name_or_path": tiny_model, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows)}
    base |= {"max_length": 16, "device": "cpu", "per_device_train_batch_size": 4, "dataset_streaming": True}
    base |= {"lr_scheduler_type": "constant", "save_steps": 3, "max_steps": 6}
    sft.train(SFTConfig(**base, output_dir=str(tmp_path / "whole")))
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    for path in ("final", "checkpoint-000006"):
        (tmp_path / "whole" / path).rename(tmp_path / path)
    sft.train(SFTConfig(**base, output_dir=str(tmp_path / "whole"), resume="auto"))
    again = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = [[json.loads(line)["loss"] for line in lines] for lines in (whole, again)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
