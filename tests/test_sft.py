"""Supervised fine-tuning: what is scored, that it learns, and what it leaves behind."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from conftest import SHARED_DATA

from rlhf import sft
from rlhf.config import InitConfig, SFTConfig
from rlhf.data import load
from rlhf.init import init
from rlhf.losses import completion_loss
from rlhf.model import ModelError, load_language_model
from rlhf.read import DataError, Source
from rlhf.sft import collate, train
from rlhf.tokens import TokenExample

pytestmark = pytest.mark.usefixtures("one_thread")


def config_for(tiny_model, corpus, folder, **changes) -> SFTConfig:
    base = {"model_name_or_path": tiny_model, "dataset_name": corpus, "output_dir": str(folder), "max_length": 16}
    return SFTConfig(**base | {"device": "cpu", "learning_rate": 3e-3, "per_device_train_batch_size": 8} | changes)


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_a_model_that_transformers_loads(tiny_model, corpus, tmp_path):
    from transformers import AutoModelForCausalLM

    seen = []
    config = config_for(tiny_model, corpus, tmp_path, num_train_epochs=16.0, learning_rate=1e-2)
    result = train(config, on_step=lambda step, model, metrics: seen.append((step, model, metrics["loss"])))
    assert [step for step, *_ in seen] == list(range(1, 81)) and result.steps == 80
    assert seen[0][2] > 2.5 and result.metrics["loss"] < 1.5
    rows = metrics_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 81)) and rows[-1]["epoch"] == 16.0
    assert {"loss", "grad_norm", "lr", "timing/step", "tokens_per_second", "memory/peak_gb"} <= rows[0].keys()
    model, ids = seen[-1][1], torch.tensor([[4, 5, 6]])
    reloaded = AutoModelForCausalLM.from_pretrained(result.final_dir)
    assert torch.equal(reloaded(ids).logits, model.module(ids).logits)
    assert SFTConfig(**yaml.safe_load((tmp_path / "config.yaml").read_text())) == config


def test_the_loss_of_a_step_is_the_mean_over_completion_tokens(tiny_model, corpus, tmp_path):
    """Golden: accumulation over four passes, against plain torch over single sequences."""
    config = config_for(
        tiny_model, corpus, tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    model = load_language_model(tiny_model, config)
    data = load(Source((corpus,)), model, "completion", 16)
    total, count = 0.0, 0
    for example in data.window(0, 8, config.seed):
        ids = torch.tensor([example.prompt + example.completions[0]])
        with torch.no_grad():
            logp = torch.log_softmax(model.module(ids).logits[0, :-1].double(), -1)
        chosen = logp.gather(1, ids[0, 1:, None])[len(example.prompt) - 1 :]
        total, count = total - float(chosen.sum()), count + len(chosen)
    metrics = train(config).metrics
    assert metrics["loss"] == pytest.approx(total / count, abs=1e-6) and metrics["tokens"] == count


def test_prompts_are_scored_only_when_asked(tiny_model):
    model = load_language_model(tiny_model, SFTConfig(model_name_or_path="m", dataset_name="d", output_dir="o"))
    examples = [TokenExample([4, 5, 6], [[7, 2]], "", {})]
    completion, whole = (collate(examples, model, only) for only in (True, False))
    assert completion.ids.tolist() == whole.ids.tolist() == [[4, 5, 6, 7, 2]]
    assert (int(completion.prompt_lengths), int(whole.prompt_lengths)) == (3, 1)


def test_a_step_that_is_not_finite_is_skipped_and_not_hidden(tiny_model, corpus, tmp_path, monkeypatch):
    calls = []

    def broken_once(logprobs, tokens):
        calls.append(tokens)
        return completion_loss(logprobs, tokens) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(sft, "completion_loss", broken_once)
    train(config_for(tiny_model, corpus, tmp_path, max_steps=3))
    rows = metrics_of(tmp_path)
    assert [row["loss"] is None for row in rows] == [False, True, False]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]


def test_tensorboard_on_request(tiny_model, corpus, tmp_path):
    pytest.importorskip("tensorboard")
    train(config_for(tiny_model, corpus, tmp_path, max_steps=1, report_to="tensorboard"))
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_bad_input_is_refused_before_training(tiny_model, corpus, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        train(config_for(tiny_model, "absent.jsonl", tmp_path))
    with pytest.raises(ModelError, match="not a model directory"):
        train(config_for(str(tmp_path), corpus, tmp_path))
    with pytest.raises(ModelError, match="max_length: 128 tokens are more than the 64 positions"):
        train(config_for(tiny_model, corpus, tmp_path, max_length=128))


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real data are not here")
def test_a_byte_level_model_of_real_text(tmp_path):
    text = str(SHARED_DATA / "tinyshakespeare.txt.gz")
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    base = init(InitConfig(dataset_name=text, output_dir=str(tmp_path / "base"), **sizes))
    model = load_language_model(str(base), SFTConfig(model_name_or_path="m", dataset_name="d", output_dir="o"))
    line = "Né à l'été, “quoted”\n\n\t漢字 🙂"
    assert model.tokenizer.decode(model.tokenizer(line)["input_ids"]) == line
    changes = {"max_length": 64, "max_steps": 12, "learning_rate": 1e-2}
    train(config_for(str(base), text, tmp_path / "sft", **changes))
    losses = [row["loss"] for row in metrics_of(tmp_path / "sft")]
    assert losses[0] > 5.5 and losses[-1] < 4.7
