"""Losses against closed forms, accumulation against one batch, the schedule, and steps that are not finite."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf.advantages import score, with_advantages
from rlhf.config import PPOConfig, SFTConfig, TrainingDiverged
from rlhf.layout import Models, load_models
from rlhf.losses import completion_loss
from rlhf.model import ModelError
from rlhf.optim import StepGuard, make_optimizer, schedule
from rlhf.ppo import minibatches, update
from rlhf.rollout import Sampling, generate
from rlhf.types import PromptBatch

pytestmark = pytest.mark.usefixtures("one_thread")
SFT = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}


def test_completion_loss_is_a_mean_over_the_whole_step():
    logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]])
    assert float(completion_loss(logprobs, tokens=3)) == 2.0
    parts = [completion_loss(row, tokens=3) for row in logprobs.split(1)]
    assert float(sum(parts)) == 2.0


def ppo_config(tiny_model, **changes) -> PPOConfig:
    base = {"model_name_or_path": tiny_model, "dataset_name": "d", "output_dir": "o", "device": "cpu"}
    base |= {"reward": ["rewards_for_tests:count_good"], "response_length": 6, "max_prompt_length": 8}
    return PPOConfig(**base | {"per_device_train_batch_size": 8, "temperature": 1.0} | changes)


def experience_of(models: Models, config: PPOConfig):
    prompts = [[4, 5, 6], [7], [8, 9, 10, 11, 5], [4, 4]] * 2
    rollout = generate(models.policy, PromptBatch(prompts, ["text"] * 8, {}), Sampling(6))
    experience, _ = score(rollout, models, config)
    return with_advantages(experience, config, config.kl_coef)


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_gradients_equal_those_of_one_batch(tiny_model, micro):
    """Responses of different lengths: a mean of the micro-batches' means would differ."""

    class KeepGradients(StepGuard):
        def step(self, loss: torch.Tensor) -> torch.Tensor:
            self.loss = float(loss)
            return torch.zeros(())

    gradients, losses = [], []
    for size in (8, micro):
        config = ppo_config(tiny_model, per_device_train_batch_size=size, entropy_coef=0.01)
        models = load_models(config)
        models = replace(models, policy=replace(models.policy, eos_ids=(2, 5, 9, 11, 12)))  # so that lengths differ
        experience = experience_of(models, ppo_config(tiny_model))
        assert len(set(experience.sequences.response_lengths.tolist())) > 2
        guard = KeepGradients(None, [models.policy.module], 1.0)
        update(models, experience, torch.arange(8), guard, config, config.kl_coef)
        losses.append(guard.loss)
        modules = (models.policy.module, models.value.module)
        gradients.append([p.grad for m in modules for p in m.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(gradients[0]) == len(gradients[1]) > 20
    for whole, accumulated in zip(*gradients):
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-6)


def test_scores_are_clipped_once_and_before_the_penalty(tiny_model):
    """The penalty reaches the rewards whole, and the scores that are reported are those that train."""
    config = ppo_config(tiny_model, reward=["rewards_for_tests:ten"], score_clip=0.5, kl_coef=0.0, gamma=1.0, lam=1.0)
    models = load_models(config)
    models = replace(models, policy=replace(models.policy, eos_ids=()))  # no response ends
    experience = experience_of(models, replace(config, whiten_advantages=False))
    assert experience.scores.tolist() == [-0.5] * 8
    torch.testing.assert_close(experience.returns, torch.full((8, 6), -0.5))


def test_every_model_that_reads_the_policys_tokens_must_have_the_positions(tiny_model, tiny_reward_model, tmp_path):
    short = shutil.copytree(tiny_reward_model, tmp_path / "short")
    settings = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 12}
    (short / "config.json").write_text(json.dumps(settings))
    value = load_models(ppo_config(tiny_model, value_model_path=str(short)))
    reward = load_models(ppo_config(tiny_model, value_model_path=tiny_model, reward_model_path=str(short)))
    for models in (value, reward):
        models.check_context(12, "length")
        with pytest.raises(ModelError, match=r"length: 13 tokens are more than the 12 positions of .*short"):
            models.check_context(13, "length")


