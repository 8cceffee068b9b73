"""Generalised advantage estimation over padded or packed sequences with any mask.

    delta_t = r_t + gamma * V_next - V_t
    A_t     = delta_t + gamma * lam * A_next
    returns = A + V

next is the next counted token of the same sequence; after the last one V_next is 0, or bootstrap_values, and A_next
is 0. With gap="zero" a masked token before the last counted one is a step with value and reward 0 instead of no step
(OpenRLHF's way). Source: Schulman et al., arXiv 1506.02438.

Kernels run it as one affine recursion, S_t = (1 - lam) V_t + lam r_t + gamma lam S_next with S = V_bootstrap after
the end and A_t = r_t - V_t + gamma S_next, which is associative over time, is the identity on skipped tokens and a
constant at the end of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._layout import check_cu_seqlens, compute_dtype, full_mask, prepare, to_packed, to_padded
from .._library import call, define

SCHEMA = (
    "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap_values, "
    "float gamma, float lam, bool gap_zero) -> (Tensor advantages, Tensor returns)"
)
GAPS = ("skip", "zero")


def gae_reference(
    rewards: Tensor,  # (B, T) or (N,), float32 or float64
    values: Tensor,  # the same
    mask: Tensor | None,  # the same, bool
    cu_seqlens: Tensor | None,  # (B+1,) int32
    bootstrap_values: Tensor | None,  # (B,)
    gamma: float,
    lam: float,
    gap_zero: bool,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, rewards.shape[0])
        padded = [to_padded(x, cu_seqlens) for x in (rewards, values, full_mask(mask, rewards))]
        out = gae_reference(*padded, None, bootstrap_values, gamma, lam, gap_zero)
        return to_packed(out[0], cu_seqlens), to_packed(out[1], cu_seqlens)
    mask = full_mask(mask, rewards)
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    # A step is a token that the recursion does not skip: a counted one, or with gap_zero also a gap before the last
    # counted one.
    step = mask.flip(-1).cummax(-1).values.flip(-1) if gap_zero and mask.numel() else mask
    advantages = torch.zeros_like(rewards)
    next_advantage = rewards.new_zeros(rewards.shape[0])
    next_value = next_advantage if bootstrap_values is None else bootstrap_values
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        advantages[:, t] = advantage
        next_advantage = torch.where(step[:, t], advantage, next_advantage)
        next_value = torch.where(step[:, t], values[:, t], next_value)
    advantages = advantages.masked_fill(~mask, 0)
    return advantages, advantages + values


def _fake(rewards, values, *_):
    return torch.empty_like(rewards), torch.empty_like(rewards)


gae_op = define(SCHEMA, gae_reference, _fake)


def gae(
    rewards: Tensor,  # (B, T) or (N,) float
    values: Tensor,  # the same shape
    mask: Tensor | None = None,  # the same shape, bool, True on tokens that count
    *,
    cu_seqlens: Tensor | None = None,  # (B+1,) int32 for packed (N,) tokens
    bootstrap_values: Tensor | None = None,  # (B,) value after the last counted token, for truncated sequences
    gamma: float = 1.0,
    lam: float = 0.95,
    gap: str = "skip",  # "skip" or "zero": what a masked token between counted ones is
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) in the shape of rewards, float32 (float64 for float64 inputs); exactly 0 under the mask,
    whatever stands there.

    Not differentiable: inputs are detached. gamma and lam in [0, 1]. A sequence with no counted token gives zeros.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices and options, and, on the CPU, for cu_seqlens that
    do not rise from 0 to N.
    """
    check.is_tensor("rewards", rewards)
    check.is_float("rewards", rewards)
    n_sequences = check.token_layout("rewards", rewards, cu_seqlens)
    check.is_tensor("values", values)
    check.like("values", values, "rewards", rewards)
    check.mask_like(mask, "rewards", rewards)
    if bootstrap_values is not None:
        check.is_float("bootstrap_values", bootstrap_values)
        check.same_shape("bootstrap_values", bootstrap_values, "one value a sequence", (n_sequences,))
        check.same_device("bootstrap_values", bootstrap_values, "rewards", rewards)
    check.number("gamma", gamma, 0, 1)
    check.number("lam", lam, 0, 1)
    gap_zero = check.one_of("gap", gap, GAPS) == 1
    dtype = compute_dtype(rewards, values)
    r, v, b = (prepare(x.detach() if x is not None else None, dtype) for x in (rewards, values, bootstrap_values))
    return call(gae_op, r, v, prepare(mask), prepare(cu_seqlens), b, float(gamma), float(lam), gap_zero)
