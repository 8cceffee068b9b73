"""ppo_advantages on GPUs: shaped rewards, the scan of gae.py, the whitening of masked_whiten.py; usually 5 launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import check_cu_seqlens
from ..ops.ppo_advantages import WHITEN_EPS
from ._common import bound, check_tokens, clip, counted, kl_value, last_counted, launch, load_counted, sequence_bounds
from .gae import gae
from .masked_whiten import whiten_into

BLOCK = 1024


@triton.jit
def _shape_kernel(
    logprobs, ref_logprobs, scores, mask, kl_coef_tensor, rewards, kl, n, kl_coef: tl.float64, score_clip: tl.float64,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rewards = scores - kl_coef kl, with the scores only where they are one a token."""
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    counts = counted(mask, index, inside)
    coef = tl.full((), kl_coef, DTYPE) if kl_coef_tensor is None else tl.load(kl_coef_tensor)
    x = load_counted(logprobs, index, inside, counts) - load_counted(ref_logprobs, index, inside, counts)
    value = kl_value(x, KIND)
    reward = tl.where(coef == 0, 0.0, -coef * value)  # k3 may be inf
    if scores is not None:
        limit = tl.full((), score_clip, DTYPE)
        reward += clip(load_counted(scores, index, inside, counts), -limit, limit)
    tl.store(kl + index, tl.where(counts, value, 0.0), mask=inside)
    tl.store(rewards + index, tl.where(counts, reward, 0.0), mask=inside)


@triton.jit
def _add_scores_kernel(
    scores, mask, cu_seqlens, rewards, length, n_tokens, score_clip: tl.float64, BLOCK: tl.constexpr
):
    """Adds the score of a sequence to the reward of its last counted token; a sequence without one drops its score."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(sequence, cu_seqlens, length, n_tokens)
    last = last_counted(mask, begin, end, BLOCK)
    if last >= begin:
        limit = tl.full((), score_clip, rewards.dtype.element_ty)
        score = clip(tl.load(scores + sequence), -limit, limit)
        tl.store(rewards + last, tl.load(rewards + last) + score)


def ppo_advantages(
    logprobs: Tensor,  # (B, T) or (N,), contiguous, as all below
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,  # (B,), or the shape of logprobs
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef_tensor: Tensor | None,  # ()
    kl_coef: float,
    kl_estimator: int,
    gamma: float,
    lam: float,
    score_clip: float | None,
    whiten_rewards: bool,
    whiten_advantages: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_tokens(logprobs, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, mask=mask)
    check_cu_seqlens(cu_seqlens, logprobs.numel())
    rewards, kl = torch.empty_like(logprobs), torch.empty_like(logprobs)
    n, length = logprobs.numel(), logprobs.shape[-1]
    n_sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    per_sequence = scores.dim() == 1 and scores.shape[0] == n_sequences
    limit = bound(score_clip)
    if n:
        launch(
            _shape_kernel, (triton.cdiv(n, BLOCK),), logprobs, logprobs, ref_logprobs, None if per_sequence else scores,
            mask, kl_coef_tensor, rewards, kl, n, kl_coef, limit, KIND=kl_estimator, BLOCK=BLOCK,
        )  # fmt: skip
        if per_sequence:
            layout = (mask, cu_seqlens, rewards, length, n)
            launch(_add_scores_kernel, (n_sequences,), logprobs, scores, *layout, limit, BLOCK=BLOCK)
    if whiten_rewards:
        whiten_into(rewards, rewards, mask, False, False, WHITEN_EPS)
    advantages, returns = gae(rewards, values, mask, cu_seqlens, None, gamma, lam, False)
    if whiten_advantages:
        whiten_into(advantages, advantages, mask, True, False, WHITEN_EPS)
    return advantages, returns, rewards, kl
