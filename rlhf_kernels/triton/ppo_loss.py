"""ppo_loss on GPUs in two or three launches: counts where the reduction needs them, a pass over the tokens, a last sum.

The pass forms the gradients and, for each program, the sums of PPO_FIELDS in float64; a last program adds them in a
fixed order. There are no atomics: results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import check_cu_seqlens
from ..ops.ppo_loss import SEQ_TOKEN_MEAN, SEQ_TOKEN_SUM, TOKEN_MEAN
from ..stats import PPO_FIELDS
from ._common import bound, check_tokens, clip, counted, exp, exp_tail, kl_value, launch, load_counted, sequence_bounds

PARTS, BLOCK = 256, 512
COUNT_BLOCK = 1024
PER_SEQUENCE = (SEQ_TOKEN_SUM, SEQ_TOKEN_MEAN)
N_FIELDS = len(PPO_FIELDS)
FIELDS = tl.constexpr(N_FIELDS)
VALUE, ENTROPY, KL, UNITS, TOKENS, RATIO_MAX = (
    tl.constexpr(PPO_FIELDS.index(name)) for name in ("value_loss", "entropy", "kl", "units", "tokens", "ratio_max")
)


@triton.jit
def _count_kernel(mask, cu_seqlens, counts, token_weights, length, n_tokens, BLOCK: tl.constexpr):
    """Counted tokens of each sequence, or stretch of `length` tokens; into token_weights 1 / that, for every token."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(sequence, cu_seqlens, length, n_tokens)
    lanes = tl.zeros((BLOCK,), tl.int64)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        lanes += counted(mask, index, index < end).to(tl.int64)
    count = tl.sum(lanes, 0)
    tl.store(counts + sequence, count)
    if token_weights is not None:
        weight = tl.full((BLOCK,), 1.0, tl.float64) / tl.maximum(count, 1).to(tl.float64)
        for start in range(begin, end, BLOCK):
            index = start + tl.arange(0, BLOCK)
            tl.store(token_weights + index, weight.to(token_weights.dtype.element_ty), mask=index < end)


@triton.jit
def _units(counts, n_counts, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    """What the loss is divided by: counted tokens, or sequences that have one."""
    lanes = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n_counts, BLOCK):
        index = start + tl.arange(0, BLOCK)
        count = tl.load(counts + index, mask=index < n_counts, other=0)
        lanes += (count > 0).to(tl.int64) if SEQUENCES else count
    return tl.sum(lanes, 0).to(tl.float64)


@triton.jit
def _scale(units, denominator):
    divisor = tl.maximum(units, 1.0) if denominator is None else tl.load(denominator).to(tl.float64)
    return tl.where(divisor == 0, 0.0, 1.0 / divisor)


@triton.jit
def _policy(logprobs, old_logprobs, advantages, low, high, dual_clip, log_ratio_clamp):
    """(loss, gradient, log-ratio d, exp(d) - 1 - d, exp(d), whether the clip decided, whether the dual clip did)."""
    raw = logprobs - old_logprobs
    d = clip(raw, -log_ratio_clamp, log_ratio_clamp)
    tail = exp_tail(d)
    # Near 1, where ratios are, the sum has half the error of a GPU's exp.
    ratio = tl.where(tl.abs(d) < 0.35, 1.0 + (d + tail), exp(d))
    unclipped = -advantages * ratio
    clipped = -advantages * clip(ratio, low, high)
    is_clipped = clipped > unclipped
    loss = tl.where(is_clipped, clipped, unclipped)
    is_dual = (advantages < 0) & (loss > -advantages * dual_clip)
    loss = tl.where(is_dual, -advantages * dual_clip, loss)
    gradient = tl.where(is_clipped | is_dual | (tl.abs(raw) > log_ratio_clamp), 0.0, unclipped)
    return loss, gradient, d, tail, ratio, is_clipped, is_dual


@triton.jit
def _value(values, old_values, returns, value_clip):
    """(loss, gradient, whether the clip decided)."""
    error = values - returns
    inside = tl.minimum(values, old_values + value_clip, propagate_nan=tl.PropagateNan.ALL)
    clipped_error = tl.maximum(inside, old_values - value_clip, propagate_nan=tl.PropagateNan.ALL) - returns
    is_clipped = clipped_error * clipped_error > error * error
    loss = 0.5 * tl.maximum(error * error, clipped_error * clipped_error, propagate_nan=tl.PropagateNan.ALL)
    return loss, tl.where(is_clipped, 0.0, error), is_clipped


@triton.jit
def _kl_gradient(x, KIND: tl.constexpr):
    """d kl_value / dx; the last four estimators have the gradient of k2."""
    if KIND == 0:
        gradient = tl.full(x.shape, 1.0, x.dtype)
    elif KIND == 1:
        gradient = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
    elif KIND == 3:
        gradient = tl.where(tl.abs(x) < 0.35, x - exp_tail(-x), 1.0 - exp(-x))
    else:
        gradient = x
    return gradient