def test_the_first_epoch_goes_in_order_and_later_ones_shuffle(tiny_model):
    config = ppo_config(tiny_model, num_mini_batches=2, num_ppo_epochs=3, per_device_train_batch_size=4)
    rows = [minibatch.tolist() for minibatch in minibatches(config, step=5)]
    assert rows[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(sorted(rows[2 * e] + rows[2 * e + 1]) == list(range(8)) for e in range(3))
    assert len({str(rows[2 * e : 2 * e + 2]) for e in range(3)}) == 3
    assert rows == [minibatch.tolist() for minibatch in minibatches(config, step=5)]
    assert rows != [minibatch.tolist() for minibatch in minibatches(config, step=6)]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
    ],
)
def test_the_learning_rate_rises_and_falls(shape, expected):
    config = SFTConfig(**SFT, lr_scheduler_type=shape, warmup_steps=2)
    assert [schedule(config, step, 6) for step in range(6)] == pytest.approx(expected)


def test_only_matrices_decay_and_each_model_has_its_rate():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    config = SFTConfig(**SFT, weight_decay=0.1)
    groups = make_optimizer([(module, 1e-3), (nn.Linear(2, 1, bias=False), 1e-2)], config).param_groups
    assert [(g["peak_lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1e-3, 0.1, 1),
        (1e-3, 0.0, 3),
        (1e-2, 0.1, 1),
    ]


def test_steps_that_are_not_finite_are_skipped_and_three_in_a_row_end_the_run():
    module = nn.Linear(2, 1)
    state = {}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    guard = StepGuard(optimizer, [module], max_norm=1.0, state=state)

    def step(value: float) -> int:
        (module(torch.ones(1, 2)).sum() * value).backward()
        guard.step(torch.tensor(value))
        return guard.check()

    before = module.weight.detach().clone()
    step(float("nan"))
    assert step(float("inf")) == 2 and torch.equal(module.weight, before)
    assert state == {"skipped": 2, "skipped_in_a_row": 2} and not optimizer.state[module.weight]["step"]
    step(1.0)
    assert not torch.equal(module.weight, before) and module.weight.grad is None
    step(float("nan"))
    step(float("nan"))
    with pytest.raises(TrainingDiverged, match="3 optimizer steps in a row were not finite"):
        step(float("nan"))
    assert bool(torch.isfinite(module.weight).all())


def test_clipping_is_by_model():
    modules = [nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)]
    optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=1.0, fused=True)
    guard = StepGuard(optimizer, modules, max_norm=1.0)
    before = [m.weight.detach().clone() for m in modules]
    (100 * modules[0](torch.ones(1, 4)) + 0.1 * modules[1](torch.ones(1, 4))).backward()
    assert float(guard.step(torch.tensor(1.0))) == pytest.approx(200.0)
    assert (modules[0].weight - before[0]).norm().item() == pytest.approx(1.0, rel=1e-4)
    assert (modules[1].weight - before[1]).norm().item() == pytest.approx(0.2, rel=1e-4)


def test_bf16_weights_move_by_small_steps_in_the_mean():
    """At 3e-6 a step, rounding to nearest leaves nearly all bfloat16 weights where they are."""
    found = {}
    for optim in ("adamw", "adamw_bf16"):
        module = nn.Linear(256, 256, bias=False).bfloat16()
        nn.init.normal_(module.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        before = module.weight.detach().float()
        config = PPOConfig(**SFT, reward=["a:b"], optim=optim)
        guard = StepGuard(make_optimizer([(module, 3e-6)], config), [module], max_norm=1e9)
        for _ in range(20):
            module.weight.grad = torch.ones_like(module.weight)
            guard.step(torch.zeros(()))
        assert guard.check() == 0 and {s.dtype for s in guard.optimizer.state[module.weight].values() if s.dim()} == {
            torch.bfloat16
        }
        found[optim] = float((module.weight.detach().float() - before).mean())
    assert found["adamw_bf16"] == pytest.approx(-6e-5, rel=0.1) and abs(found["adamw"]) < 1e-5


def test_a_loss_on_the_host_and_a_module_without_gradients_do_no_harm_on_a_device():
    """torch takes the norm of no gradients on the host, and stacks nothing of two devices."""

    class Steps:
        def step(self) -> None:
            pass

        def zero_grad(self, set_to_none: bool) -> None:
            pass

    trained, idle = nn.Linear(2, 1, device="meta"), nn.Linear(2, 1, device="meta")
    trained(torch.ones(1, 2, device="meta")).sum().backward()
    guard = StepGuard(Steps(), [trained, idle], max_norm=1.0)
    assert guard.step(torch.tensor(1.0)).device.type == guard.optimizer.found_inf.device.type == "meta"
