"""Losses: tensors to (loss, stats). Denominators cover a whole optimizer step: accumulation equals one batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_kernels
from rlhf.advantages import Models
from rlhf.config import PPOConfig
from rlhf.model import response_hidden, response_logprobs, response_values
from rlhf.types import Experience


def completion_loss(
    logprobs: Tensor,  # (B, R), 0 where nothing is counted
    tokens: int,  # counted in the whole step
) -> Tensor:  # ()
    """Mean negative log-probability of the counted tokens."""
    return -logprobs.sum() / tokens


def preference_loss(
    scores: Tensor,  # (2B,) chosen first, pair i is i and B+i
    pairs: int,  # in the whole step
    center: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # (), sums over the pairs
    """Bradley-Terry: the mean of -log sigmoid(chosen - rejected), plus center * (chosen + rejected)^2."""
    chosen, rejected = scores.chunk(2)
    margins = chosen - rejected
    loss = (-logsigmoid(margins) + center * (chosen + rejected) ** 2).sum() / pairs
    stats = {"chosen": chosen, "rejected": rejected, "margins": margins, "accuracies": (margins > 0).float()}
    return loss, {name: value.detach().sum() for name, value in stats.items()}


def ppo_losses(
    models: Models,
    experience: Experience,  # a micro-batch with advantages
    config: PPOConfig,
    tokens: Tensor,  # () response tokens of the whole minibatch
) -> tuple[Tensor, rlhf_kernels.PPOStats]:
    """Clipped policy loss, clipped value loss and entropy bonus; the gradient flows into policy and value model.

    The policy's part goes from hidden states to the gradients of its head at once, where the head allows it."""
    batch, policy, mask = experience.sequences, models.policy, experience.sequences.response_mask
    options = rlhf_kernels.PPOLossOptions(
        clip_low=config.cliprange,
        clip_high=config.cliprange if config.cliprange_high is None else config.cliprange_high,
        dual_clip=config.dual_clip,
        value_clip=config.cliprange_value,
        value_coef=config.vf_coef,
        entropy_coef=config.entropy_coef,
    )
    of_policy = {"old_logprobs": experience.logprobs, "advantages": experience.advantages, "mask": mask}
    of_values = {
        "values": response_values(models.value, batch),
        "old_values": experience.values,
        "returns": experience.returns,
    }
    if not policy.head.fused:
        logprobs, entropy = response_logprobs(policy, batch, config.temperature)
        return rlhf_kernels.ppo_loss(
            logprobs, **of_policy, **of_values, entropy=entropy, options=options, denominator=tokens
        )
    hidden = response_hidden(policy, batch)
    with policy.autocast():
        head = {"token_ids": batch.response_ids, "temperature": config.temperature, **policy.head_options()}
        loss, stats, _ = rlhf_kernels.linear_ppo_loss(hidden, **head, **of_policy, options=options, denominator=tokens)
    nothing = torch.zeros_like(experience.advantages)  # no policy term
    value_loss, value_stats = rlhf_kernels.ppo_loss(
        nothing, nothing, nothing, mask, **of_values, options=replace(options, entropy_coef=0.0), denominator=tokens
    )
    return loss + value_loss, stats.with_values_of(value_stats)