@triton.jit
def _pass_kernel(
    logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy, ref_logprobs, is_weights,
    denominator, counts, token_weights, parts, d_logprobs, d_values, d_entropy, n, n_counts, units: tl.float64,
    low: tl.float64, high: tl.float64, dual_clip: tl.float64, value_clip: tl.float64, value_coef: tl.float64,
    entropy_coef: tl.float64, kl_coef: tl.float64, kl_clamp: tl.float64, log_ratio_clamp: tl.float64,
    KL_KIND: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of every token, and the sums over this program's tokens into its column of parts (13, programs)."""
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    part, n_parts = tl.program_id(0), tl.num_programs(0)
    units = tl.full((), units, tl.float64) if counts is None else _units(counts, n_counts, SEQUENCES, BLOCK)
    scale = _scale(units, denominator).to(DTYPE)
    low, high, dual_clip = tl.full((), low, DTYPE), tl.full((), high, DTYPE), tl.full((), dual_clip, DTYPE)
    value_clip, value_coef = tl.full((), value_clip, DTYPE), tl.full((), value_coef, DTYPE)
    entropy_coef, kl_coef = tl.full((), entropy_coef, DTYPE), tl.full((), kl_coef, DTYPE)
    kl_clamp, log_ratio_clamp = tl.full((), kl_clamp, DTYPE), tl.full((), log_ratio_clamp, DTYPE)
    zeros, none = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    policy_sum, value_sum, entropy_sum, kl_sum = zeros, zeros, zeros, zeros
    approx_sum, approx_k3_sum, ratio_sum = zeros, zeros, zeros
    tokens, clipped, dual_clipped, value_clipped = none, none, none, none
    largest = tl.zeros((BLOCK,), DTYPE)
    for start in range(part.to(tl.int64) * BLOCK, n, n_parts * BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < n
        # Tokens that do not count are read as zeros, and add 0 to everything but the ratio.
        token = counted(mask, index, inside)
        weight = token.to(DTYPE) if token_weights is None else load_counted(token_weights, index, inside, token)
        logprob = load_counted(logprobs, index, inside, token)
        old_logprob = load_counted(old_logprobs, index, inside, token)
        advantage = load_counted(advantages, index, inside, token)
        policy = _policy(logprob, old_logprob, advantage, low, high, dual_clip, log_ratio_clamp)
        loss, gradient, d, tail, ratio, is_clipped, is_dual = policy
        if is_weights is not None:
            is_weight = load_counted(is_weights, index, inside, token)
            loss, gradient = loss * is_weight, gradient * is_weight
        if ref_logprobs is not None:
            raw = logprob - load_counted(ref_logprobs, index, inside, token)
            x = clip(raw, -kl_clamp, kl_clamp)
            kl_sum += kl_value(x, KL_KIND % 4).to(tl.float64) * weight
            d_kl = tl.where(tl.abs(raw) > kl_clamp, 0.0, kl_coef * _kl_gradient(x, KL_KIND))
            gradient += tl.where(kl_coef == 0, 0.0, d_kl)
        if d_logprobs is not None:
            tl.store(d_logprobs + index, tl.where(token, gradient * weight * scale, 0.0), mask=inside)
        if values is not None:
            value = load_counted(values, index, inside, token)
            old_value = value if old_values is None else load_counted(old_values, index, inside, token)
            target = load_counted(returns, index, inside, token)
            value_loss, d_value, is_value_clipped = _value(value, old_value, target, value_clip)
            value_sum += value_loss.to(tl.float64) * weight
            value_clipped += is_value_clipped.to(tl.int32)
            if d_values is not None:
                d_value = tl.where(value_coef == 0, 0.0, value_coef * d_value)
                tl.store(
                    d_values + index,
                    tl.where(token, d_value * weight * scale, 0.0),
                    mask=inside,
                )
        if entropy is not None:
            entropy_sum += load_counted(entropy, index, inside, token).to(tl.float64) * weight
            if d_entropy is not None:
                tl.store(d_entropy + index, tl.where(token, -entropy_coef * weight * scale, 0.0), mask=inside)
        policy_sum += loss.to(tl.float64) * weight
        tokens += token.to(tl.int32)
        approx_sum += (0.5 * d * d).to(tl.float64)
        approx_k3_sum += tail.to(tl.float64)
        clipped += is_clipped.to(tl.int32)
        dual_clipped += is_dual.to(tl.int32)
        ratio_sum += tl.where(token, ratio, 0.0).to(tl.float64)
        largest = tl.maximum(largest, tl.where(token, ratio, 0.0))
    sums = (
        tl.sum(policy_sum, 0), tl.sum(value_sum, 0), tl.sum(entropy_sum, 0), tl.sum(kl_sum, 0), units,
        tl.sum(tokens, 0), tl.sum(approx_sum, 0), tl.sum(approx_k3_sum, 0), tl.sum(clipped, 0), tl.sum(dual_clipped, 0),
        tl.sum(value_clipped, 0), tl.sum(ratio_sum, 0), tl.max(largest, 0),
    )  # fmt: skip
    for field in tl.static_range(FIELDS):
        tl.store(parts + field * n_parts + part, sums[field].to(tl.float64))


@triton.jit
def _reduce_kernel(
    parts, denominator, loss, stats, n_parts, value_coef: tl.float64, entropy_coef: tl.float64, kl_coef: tl.float64,
    UNITS_ARE_TOKENS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds the parts, and forms the loss from their first four fields."""
    field, column = tl.arange(0, 16), tl.arange(0, PARTS)
    inside = (field < FIELDS)[:, None] & (column < n_parts)[None, :]
    values = tl.load(parts + field[:, None] * n_parts + column[None, :], mask=inside, other=0.0)
    sums = tl.where((field == UNITS) | (field == RATIO_MAX), tl.max(values, 1), tl.sum(values, 1))
    if UNITS_ARE_TOKENS:
        sums = tl.where(field == UNITS, tl.sum(tl.where(field == TOKENS, sums, 0.0), 0), sums)
    units = tl.sum(tl.where(field == UNITS, sums, 0.0), 0)
    zero = tl.zeros((16,), tl.float64)  # two scalars in a tl.where would be float32
    coef = tl.where(field == ENTROPY, zero - entropy_coef, tl.where(field == KL, zero + kl_coef, zero))
    coef = tl.where(field == 0, zero + 1.0, tl.where(field == VALUE, zero + value_coef, coef))
    # A term with a coefficient of 0 may be inf or NaN.
    terms = tl.where(coef == 0, 0.0, coef * sums)
    tl.store(stats + field, sums, mask=field < FIELDS)
    tl.store(loss, (tl.sum(terms, 0) * _scale(units, denominator)).to(loss.dtype.element_ty))


def _counts(
    like: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: int,
    divides: bool,  # whether the caller gives a denominator
) -> tuple[Tensor | None, Tensor | None]:
    """(counted tokens of stretches, or of sequences, int64; weights of the tokens for seq_mean_token_mean).

    Tokens need no count before the pass where there is no mask, or where the caller divides.
    """
    n, length = like.numel(), like.shape[-1]
    if reduction == TOKEN_MEAN and mask is not None and not divides:
        n_counts, cu_seqlens = min(triton.cdiv(n, COUNT_BLOCK), PARTS), None
        length = triton.cdiv(n, max(n_counts, 1))
    elif reduction in PER_SEQUENCE:
        n_counts = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    else:
        return None, None
    counts = like.new_empty((n_counts,), dtype=torch.int64)
    token_weights = torch.empty_like(like) if reduction == SEQ_TOKEN_MEAN else None
    if n_counts:
        launch(_count_kernel, (n_counts,), like, mask, cu_seqlens, counts, token_weights, length, n, BLOCK=COUNT_BLOCK)
    return counts, token_weights


def ppo_loss(
    logprobs: Tensor,  # (B, T) or (N,), contiguous, as all below
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    denominator: Tensor | None,  # ()
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: int,
    kl_clamp: float | None,
    log_ratio_clamp: float | None,
    reduction: int,
    grad_logprobs: bool,
    grad_values: bool,
    grad_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    old_values = None if value_clip is None else old_values
    tokens = {
        "old_logprobs": old_logprobs, "advantages": advantages, "mask": mask,
        "values": values, "old_values": old_values, "returns": returns,
        "entropy": entropy, "ref_logprobs": ref_logprobs, "is_weights": is_weights,
    }  # fmt: skip
    check_tokens(logprobs, logprobs=logprobs, **tokens)
    n = logprobs.numel()
    check_cu_seqlens(cu_seqlens, n)
    wanted = ((grad_logprobs, logprobs), (grad_values, values), (grad_entropy, entropy))
    gradients = [torch.empty_like(x) if want and x is not None else None for want, x in wanted]
    counts, token_weights = _counts(logprobs, mask, cu_seqlens, reduction, denominator is not None)
    coefs = (value_coef, entropy_coef, kl_coef)
    options = (1 - clip_low, 1 + clip_high, bound(dual_clip), bound(value_clip), *coefs, bound(kl_clamp))
    n_parts = min(max(triton.cdiv(n, BLOCK), 1), PARTS)
    parts, stats = (logprobs.new_empty(shape, dtype=torch.float64) for shape in ((N_FIELDS, n_parts), (N_FIELDS,)))
    launch(
        _pass_kernel, (n_parts,), logprobs,
        logprobs, *tokens.values(), denominator, counts, token_weights, parts, *gradients, n,
        0 if counts is None else counts.numel(), float(n) if reduction == TOKEN_MEAN else 0.0,
        *options, bound(log_ratio_clamp), KL_KIND=kl_estimator, SEQUENCES=reduction in PER_SEQUENCE, BLOCK=BLOCK,
    )  # fmt: skip
    loss = logprobs.new_empty(())
    sizes = {"UNITS_ARE_TOKENS": reduction == TOKEN_MEAN, "PARTS": PARTS}
    launch(_reduce_kernel, (1,), logprobs, parts, denominator, loss, stats, n_parts, *coefs, **sizes)
    return loss, stats, *(logprobs.new_empty(0) if d is None else d for d in gradients)
