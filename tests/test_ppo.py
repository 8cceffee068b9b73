"""PPO: exact at the start, learns, and reports what it optimised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHARED_DATA

from rlhf import layout, ppo, reward_model
from rlhf.config import ConfigError, InitConfig, PPOConfig, RewardConfig, TrainingDiverged
from rlhf.init import init
from rlhf.log import Run
from rlhf.model import ModelError
from rlhf.reward import RewardError
from rlhf_kernels import PPOStats

pytestmark = pytest.mark.usefixtures("one_thread")

NO_STATS = PPOStats(torch.zeros(13, dtype=torch.float64))
METRICS = [
    "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores",
    "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg",
    "val/clipfrac_avg", "val/ratio", "val/ratio_first", "val/num_eos_tokens", "lr", "episode", "timing/rollout",
    "timing/score", "timing/advantages", "timing/update", "memory/peak_gb", "tokens_per_second",
]  # fmt: skip


@pytest.fixture
def config(tiny_model, corpus, tmp_path) -> PPOConfig:
    return PPOConfig(
        model_name_or_path=tiny_model,
        dataset_name=corpus,
        output_dir=str(tmp_path / "ppo"),
        reward=["rewards_for_tests:count_good"],
        device="cpu",
        per_device_train_batch_size=16,
        num_mini_batches=2,
        num_ppo_epochs=2,
        response_length=6,
        max_prompt_length=8,
        temperature=1.0,
        learning_rate=3e-3,
        sample_steps=0,
        max_steps=3,
    )


def metrics_of(result) -> list[dict]:
    return [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("micro", "accumulation"), [(16, 1), (4, 4), (5, 3)])
def test_the_first_ratio_is_1_and_the_first_kl_0(config, micro, accumulation):
    """Exactly, for every micro-batch size, and with a reward model beside the function."""
    sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    rows = metrics_of(ppo.train(replace(config, temperature=0.7, **sizes)))
    assert rows[0]["objective/kl"] == 0.0 and rows[0]["objective/non_score_reward"] == 0.0
    assert [row["val/ratio_first"] for row in rows] == [1.0, 1.0, 1.0]
    assert rows[1]["objective/kl"] > 0.0 and rows[0]["val/ratio"] != 1.0
    assert set(METRICS) <= rows[0].keys()
    assert all(value is not None for row in rows for value in row.values())
    assert rows[2]["episode"] == 3 * 2 * micro * accumulation


def test_it_learns_what_is_rewarded(config):
    """The word `good` in 6 tokens: from about one in 18 to most of them."""
    seen = []
    run = replace(config, max_steps=30, lr_scheduler_type="constant", missing_eos_penalty=None, kl_coef=0.02)
    result = ppo.train(run, on_step=lambda step, policy, metrics: seen.append(metrics["objective/scores"]))
    assert seen[0] < 1.0 and seen[-1] > 4.0
    assert result.metrics["policy/entropy_avg"] < 2.0


def test_the_penalty_teaches_to_end(config):
    run = replace(config, max_steps=40, lr_scheduler_type="constant", missing_eos_penalty=5.0, kl_coef=0.02)
    rows = metrics_of(ppo.train(run))
    assert rows[0]["val/num_eos_tokens"] < 16 and rows[-1]["val/num_eos_tokens"] > 24


def test_objectives_add_up(config, tiny_reward_model):
    """The reward model and the function are summed; the value model starts from the reward model."""
    run = replace(config, reward_model_path=tiny_reward_model, kl_coef=0.3, missing_eos_penalty=2.0)
    for row in metrics_of(ppo.train(run)):
        unfinished = 1 - row["val/num_eos_tokens"] / 32
        parts = row["rewards/rewards_for_tests:count_good"] + row["rewards/model"] - 2.0 * unfinished
        assert row["objective/scores"] == pytest.approx(parts, abs=1e-5)
        assert row["objective/non_score_reward"] == pytest.approx(-0.3 * row["objective/kl"], abs=1e-5)
        total = row["objective/scores"] + row["objective/non_score_reward"]
        assert row["objective/rlhf_reward"] == pytest.approx(total, abs=1e-5)


def test_where_the_value_model_starts(config, tiny_reward_model, tiny_model, corpus, tmp_path, capsys):

    def head(config: PPOConfig) -> torch.Tensor:
        return layout.load_models(config).value.module.score.weight

    assert not head(config).any()
    assert head(replace(config, reward_model_path=tiny_reward_model)).any()
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}
    other = init(InitConfig(dataset_name=corpus, output_dir=str(tmp_path / "bpe"), tokenizer="bpe", **sizes))
    with pytest.raises(ModelError, match=r"value_model_path: .* has another vocabulary than the policy"):
        layout.load_models(replace(config, value_model_path=str(other)))


def test_samples_show_prompt_completion_and_score(config, capsys):
    result = ppo.train(replace(config, sample_steps=2))
    rows = [json.loads(line) for line in (result.output_dir / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 32 + [3] * 32
    assert all(row.keys() == {"step", "prompt", "completion", "score"} for row in rows)
    assert "step 3" in capsys.readouterr().out


def test_a_checkpoint_comes_after_the_samples_of_its_step(config, monkeypatch):
    """So that a run that is killed right after it has them when it continues."""
    seen = []

    def save(run) -> None:
        seen.append(len((run.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()))

    monkeypatch.setattr(Run, "save", save)
    ppo.train(replace(config, sample_steps=1, save_steps=1, max_steps=2))
    assert seen == [32, 64]


def test_adaptive_kl_is_logged_and_moves(config):
    rows = metrics_of(ppo.train(replace(config, kl_target=50.0, kl_horizon=320)))
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx([0.05, 0.05 * 0.98, 0.05 * 0.98**2])


def test_bad_rewards_and_lengths_are_refused(config):
    with pytest.raises(
        RewardError, match="reward rewards_for_tests:not_finite: expected finite scores, got nan in row"
    ):
        ppo.train(replace(config, reward=["rewards_for_tests:not_finite"]))
    with pytest.raises(ConfigError, match="reward: expected module:function"):
        replace(config, reward=["count_good"])
    with pytest.raises(ModelError, match=r"longest prompt \+ response_length: 65 tokens are more than the 64"):
        ppo.train(replace(config, response_length=60))


def test_a_run_that_is_not_finite_ends(config, monkeypatch):
    """Three minibatches in a row without a finite gradient; the policy is as it was."""

    def broken(models, *rest):
        return models.policy.module.lm_head.weight.sum() * float("nan"), NO_STATS

    monkeypatch.setattr(ppo, "ppo_losses", broken)
    with pytest.raises(TrainingDiverged, match="were not finite"):
        ppo.train(config)
    assert not list(Path(config.output_dir).glob("checkpoint*"))


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real data are not here")
def test_real_dialogues_from_reward_model_to_policy(tmp_path):
    from transformers import AutoModelForCausalLM

    dialogues = str(SHARED_DATA / "hh-harmless-base-1500.jsonl.gz")
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    base = init(InitConfig(dataset_name=dialogues, output_dir=str(tmp_path / "base"), **sizes))
    common = {"model_name_or_path": str(base), "dataset_name": dialogues, "device": "cpu"}
    reward = reward_model.train(
        RewardConfig(**common, output_dir=str(tmp_path / "rm"), max_length=64, max_steps=2, eval_fraction=0.02)
    )
    kept = {}
    result = ppo.train(
        PPOConfig(
            **common,
            output_dir=str(tmp_path / "ppo"),
            reward_model_path=str(reward.final_dir),
            max_prompt_length=32,
            response_length=8,
            max_steps=2,
        ),
        on_step=lambda step, policy, metrics: kept.update(policy=policy),
    )
    rows = metrics_of(result)
    assert rows[0]["val/ratio_first"] == 1.0 and rows[0]["objective/kl"] == 0.0
    assert all(value is not None for row in rows for value in row.values())
    ids = torch.tensor([[5, 6, 7, 8]])
    reloaded = AutoModelForCausalLM.from_pretrained(result.final_dir)
    assert torch.equal(reloaded(ids).logits, kept["policy"].module(ids).logits)
