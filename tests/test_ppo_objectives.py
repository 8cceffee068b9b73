"""What an optimizer step of PPO descends, by the plain formula: clips, KL terms, supervised rows; when it stops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_losses import ppo_config
from test_ppo_invariance import KeepGradients, far, models_of, sampled
from torch import Tensor

from rlhf import ppo
from rlhf.advantages import score, with_advantages
from rlhf.config import PPOConfig
from rlhf.forward import response_logprobs
from rlhf.layout import Models
from rlhf.ppo import supervised_batch, update
from rlhf.sft import collate
from rlhf.types import Experience

pytestmark = pytest.mark.usefixtures("one_thread")
NO_VALUE = {"advantage": "grpo_no_std", "num_generations": 2}  # the policy alone learns


def prepared(config: PPOConfig, moved: bool = True) -> tuple[Models, Experience]:
    """The policy is off the reference; `moved`, off the policy that sampled too, so that every clip acts."""
    models = models_of(config)
    experience = with_advantages(score(sampled(models, config), models, config)[0], config, config.kl_coef)
    if not moved:
        return models, experience
    advantages = torch.randn(experience.logprobs.shape, generator=torch.Generator().manual_seed(3))
    return models, replace(far(experience) if models.value else off(experience), advantages=advantages)


def off(experience: Experience) -> Experience:
    noise = 0.5 * torch.randn(experience.logprobs.shape, generator=torch.Generator().manual_seed(0))
    return replace(experience, logprobs=experience.logprobs + noise)


def gradients(models: Models) -> list[Tensor]:
    return [p.grad.clone() for p in models.policy.module.parameters()]


def of_update(models: Models, experience: Experience, config: PPOConfig, supervised=None) -> list[Tensor]:
    update(models, experience, torch.arange(8), KeepGradients(models), config, config.kl_coef, supervised)
    return gradients(models)


def of_loss(models: Models, loss: Tensor) -> list[Tensor]:
    models.policy.module.zero_grad(set_to_none=True)
    loss.backward()
    return gradients(models)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 15 and sum(float(g.norm()) for g in expected) > 1e-3
    for a, b in zip(found, expected):
        assert float((a - b).norm()) <= 2e-5 * float(b.norm()) + 1e-9


def differ(found: list[Tensor], expected: list[Tensor]) -> bool:
    return any(float((a - b).norm()) > 1e-3 * float(b.norm()) for a, b in zip(found, expected))


def logprobs_of(models: Models, experience: Experience) -> tuple[Tensor, Tensor]:
    """(B, R) log-probabilities of the policy as it is now, and their mask."""
    batch = experience.sequences
    return response_logprobs(models.policy, batch)[0], batch.response_mask


def mean(per_token: Tensor, mask: Tensor) -> Tensor:
    return per_token[mask].sum() / mask.sum()


# Clips


def test_one_epoch_without_a_clip_is_the_policy_gradient(tiny_model):
    """A2C: the gradient of -A log p."""
    config = ppo_config(tiny_model, **NO_VALUE, cliprange=None, num_ppo_epochs=1)
    models, experience = prepared(config, moved=False)
    found = of_update(models, experience, config)
    logprobs, mask = logprobs_of(models, experience)
    assert_same(found, of_loss(models, mean(-experience.advantages * logprobs, mask)))


@pytest.mark.parametrize(
    ("options", "low", "high", "dual"),
    [
        ({"cliprange": None}, 0.0, None, None),
        ({"cliprange": 0.2}, 0.8, 1.2, None),
        ({"cliprange": 0.2, "cliprange_high": 0.6}, 0.8, 1.6, None),
        ({"cliprange": None, "cliprange_high": 0.3}, 0.0, 1.3, None),
        ({"cliprange": 0.2, "cliprange_high": 0.0}, 0.8, 1.0, None),
        ({"cliprange": 0.0}, 1.0, 1.0, None),
        ({"cliprange": 0.2, "dual_clip": 1.3}, 0.8, 1.2, 1.3),
    ],
)
def test_clips_by_the_formula(tiny_model, options, low, high, dual):
    """Detail 16; null is no bound, 0.0 is one (OR#1219); clip-higher; dual clip."""
    config = ppo_config(tiny_model, **NO_VALUE, **options)
    models, experience = prepared(config)
    found = of_update(models, experience, config)

    def loss_of(low, high, dual) -> Tensor:
        logprobs, mask = logprobs_of(models, experience)
        ratio, a = (logprobs - experience.logprobs).exp(), experience.advantages
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(low, high))
        if dual:
            loss = torch.where(a < 0, torch.minimum(loss, -a * dual), loss)
        return mean(loss, mask)

    assert_same(found, of_loss(models, loss_of(low, high, dual)))
    others = {(0.0, None, None), (0.8, 1.2, None), (0.8, 1.6, None), (0.8, 1.0, None)} - {(low, high, dual)}
    assert all(differ(found, of_loss(models, loss_of(*other))) for other in others)


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_reductions_by_the_formula(tiny_model, reduction):
    """verl#931: a sum that was a mean. Micro-batches of two."""
    config = ppo_config(tiny_model, **NO_VALUE, loss_reduction=reduction, cliprange=None)
    config = replace(config, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    models, experience = prepared(config)
    found = of_update(models, experience, config)
    logprobs, mask = logprobs_of(models, experience)
    loss = -experience.advantages * (logprobs - experience.logprobs).exp() * mask
    sums, counts = loss.sum(1), mask.sum(1)
    expected = {
        "token_mean": sums.sum() / counts.sum(),
        "seq_mean_token_mean": (sums / counts).mean(),
        "seq_mean_token_sum": sums.mean(),
    }
    assert_same(found, of_loss(models, expected[reduction]))


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_value_loss_by_the_formula(tiny_model, clip):
    """Detail 15, verl#2016: half the larger square, of the clipped and the free value, times vf_coef."""
    config = ppo_config(tiny_model, cliprange_value=clip, vf_coef=0.7)
    models, experience = prepared(config)
    update(models, experience, torch.arange(8), KeepGradients(models), config, config.kl_coef)
    value = models.value
    found = [p.grad.clone() for p in value.module.parameters() if p.grad is not None]
    value.module.zero_grad(set_to_none=True)
    batch = experience.sequences
    total, count = 0.0, int(batch.response_lengths.sum())
    for row, (prompt, n) in enumerate(zip(batch.prompt_lengths.tolist(), batch.response_lengths.tolist())):
        hidden = value.module.base_model(batch.ids[row : row + 1, : prompt + n]).last_hidden_state[0, prompt - 1 : -1]
        now, old, target = value.module.score(hidden)[:, 0], experience.values[row, :n], experience.returns[row, :n]
        squares = (now - target) ** 2
        if clip is not None:
            squares = torch.maximum(squares, (old + (now - old).clamp(-clip, clip) - target) ** 2)
        total = total + 0.5 * squares.sum()
    (0.7 * total / count).backward()
    expected = [p.grad for p in value.module.parameters() if p.grad is not None]
    assert_same(found, expected)


# KL in the loss


KL = {
    "k1": lambda x: x,
    "abs": torch.abs,
    "k2": lambda x: 0.5 * x * x,
    "k3": lambda x: (-x).exp() - 1 + x,
    "k1+": lambda x: 0.5 * x * x,
    "abs+": lambda x: 0.5 * x * x,
    "k2+": lambda x: 0.5 * x * x,
    "k3+": lambda x: 0.5 * x * x,
}


@pytest.mark.parametrize("estimator", KL)
def test_a_kl_term_has_the_gradient_of_its_estimate_or_with_a_plus_that_of_k2(tiny_model, estimator):
    """TRL#4967, open-instruct#530: a term without gradient, or with another than that of the KL."""
    config = ppo_config(tiny_model, **NO_VALUE, kl_in="loss", kl_estimator=estimator, kl_coef=2.0)
    models, experience = prepared(config)
    found = of_update(models, experience, config)
    models.policy.module.zero_grad(set_to_none=True)
    without = of_update(models, experience, replace(config, kl_coef=0.0))
    logprobs, mask = logprobs_of(models, experience)
    term = of_loss(models, 2.0 * mean(KL[estimator](logprobs - experience.ref_logprobs), mask))
    assert_same(found, [a + b for a, b in zip(without, term)])
    assert differ(found, without)


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_a_full_kl_term_has_the_gradient_of_the_sum_over_the_vocabulary(tiny_model, reduction):
    config = ppo_config(tiny_model, **NO_VALUE, kl_in="loss", kl_estimator="full", kl_coef=2.0, temperature=0.7)
    config = replace(config, loss_reduction=reduction)
    models, experience = prepared(config)
    found = of_update(models, experience, config)
    models.policy.module.zero_grad(set_to_none=True)
    without = of_update(models, experience, replace(config, kl_coef=0.0))
    batch = experience.sequences
    rows = []
    for ids, prompt, n in zip(batch.ids, batch.prompt_lengths.tolist(), batch.response_lengths.tolist()):
        ours, theirs = (
            model.module(ids[None, : prompt + n])
            .logits[0, prompt - 1 : -1, : model.vocab_size]
            .div(0.7)
            .log_softmax(-1)
            for model in (models.policy, models.reference)
        )
        rows.append((ours.exp() * (ours - theirs)).sum(-1))
    expected = {
        "token_mean": torch.cat(rows).mean(),
        "seq_mean_token_mean": torch.stack([row.mean() for row in rows]).mean(),
        "seq_mean_token_sum": torch.stack([row.sum() for row in rows]).mean(),
    }
    assert_same(found, [a + b for a, b in zip(without, of_loss(models, 2.0 * expected[reduction]))])
    assert differ(found, without)


# Entropy, supervised rows


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_entropy_bonus_is_of_the_distribution_that_is_sampled(tiny_model, temperature):
    """OpenRLHF computes it without the temperature."""
    config = ppo_config(tiny_model, **NO_VALUE, entropy_coef=0.5, temperature=temperature)
    models, experience = prepared(config)
    found = of_update(models, experience, config)
    models.policy.module.zero_grad(set_to_none=True)
    without = of_update(models, experience, replace(config, entropy_coef=0.0))
    batch, entropies = experience.sequences, []
    for ids, prompt, n in zip(batch.ids, batch.prompt_lengths.tolist(), batch.response_lengths.tolist()):
        logits = models.policy.module(ids[None, : prompt + n]).logits[0, prompt - 1 : -1, : models.policy.vocab_size]
        entropies.append(torch.distributions.Categorical(logits=logits / temperature).entropy())
    expected = of_loss(models, -0.5 * torch.cat(entropies).mean())
    assert_same(found, [a + b for a, b in zip(without, expected)])


def test_supervised_rows_add_their_gradient(tiny_model, corpus):
    """PPO-ptx: that of PPO plus ptx_coef times that of a mean over completion tokens, in micro-batches of both."""
    config = ppo_config(tiny_model, **NO_VALUE, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    config = replace(config, ptx_coef=0.5, ptx_dataset_name=corpus, ptx_max_length=16, ptx_batch_size=5)
    models, experience = prepared(config)
    data = ppo.load_supervised(config, models)
    rows = supervised_batch(data, 3, models, config)
    expected_rows = collate(data.window(15, 20, config.seed), models.policy, completion_only=True)
    assert torch.equal(rows.ids, expected_rows.ids) and len(rows) == 5
    found = of_update(models, experience, config, rows)
    models.policy.module.zero_grad(set_to_none=True)
    without = of_update(models, experience, config)
    logprobs = response_logprobs(models.policy, rows)[0]
    expected = of_loss(models, -0.5 * logprobs.sum() / rows.response_lengths.sum())
    assert_same(found, [a + b for a, b in zip(without, expected)])
    assert differ(found, without)


# When the updates on a batch end


@pytest.mark.parametrize(("target", "updates"), [(None, 8), (1e3, 8), (1e-12, 2)])
def test_updates_end_beyond_the_target(tiny_model, corpus, tmp_path, target, updates):
    """The first minibatch is seen before any update, the second after one: its distance is the first above 0."""
    config = ppo_config(
        tiny_model,
        dataset_name=corpus,
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        num_mini_batches=2,
        target_kl=target,
        learning_rate=3e-3,
        max_steps=1,
        sample_steps=0,
        report_to="none",
    )
    assert ppo.train(config).metrics["val/updates"] == updates
