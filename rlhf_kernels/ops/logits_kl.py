"""The exact divergence between two distributions over the vocabulary, a number a token, from logits.

    z       = softcap * tanh(logits / softcap) if softcap, then z / temperature;   p = softmax(z), q of ref_logits
    reverse = KL(p || q) = sum_v p_v (log p_v - log q_v)        d / dz_v = p_v (log p_v - log q_v - kl)
    forward = KL(q || p) = sum_v q_v (log q_v - log p_v)        d / dz_v = p_v - q_v

A small divergence keeps its digits. x = log p_v - log q_v is formed from the difference of the logits, exact where
they are close, and the terms are summed as p (exp(-x) - 1 + x) and q (exp(x) - 1 - x), which have the same sum and are
never negative, where the plain sum cancels down to the rounding of the normalisers. A gradient sums to 0 over the
vocabulary; the error that all x have in common is taken out as a multiple of p, for the reverse direction as the mean
of x under p in place of kl. Differentiable in the policy's logits alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._layout import compute_dtype, prepare
from .._library import call, define, once_differentiable
from .token_logprobs import check_shaping, scaled_logits, split_temperature

DIRECTIONS = ("reverse", "forward")
SAVED = 6
# saved is (SAVED, ...): row_max and log_sum of the policy, of the reference, the difference of their log-sum-exps, and
# the multiple of p that makes the gradient sum to 0.
SCHEMA = (
    "logits_kl(Tensor logits, Tensor ref_logits, Tensor? mask, Tensor? temperatures, float temperature, "
    "float? softcap, int direction) -> (Tensor kl, Tensor saved)"
)
# The gradient of columns of the vocabulary, the same ones of logits and ref_logits, written into `grad`, which holds
# the logits on entry where none are given.
INTO_SCHEMA = (
    "logits_kl_backward_into(Tensor(a!) grad, Tensor grad_kl, Tensor? logits, Tensor ref_logits, Tensor? mask, "
    "Tensor? temperatures, Tensor saved, float temperature, float? softcap, int direction) -> ()"
)


def divergence_terms(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """p (exp(-x) - 1 + x) with p = q exp(x); near x = 0 by the Taylor series."""
    series = torch.ones_like(x)
    for k in range(13, 2, -1):
        series = 1 - series * x / k
    return torch.where(x.abs() < 0.35, p * (0.5 * x * x) * series, q - p + weighted(p, x))


def weighted(p: Tensor, x: Tensor) -> Tensor:
    return torch.where(p == 0, p, p * x)  # 0 * inf is 0


def slopes(p: Tensor, q: Tensor, x: Tensor, direction: int) -> Tensor:
    """d kl / dz but for a multiple of p that makes their sum 0."""
    return torch.where(x.abs() < 1, -p * torch.expm1(-x), p - q) if direction else weighted(p, x)


def log_ratio(z: Tensor, ref_z: Tensor, shift: Tensor) -> Tensor:
    """log p - log q, 0 apart from the shift where neither can choose (-inf in both)."""
    return torch.where(z == ref_z, 0, z - ref_z) - shift[..., None]


def logits_kl_reference(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    mask: Tensor | None,  # (...) bool
    temperatures: Tensor | None,  # (...)
    temperature: float,
    softcap: float | None,
    direction: int,
) -> tuple[Tensor, Tensor]:
    z, ref_z = (scaled_logits(x, temperatures, temperature, softcap) for x in (logits, ref_logits))
    saved, logs, totals = [], [], []
    for x in (z, ref_z):
        row_max = x.amax(-1) if x.numel() else x.new_zeros(x.shape[:-1])
        totals.append((x - row_max[..., None]).exp().sum(-1, dtype=torch.float64).log())
        saved += [row_max, totals[-1].to(x.dtype)]
        logs.append(x - saved[-2][..., None] - saved[-1][..., None])
    p, q = logs[0].exp(), logs[1].exp()
    saved.append((saved[0] - saved[2] + (totals[0] - totals[1])).to(z.dtype))
    x = log_ratio(z, ref_z, saved[4])
    saved.append(slopes(p, q, x, direction).sum(-1) / p.sum(-1))
    kl = (divergence_terms(q, p, -x) if direction else divergence_terms(p, q, x)).sum(-1)
    saved = torch.stack(saved)
    return (kl, saved) if mask is None else (kl.masked_fill(~mask, 0), saved.masked_fill(~mask, 0))


def logits_kl_backward_into_reference(
    grad: Tensor,  # (..., v)
    grad_kl: Tensor,  # (...)
    logits: Tensor | None,  # (..., v)
    ref_logits: Tensor,  # (..., v)
    mask: Tensor | None,  # (...)
    temperatures: Tensor | None,  # (...)
    saved: Tensor,  # (6, ...)
    temperature: float,
    softcap: float | None,
    direction: int,
) -> None:
    logits = grad if logits is None else logits
    z, ref_z = (scaled_logits(x, temperatures, temperature, softcap) for x in (logits, ref_logits))
    logp, logq = (x - saved[i][..., None] - saved[i + 1][..., None] for i, x in ((0, z), (2, ref_z)))
    p, x = logp.exp(), log_ratio(z, ref_z, saved[4])
    d = slopes(p, logq.exp(), x, direction) - p * saved[5][..., None]
    d = d * grad_kl[..., None] / (temperature if temperatures is None else temperatures.to(d.dtype)[..., None])
    if softcap is not None:
        d = d * (1 - torch.tanh(logits.to(d.dtype) / softcap) ** 2)
    grad.copy_(d if mask is None else d.masked_fill(~mask[..., None], 0))


def _fake(logits, ref_logits, *_):
    dtype, shape = compute_dtype(logits), logits.shape[:-1]
    return logits.new_empty(shape, dtype=dtype), logits.new_empty((SAVED, *shape), dtype=dtype)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.softcap, ctx.direction = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_kl, _):
    once_differentiable("logits_kl")
    if grad_kl is None:
        return (None,) * 7
    grad = torch.empty_like(ctx.saved_tensors[0], memory_format=torch.contiguous_format)
    options = (ctx.temperature, ctx.softcap, ctx.direction)
    logits_kl_backward_into(grad, grad_kl, *ctx.saved_tensors, *options)
    return grad, *[None] * 6


logits_kl_backward_into = define(INTO_SCHEMA, logits_kl_backward_into_reference, lambda *_: None)
logits_kl_op = define(SCHEMA, logits_kl_reference, _fake, setup_context=_setup_context, backward=_backward)


def logits_kl(
    logits: Tensor,  # (..., V) float32, float64, bfloat16 or float16; the policy's
    ref_logits: Tensor,  # (..., V), of the same dtype or another
    mask: Tensor | None = None,  # (...) bool, True on tokens that count
    *,
    temperature: float | Tensor = 1.0,  # > 0; a number, or one a row (...)
    softcap: float | None = None,  # of both
    direction: str = "reverse",  # or "forward"
) -> Tensor:
    """KL per token `(...)` in nats, float32 (float64 for float64 inputs): KL(policy || reference) over the whole
    vocabulary, or with direction="forward" KL(reference || policy).

    Differentiable in logits, once, for any upstream gradient; ref_logits is a constant. Rows under the mask give 0 and
    no gradient, whatever they hold. A logit of -inf in both is a token that neither can choose and adds 0; one that
    the reference excludes and the policy allows makes reverse KL inf and its gradient not finite. Allocates nothing of
    the size of the logits but the gradient, unless their dtypes differ or their last stride is not 1: then a copy.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices and options.
    """
    check.is_float("logits", logits)
    check.is_float("ref_logits", ref_logits)
    check.same_shape("ref_logits", ref_logits, "logits", logits.shape)
    check.same_device("ref_logits", ref_logits, "logits", logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and logits.shape[:-1].numel()):
        raise ValueError(
            f"logits: expected (..., V) with a vocabulary of at least one token, got {tuple(logits.shape)}"
        )
    check_shaping(temperature, softcap, "logits", logits, logits.shape[:-1])
    check.mask_like(mask, "the rows of logits", logits.detach().sum(-1) if logits.numel() == 0 else logits[..., 0])
    dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
    policy, ref = (
        x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous() for x in (logits, ref_logits.detach())
    )
    scalar, temperatures = split_temperature(temperature, compute_dtype(logits, ref_logits))
    code = check.one_of("direction", direction, DIRECTIONS)
    kl, _ = call(logits_kl_op, policy.to(dtype), ref.to(dtype), prepare(mask), temperatures, scalar, softcap, code)
    return kl
