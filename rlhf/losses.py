"""Losses: tensors to (loss, stats). Denominators cover a whole optimizer step: accumulation equals one batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_kernels
from rlhf.advantages import Models
from rlhf.config import PPOConfig
from rlhf.model import response_logprobs, response_values
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
    """Clipped policy loss, clipped value loss and entropy bonus; the gradient flows into policy and value model."""
    logprobs, entropy = response_logprobs(models.policy, experience.sequences, config.temperature)
    values = response_values(models.value, experience.sequences)
    return rlhf_kernels.ppo_loss(
        logprobs,
        experience.logprobs,
        experience.advantages,
        experience.sequences.response_mask,
        values=values,
        old_values=experience.values,
        returns=experience.returns,
        entropy=entropy,
        options=rlhf_kernels.PPOLossOptions(
            clip_low=config.cliprange,
            clip_high=config.cliprange if config.cliprange_high is None else config.cliprange_high,
            dual_clip=config.dual_clip,
            value_clip=config.cliprange_value,
            value_coef=config.vf_coef,
            entropy_coef=config.entropy_coef,
        ),
        denominator=tokens,
    )
