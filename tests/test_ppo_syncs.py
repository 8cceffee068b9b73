"""How often the host waits for the device in a PPO step: a stated number, whatever the number of micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from host_syncs import CountSyncs

from rlhf import ppo
from rlhf.config import PPOConfig
from rlhf.log import Run
from rlhf.rollout import CHECK

pytestmark = pytest.mark.usefixtures("one_thread")
# The sampled tokens, whether their probabilities were finite, each reward model, the scores for the log, the statistics
# of the updates, the objectives, the guard: and one look at every CHECK sampled tokens.
SYNCS_A_STEP = 8


@pytest.fixture
def config(tiny_model, corpus, tmp_path) -> PPOConfig:
    return PPOConfig(
        model_name_or_path=tiny_model,
        dataset_name=corpus,
        output_dir=str(tmp_path / "ppo"),
        reward=["rewards_for_tests:count_good"],
        device="cpu",
        per_device_train_batch_size=16,
        response_length=20,
        max_prompt_length=8,
        sample_steps=0,
        max_steps=2,
        report_to="none",
    )


def syncs(config: PPOConfig, monkeypatch) -> list[str]:
    """Of the second step."""
    modes = []
    load = ppo.load_models

    def watched(config):
        models = load(config)
        scorers = [reward.scorer.module for reward in models.rewards if reward.scorer]
        modes.append(CountSyncs(*models.modules.values(), models.reference.module, *scorers))
        assert models.policy.head.fused and models.reference.head.fused  # probed before the count
        return models

    steps = Run.steps

    def counted(run):
        for step in steps(run):
            if step == 1:
                with modes[0]:
                    yield step
            else:
                yield step

    monkeypatch.setattr(ppo, "load_models", watched)
    monkeypatch.setattr(Run, "steps", counted)
    ppo.train(config)
    monkeypatch.undo()
    return modes[0].places


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
        {"num_ppo_epochs": 3, "micro_batch_tokens": 60},
        {"memory_layout": ["shared_value"]},
        {"memory_layout": ["lora"]},
        {"advantage": "grpo", "num_generations": 4, "kl_in": "loss", "kl_estimator": "k3"},
        {"kl_target": 2.0, "reward_normalization": "running", "entropy_coef": 0.01},
        {"kl_estimator": "full", "optim": "adamw"},
    ],
)
def test_a_step_waits_no_more_often_than_stated(config, changes, monkeypatch):
    places = syncs(replace(config, **changes), monkeypatch)
    assert 0 < len(places) <= SYNCS_A_STEP + math.ceil(config.response_length / CHECK), "\n".join(places)


def test_micro_batches_and_epochs_add_no_wait(config, tiny_reward_model, monkeypatch, tmp_path):
    config = replace(config, reward_model_path=[tiny_reward_model])
    few = syncs(config, monkeypatch)
    many = replace(config, per_device_train_batch_size=2, gradient_accumulation_steps=8, num_ppo_epochs=6)
    assert len(syncs(replace(many, output_dir=str(tmp_path / "many")), monkeypatch)) == len(few)


def test_the_count_sees_a_wait():
    module = torch.nn.Linear(2, 1)
    with CountSyncs(module) as mode:
        host = torch.arange(3)
        assert host.tolist() == [0, 1, 2] and int(host.max()) == 2  # of the host's own: free
        sent = host.to(torch.device("cpu"), non_blocking=True)
        assert not mode.places
        out = module(torch.ones(1, 2)).sum() + sent.sum()
        float(out)
        sent[sent > 0]
        assert len(mode.places) == 2 and host.tolist() == [0, 1, 2]
    assert len(mode.places) == 2
