"""Losses: tensors to (loss, stats). Denominators cover a whole optimizer step: accumulation equals one batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_kernels
from rlhf.advantages import full_kl
from rlhf.comparisons import ComparisonBatch
from rlhf.config import PPOConfig
from rlhf.forward import response_hidden, token_logprobs, token_values
from rlhf.layout import Models
from rlhf.model import LanguageModel, ValueHead
from rlhf.types import Experience, SequenceBatch

COMPARISON_STATS = ("chosen", "rejected", "margins", "accuracies")
NO_CLIP = 1e30  # a bound on the ratio that no float32 ratio of use reaches


def completion_loss(
    logprobs: Tensor,  # (n,) of the counted tokens
    tokens: int,  # counted in the whole step
) -> Tensor:  # ()
    """Mean negative log-probability of the counted tokens."""
    return -logprobs.sum() / tokens


def supervised_loss(policy: LanguageModel, batch: SequenceBatch, rows: Tensor) -> Tensor:  # ()
    """These rows' part of the mean over the whole batch."""
    logprobs, _ = token_logprobs(policy, batch.rows(rows))
    return completion_loss(logprobs, int(batch.counted_lengths.sum()))


def comparison_loss(
    scores: Tensor,  # (M, heads)
    batch: ComparisonBatch,
    total: float,  # sum of the weights in the whole step
    center: float = 0.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:  # (), (4,) weighted sums of COMPARISON_STATS
    """Bradley-Terry: the weighted mean of -log sigmoid(m), m = better - worse - margin, plus center * (better +
    worse)^2. Smoothed it is -(1-e) log sigmoid(m) - e log sigmoid(-m), as in cDPO."""
    known = torch.cat([scores.flatten(), scores.new_zeros(1)])
    better, worse = known.index_select(0, batch.better), known.index_select(0, batch.worse)
    apart = better - worse - batch.margins
    likelihood = (1 - smoothing) * logsigmoid(apart) + smoothing * logsigmoid(-apart)
    loss = (batch.weights * (center * (better + worse) ** 2 - likelihood)).sum() / total
    stats = torch.stack([better, worse, better - worse, (better > worse).to(better.dtype)]).detach()
    return loss, stats @ batch.weights


def ppo_losses(
    models: Models,
    experience: Experience,  # a micro-batch with advantages
    config: PPOConfig,
    denominator: Tensor,  # () tokens, or sequences where the reduction counts these, of the whole minibatch
    kl_coef: float = 0.0,  # of the KL term, where it is in the loss
    value_only: bool = False,
) -> tuple[Tensor, rlhf_kernels.PPOStats]:
    """Clipped policy loss, clipped value loss, entropy bonus and KL term; the gradient flows into policy and value.

    The policy's part goes from hidden states to the gradients of its head at once, where the head allows it. With
    `value_only` the value alone learns: a head on the policy's trunk without the trunk."""
    batch, policy = experience.sequences, models.policy
    fixed = {"cu_seqlens": batch.cu_seqlens, "options": loss_options(config, kl_coef), "denominator": denominator}
    needs_hidden = not value_only or isinstance(models.value, ValueHead)
    hidden = None
    if policy.head.fused and needs_hidden:
        with torch.set_grad_enabled(not value_only):
            hidden = response_hidden(policy, batch)
    values = None if models.value is None else _value_loss(models, experience, hidden, fixed)
    if value_only:
        return values
    loss, stats = _policy_loss(models, experience, config, hidden, fixed)
    if kl_coef and config.kl_estimator == "full":
        loss = loss + kl_coef * _full_kl_loss(models, experience, config, hidden, denominator)
    return (loss, stats) if values is None else (loss + values[0], stats.with_values_of(values[1]))


def loss_options(config: PPOConfig, kl_coef: float) -> rlhf_kernels.PPOLossOptions:
    low = 1.0 if config.cliprange is None else config.cliprange  # a ratio is never below 0
    high = config.cliprange if config.cliprange_high is None else config.cliprange_high
    estimated = config.kl_estimator != "full"
    return rlhf_kernels.PPOLossOptions(
        clip_low=low,
        clip_high=NO_CLIP if high is None else high,
        dual_clip=config.dual_clip,
        value_clip=config.cliprange_value,
        value_coef=config.vf_coef,
        entropy_coef=config.entropy_coef,
        kl_coef=kl_coef if estimated else 0.0,
        kl_estimator=config.kl_estimator if estimated else "k3",
        reduction=config.loss_reduction,
    )


def _policy_loss(models: Models, experience: Experience, config: PPOConfig, hidden: Tensor | None, fixed: dict):
    batch, policy = experience.sequences, models.policy
    known = {
        name: batch.pack(x)
        for name, x in (("old_logprobs", experience.logprobs), ("advantages", experience.advantages))
    }
    if fixed["options"].kl_coef:
        known["ref_logprobs"] = batch.pack(experience.ref_logprobs)
    if hidden is None:
        logprobs, entropy = token_logprobs(policy, batch, config.temperature, entropy=True)
        return rlhf_kernels.ppo_loss(logprobs, **known, entropy=entropy, **fixed)
    with policy.autocast():
        head = {"token_ids": batch.response_ids, "temperature": config.temperature, **policy.head_options()}
        return rlhf_kernels.linear_ppo_loss(hidden, **head, **known, **fixed)[:2]


def _value_loss(models: Models, experience: Experience, hidden: Tensor | None, fixed: dict):
    batch = experience.sequences
    values = token_values(models.value, batch, hidden if isinstance(models.value, ValueHead) else None)
    nothing = torch.zeros_like(values)  # no policy term
    options = replace(fixed["options"], entropy_coef=0.0, kl_coef=0.0)
    old_values, returns = batch.pack(experience.values), batch.pack(experience.returns)
    of_values = {"values": values, "old_values": old_values, "returns": returns}
    return rlhf_kernels.ppo_loss(nothing, nothing, nothing, **of_values, **fixed | {"options": options})


def _full_kl_loss(
    models: Models, experience: Experience, config: PPOConfig, hidden: Tensor, denominator: Tensor
) -> Tensor:
    batch = experience.sequences
    with torch.no_grad():
        ref_hidden = response_hidden(models.reference, batch)
    kl = full_kl(models.policy, models.reference, hidden, ref_hidden, config.temperature)
    if config.loss_reduction == "seq_mean_token_mean":
        share = (1.0 / batch.counted_lengths).repeat_interleave(batch.counted_lengths)
        kl = kl * share.to(kl.device, non_blocking=True)
    return kl.sum() / denominator
