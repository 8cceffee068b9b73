"""From log-probabilities, values and scores to whitened advantages: the whole path of PPO between scoring and the
loss, in one op.

    kl_t      = estimator(logprobs - ref_logprobs)
    rewards_t = -kl_coef * kl_t, plus the clipped score of the sequence on its last counted token (or per-token scores)
    rewards   = whitened, mean kept, if whiten_rewards
    advantages, returns = gae(rewards, values)
    advantages = whitened, mean removed, if whiten_advantages

Statistics run over the counted tokens of the call (and of the group). Sources: Ziegler et al., arXiv 1909.08593;
Huang et al., arXiv 2403.17031.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks as check
from .._layout import check_cu_seqlens, compute_dtype, full_mask, last_counted, prepare, sequence_ids
from .._library import call, define
from .gae import gae_op, gae_reference
from .masked_whiten import group_moments, masked_whiten_reference, whiten_with
from .token_kl import VALUES, kl_value

WHITEN_EPS = 1e-8

# kl_coef_tensor, when given, replaces kl_coef: a controller's coefficient that stays on the device.
SCHEMA = (
    "ppo_advantages(Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor scores, Tensor? mask, "
    "Tensor? cu_seqlens, Tensor? kl_coef_tensor, float kl_coef, int kl_estimator, float gamma, float lam, "
    "float? score_clip, bool whiten_rewards, bool whiten_advantages) "
    "-> (Tensor advantages, Tensor returns, Tensor rewards, Tensor kl)"
)


@dataclass(frozen=True)
class AdvantageOptions:
    """Options of `ppo_advantages`."""

    kl_coef: float | Tensor = 0.05  # a number, or a 0-dim tensor
    kl_estimator: str = "k1"  # k1, abs, k2 or k3
    gamma: float = 1.0
    lam: float = 0.95
    score_clip: float | None = None  # scores are clipped to [-score_clip, score_clip]
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.kl_coef, Tensor):
            if self.kl_coef.dim() != 0:
                raise ValueError(f"kl_coef: expected a number or a 0-dim tensor, got {tuple(self.kl_coef.shape)}")
        else:
            check.number("kl_coef", self.kl_coef)
        check.one_of("kl_estimator", self.kl_estimator, VALUES)
        check.number("gamma", self.gamma, 0, 1)
        check.number("lam", self.lam, 0, 1)
        if self.score_clip is not None:
            check.number("score_clip", self.score_clip, above=0)


class PPOAdvantages(NamedTuple):
    """What `ppo_advantages` returns: each in the shape of logprobs, float32 or float64, 0 under the mask."""

    advantages: Tensor
    returns: Tensor  # advantages before whitening + values: what the value model learns
    rewards: Tensor  # per-token rewards that the recursion ran on, whitened if whiten_rewards
    kl: Tensor


def _shaped_rewards(
    logprobs, ref_logprobs, scores, mask, cu_seqlens, kl_coef, kl_estimator, score_clip
) -> tuple[Tensor, Tensor]:
    kl = kl_value(logprobs - ref_logprobs, kl_estimator).masked_fill(~mask, 0)
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    if scores.shape != logprobs.shape or (cu_seqlens is not None and scores.shape[0] == cu_seqlens.shape[0] - 1):
        at_end = last_counted(mask, cu_seqlens, scores.shape[0])
        per_sequence = scores[sequence_ids(logprobs, cu_seqlens)] if scores.numel() else torch.zeros_like(logprobs)
        scores = per_sequence.masked_fill(~at_end, 0)
    penalty = torch.where(
        torch.as_tensor(kl_coef, device=kl.device) == 0, 0, kl_coef * kl
    )  # k3 may be inf: 0 * inf is NaN
    return (scores - penalty).masked_fill(~mask, 0), kl


def ppo_advantages_reference(
    logprobs: Tensor,  # (B, T) or (N,), float32 or float64, as all floats below
    ref_logprobs: Tensor,  # the same
    values: Tensor,  # the same
    scores: Tensor,  # (B,), or the shape of logprobs
    mask: Tensor | None,  # the shape of logprobs, bool
    cu_seqlens: Tensor | None,  # (B+1,) int32
    kl_coef_tensor: Tensor | None,  # ()
    kl_coef: float,
    kl_estimator: int,
    gamma: float,
    lam: float,
    score_clip: float | None,
    whiten_rewards: bool,
    whiten_advantages: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, logprobs.shape[0])
    mask = full_mask(mask, logprobs)
    coef = kl_coef if kl_coef_tensor is None else kl_coef_tensor
    rewards, kl = _shaped_rewards(logprobs, ref_logprobs, scores, mask, cu_seqlens, coef, kl_estimator, score_clip)
    if whiten_rewards:
        rewards = masked_whiten_reference(rewards, mask, False, False, WHITEN_EPS)
    advantages, returns = gae_reference(rewards, values, mask, cu_seqlens, None, gamma, lam, False)
    if whiten_advantages:
        advantages = masked_whiten_reference(advantages, mask, True, False, WHITEN_EPS)
    return advantages, returns, rewards, kl


def _fake(logprobs, *_):
    return tuple(torch.empty_like(logprobs) for _ in range(4))


ppo_advantages_op = define(SCHEMA, ppo_advantages_reference, _fake)


def _check(logprobs, ref_logprobs, values, scores, mask, cu_seqlens) -> None:
    check.is_float("logprobs", logprobs)
    n_sequences = check.token_layout("logprobs", logprobs, cu_seqlens)
    for name, tensor in (("ref_logprobs", ref_logprobs), ("values", values)):
        check.is_tensor(name, tensor)
        check.like(name, tensor, "logprobs", logprobs)
    check.is_float("scores", scores)
    if tuple(scores.shape) not in ((n_sequences,), tuple(logprobs.shape)):
        expected = f"expected ({n_sequences},), one a sequence, or {tuple(logprobs.shape)}, one a token"
        raise ValueError(f"scores: {expected}, got {tuple(scores.shape)}")
    check.same_device("scores", scores, "logprobs", logprobs)
    check.mask_like(mask, "logprobs", logprobs)


def ppo_advantages(
    logprobs: Tensor,  # (B, T) or (N,) float, of the policy that sampled
    ref_logprobs: Tensor,  # the same shape
    values: Tensor,  # the same shape
    scores: Tensor,  # (B,) a score a sequence, or per-token scores in the shape of logprobs
    mask: Tensor | None = None,  # the shape of logprobs, bool, True on response tokens
    *,
    cu_seqlens: Tensor | None = None,  # (B+1,) int32 for packed (N,) tokens
    options: AdvantageOptions = AdvantageOptions(),
    group: dist.ProcessGroup | None = None,
) -> PPOAdvantages:
    """Per-token KL, shaped rewards, GAE and whitening in one op. Not differentiable: inputs are detached.

    A sequence with no counted token drops its score. One-dimensional scores with as many elements as there are
    sequences are scores of sequences, also where there are as many tokens. Whitening statistics run over every rank
    of `group` when given (then the op is a composition with one collective of three numbers for each whitening).
    Values under the mask may be NaN and change nothing. Raises TypeError or ValueError for wrong dtypes, shapes,
    devices and options.
    """
    _check(logprobs, ref_logprobs, values, scores, mask, cu_seqlens)
    check.options(options, AdvantageOptions)
    dtype = compute_dtype(logprobs, ref_logprobs, values, scores)
    tensors = [prepare(x.detach(), dtype) for x in (logprobs, ref_logprobs, values, scores)]
    layout = (prepare(mask), prepare(cu_seqlens))
    is_tensor = isinstance(options.kl_coef, Tensor)
    coef_tensor = options.kl_coef.detach().to(logprobs.device, dtype) if is_tensor else None
    coef = (
        coef_tensor,
        0.0 if is_tensor else float(options.kl_coef),
        check.one_of("kl_estimator", options.kl_estimator, VALUES),
    )
    gae_options = (float(options.gamma), float(options.lam))
    whitening = (options.whiten_rewards, options.whiten_advantages)
    if group is None:
        return PPOAdvantages(
            *call(ppo_advantages_op, *tensors, *layout, *coef, *gae_options, options.score_clip, *whitening)
        )
    mask, cu_seqlens = layout
    advantages, returns, rewards, kl = call(
        ppo_advantages_op, *tensors, *layout, *coef, *gae_options, options.score_clip, False, False
    )
    if options.whiten_rewards:
        rewards = whiten_with(rewards, mask, group_moments(rewards, mask, group), False, False, WHITEN_EPS)
        advantages, returns = call(gae_op, rewards, tensors[2], mask, cu_seqlens, None, *gae_options, False)
    if options.whiten_advantages:
        advantages = whiten_with(advantages, mask, group_moments(advantages, mask, group), True, False, WHITEN_EPS)
    return PPOAdvantages(advantages, returns, rewards, kl)
