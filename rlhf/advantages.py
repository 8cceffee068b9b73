"""Rollout to Experience: log-probabilities, values, scores, then advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import rlhf_kernels
from rlhf.config import PPOConfig
from rlhf.forward import response_hidden, token_logprobs, token_values
from rlhf.layout import Models
from rlhf.model import LanguageModel, ValueHead
from rlhf.reward import Shaping, score_rollout
from rlhf.types import Experience, Rollout, SequenceBatch


@torch.no_grad()
def score(
    rollout: Rollout,
    models: Models,
    config: PPOConfig,
    parts: list[Tensor] | None = None,  # rows of each forward pass; by default whole micro-batches in order
    moments: dict[str, list[float]] | None = None,  # of each reward so far, brought up to date: a run's state
    poll: Callable[[], None] = lambda: None,
) -> tuple[Experience, dict[str, float]]:  # and the mean of each reward
    """Everything about a rollout that training holds fixed.

    The forward passes are those of training, over the micro-batches of the first PPO epoch, so that the ratio of the
    first update is exactly 1. `poll` is called between forward passes, and never after the reward functions: they may
    draw random numbers, and a checkpoint holds the generators as they stood before the step.
    """
    batch = rollout.sequences
    shape = (len(batch), batch.width)
    parts = parts or batch.micro_batches(
        config.per_device_train_batch_size, config.micro_batch_tokens, models.policy.packed
    )
    columns = [torch.zeros(shape, device=batch.ids.device) for _ in range(4 if models.value else 3)]
    for rows in parts:
        poll()
        part = batch.rows(rows)
        there = rows.to(batch.ids.device, non_blocking=True)
        for column, packed in zip(columns, of_tokens(part, models, config)):
            column[there, : part.width] = part.unpack(packed)
    poll()
    found = score_rollout(models.rewards, rollout, Shaping.of(config), config.reward_normalization, moments)
    device = batch.ids.device
    rewards = None if found.rewards is None else found.rewards.to(device, non_blocking=True)
    logprobs, reference, kl, *values = columns
    scores = found.scores.to(device, non_blocking=True)
    return Experience(batch, logprobs, reference, kl, scores, rewards, *values), found.parts


def of_tokens(part: SequenceBatch, models: Models, config: PPOConfig) -> list[Tensor]:
    """(n,) each: log-probabilities of policy and reference, their KL, and values where there is a value model."""
    policy, reference = models.policy, models.reference
    hidden = response_hidden(policy, part) if policy.head.fused else None
    ref_hidden = response_hidden(reference, part) if reference.head.fused else None
    logprobs, _ = token_logprobs(policy, part, config.temperature, hidden=hidden)
    ref_logprobs, _ = token_logprobs(reference, part, config.temperature, hidden=ref_hidden)
    if config.kl_estimator == "full":
        kl = full_kl(policy, reference, hidden, ref_hidden, config.temperature)
    else:
        kl = rlhf_kernels.token_kl(logprobs, ref_logprobs, config.kl_estimator)
    if models.value is None:
        return [logprobs, ref_logprobs, kl]
    own = hidden if isinstance(models.value, ValueHead) else None
    return [logprobs, ref_logprobs, kl, token_values(models.value, part, own)]


def full_kl(
    policy: LanguageModel,
    reference: LanguageModel,
    hidden: Tensor,  # (n, H)
    ref_hidden: Tensor,  # (n, H)
    temperature: float,
) -> Tensor:  # (n,) exact KL of the next token's distribution, differentiable in the policy
    ours, theirs = policy.head_options(), reference.head_options()
    with policy.autocast():
        return rlhf_kernels.linear_kl(
            hidden,
            ours["weight"],
            ref_hidden,
            theirs["weight"],
            bias=ours["bias"],
            ref_bias=theirs["bias"],
            temperature=temperature,
            softcap=ours["softcap"],
            logit_scale=ours["logit_scale"],
        )


def with_advantages(experience: Experience, config: PPOConfig, kl_coef: float) -> Experience:
    """Shaped rewards to advantages, over the whole batch. The KL penalty is in the reward unless it is in the loss."""
    coef = kl_coef if config.kl_in == "reward" else 0.0
    if config.advantage != "gae":
        return replace(experience, advantages=_of_groups(experience, config, coef))
    scores = experience.scores if experience.rewards is None else experience.rewards
    estimator = config.kl_estimator.removesuffix("+")
    if estimator == "full":  # not of log-probabilities: it comes with the score of each token
        estimator, scores, coef = "k1", token_rewards(experience) - coef * experience.kl, 0.0
    result = rlhf_kernels.ppo_advantages(
        experience.logprobs,
        experience.ref_logprobs,
        experience.values,
        scores,
        experience.sequences.response_mask,
        options=rlhf_kernels.AdvantageOptions(
            kl_coef=coef,
            kl_estimator=estimator,
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
            whiten_advantages=config.whitens_advantages,
        ),
    )
    return replace(experience, advantages=result.advantages, returns=result.returns)


def token_rewards(experience: Experience) -> Tensor:  # (B, R)
    """The reward of each token; a score of the whole response stands on its last."""
    if experience.rewards is not None:
        return experience.rewards
    batch = experience.sequences
    last = (batch.response_lengths - 1).to(batch.ids.device, non_blocking=True)
    return torch.zeros_like(experience.kl).scatter(1, last[:, None], experience.scores[:, None])


def _of_groups(experience: Experience, config: PPOConfig, kl_coef: float) -> Tensor:  # (B, R)
    """Each response against the others to its prompt, which stand beside it; the same advantage for all its tokens."""
    mask = experience.sequences.response_mask
    total = experience.scores - kl_coef * experience.kl.sum(1)
    groups = torch.arange(len(total), device=total.device) // config.num_generations
    of_response = rlhf_kernels.group_advantages(total, groups, kind=config.advantage)
    advantages = of_response[:, None] * mask
    return rlhf_kernels.masked_whiten(advantages, mask) if config.whitens_advantages else advantages
