"""Reward models: they learn the order of pairs, score with mean 0 and deviation 1, and load in transformers."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf.config import RewardConfig
from rlhf.data import load
from rlhf.forward import sequence_scores
from rlhf.model import load_scorer
from rlhf.read import Source
from rlhf.reward_model import collate, score_pairs, train

pytestmark = pytest.mark.usefixtures("one_thread")


def config_for(tiny_model, pairs, folder, **changes) -> RewardConfig:
    base = {"model_name_or_path": tiny_model, "dataset_name": pairs, "output_dir": str(folder), "max_length": 32}
    return RewardConfig(**base | {"device": "cpu", "learning_rate": 3e-3, "eval_fraction": 0.25} | changes)


@pytest.fixture(scope="module")
def trained(one_thread, tiny_model, pairs, tmp_path_factory):
    config = config_for(tiny_model, pairs, tmp_path_factory.mktemp("reward"), num_train_epochs=6.0)
    return config, train(config)


def test_it_orders_held_out_pairs(trained):
    _config, result = trained
    assert result.metrics["eval/accuracy"] == 1.0 and result.metrics["eval/pairs"] == 8
    first = json.loads((result.output_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"] - 0.693) < 0.3 and result.metrics["loss"] < 0.1
    assert result.metrics["rewards/margins"] == pytest.approx(
        result.metrics["rewards/chosen"] - result.metrics["rewards/rejected"], abs=1e-4
    )


def test_scores_of_the_training_data_have_mean_0_and_deviation_1(trained):
    config, result = trained
    scorer = load_scorer(str(result.final_dir), config)
    assert scorer.module.config.reward_mean == pytest.approx(result.metrics["reward_mean"])
    data = load(Source.of(config), scorer, "preference", 32)
    scores = score_pairs(scorer, data.split(0.25, config.seed)[0], 8)
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5) and float(scores.std()) == pytest.approx(1.0, abs=1e-5)


def test_transformers_loads_it_with_the_same_score(trained):
    from transformers import AutoModelForSequenceClassification

    config, result = trained
    other = AutoModelForSequenceClassification.from_pretrained(result.final_dir)
    scorer = load_scorer(str(result.final_dir), config)
    assert other.config.num_labels == 1
    data = load(Source.of(config), scorer, "preference", 32)
    batch = collate(data.examples[:1], scorer)
    with torch.no_grad():
        raw = other(batch.ids[:1, : int(batch.lengths[0])]).logits[0, 0]
        ours = sequence_scores(scorer, batch)[0]
    expected = (raw - other.config.reward_mean) / other.config.reward_std
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_training_goes_on_from_a_reward_model(trained, tmp_path):
    config, result = trained
    again = train(config_for(str(result.final_dir), config.dataset_name, tmp_path, max_steps=1, learning_rate=1e-9))
    assert again.metrics["loss"] < 0.1


def test_pairs_stand_in_one_batch_chosen_first(tiny_model, pairs):
    scorer = load_scorer(tiny_model, config_for(tiny_model, pairs, "o"), head="zero")
    data = load(Source((pairs,)), scorer, "preference", 32)
    batch = collate(data.examples[:3], scorer)
    texts = [scorer.tokenizer.decode(row[: n - 1]) for row, n in zip(batch.ids.tolist(), batch.lengths.tolist())]
    assert all(text.endswith("great") for text in texts[:3])
    assert all(text.endswith(("dull", "bad")) for text in texts[3:])
    assert batch.prompt_lengths[:3].tolist() == batch.prompt_lengths[3:].tolist()


def test_centering_keeps_rewards_near_zero(tiny_model, pairs, tmp_path):
    changes = {"num_train_epochs": 6.0, "normalize_rewards": False}
    centered = train(config_for(tiny_model, pairs, tmp_path / "a", center_rewards_coefficient=1.0, **changes)).metrics
    free = train(config_for(tiny_model, pairs, tmp_path / "b", **changes)).metrics
    sums = [abs(m["rewards/chosen"] + m["rewards/rejected"]) for m in (centered, free)]
    assert sums[0] < 0.1 < sums[1] and "reward_mean" not in free
