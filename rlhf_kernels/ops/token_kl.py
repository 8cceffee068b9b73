"""Per-token estimators of KL(policy || reference) from two log-probabilities of a sampled token.

    x   = logprobs - ref_logprobs, clamped to [-clamp, clamp] if clamp
    k1  = x            unbiased, any sign
    abs = |x|
    k2  = x^2 / 2      its gradient is an unbiased gradient of the KL on-policy
    k3  = exp(-x) - 1 + x      unbiased, never negative

`k1+`, `abs+`, `k3+`: that value with the gradient of k2. Source: J. Schulman, "Approximating KL Divergence" (2020).
Small vectors: plain torch is the kernel, and a compiler fuses it with its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._layout import compute_dtype
from .._library import call, define_composite

ESTIMATORS = ("k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+")
VALUES = ESTIMATORS[:4]  # for ops that are not differentiable

SCHEMA = "token_kl(Tensor logprobs, Tensor ref_logprobs, int estimator, float? clamp) -> Tensor"


def kl_value(x: Tensor, estimator: int) -> Tensor:
    """The value of an estimator (its index in ESTIMATORS) at x = logprobs - ref_logprobs."""
    kind = estimator % len(VALUES)
    if kind == 0:
        return x
    if kind == 1:
        return x.abs()
    if kind == 2:
        return 0.5 * x * x
    return torch.expm1(-x) + x


def kl_gradient(x: Tensor, estimator: int) -> Tensor:
    """d kl_value / dx; x, the gradient of k2, for the estimators with a plus."""
    return (torch.ones_like(x), x.sign(), x, -torch.expm1(-x))[estimator] if estimator < len(VALUES) else x


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value with the gradient of another."""
    return value.detach() + (surrogate - surrogate.detach())


def token_kl_reference(
    logprobs: Tensor,  # any shape
    ref_logprobs: Tensor,  # the same
    estimator: int,
    clamp: float | None,
) -> Tensor:
    x = logprobs - ref_logprobs
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    value = kl_value(x, estimator)
    if estimator < len(VALUES):
        return value
    return with_gradient_of(value, 0.5 * x * x)


token_kl_op = define_composite(SCHEMA, token_kl_reference)


def token_kl(
    logprobs: Tensor,  # any shape, float
    ref_logprobs: Tensor,  # the same shape
    estimator: str = "k1",
    *,
    clamp: float | None = None,  # bound on |logprobs - ref_logprobs|; no gradient outside it
) -> Tensor:
    """Elementwise KL estimates in nats, float32 (float64 for float64 inputs), differentiable in both inputs.

    Estimators: k1, abs, k2, k3; with a `+` the same value with the gradient of k2. There is no mask: what is NaN
    stays NaN, mask it with torch.where. Raises TypeError or ValueError for wrong dtypes, shapes, devices and unknown
    estimators.
    """
    check.is_float("logprobs", logprobs)
    check.like("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    code = check.one_of("estimator", estimator, ESTIMATORS)
    if clamp is not None:
        check.number("clamp", clamp, above=0)
    dtype = compute_dtype(logprobs, ref_logprobs)
    return call(token_kl_op, logprobs.to(dtype), ref_logprobs.to(dtype), code, clamp)
