"""Whitening over the counted elements: (x - mean) * rsqrt(var + eps), plus the mean where it is to be kept.

var is biased (divided by n) unless `unbiased`. Source of the convention: OpenAI lm-human-preferences, `utils/core.py`
whiten.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from .. import _checks as check
from .._layout import compute_dtype, full_mask, prepare
from .._library import call, define

SCHEMA = "masked_whiten(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, float eps) -> Tensor"


def masked_moments(
    x: Tensor,  # any shape
    mask: Tensor | None,
) -> Tensor:
    """(3,) float64: count, mean, sum of squared deviations of the counted elements."""
    mask = full_mask(mask, x)
    count = mask.sum().double()
    mean = x.double().masked_fill(~mask, 0).sum() / count.clamp(min=1)
    squares = ((x.double() - mean) ** 2).masked_fill(~mask, 0).sum()
    return torch.stack([count, mean, squares])


def merge_moments(
    moments: Tensor,  # (R, 3) float64
) -> Tensor:
    """The moments of R samples together (Chan, Golub and LeVeque 1979): exact where sums of squares would cancel."""
    count, mean, squares = moments.unbind(-1)
    total = count.sum()
    grand = (count * mean).sum() / total.clamp(min=1)
    return torch.stack([total, grand, (squares + count * (mean - grand) ** 2).sum()])


def whiten_with(
    x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    count, mean, squares = moments.unbind(-1)
    variance = squares / (count - int(unbiased)).clamp(min=1)
    scaled = (x.double() - mean) * torch.rsqrt(variance + eps)
    return (scaled if shift_mean else scaled + mean).masked_fill(~full_mask(mask, x), 0).to(x.dtype)


def masked_whiten_reference(
    x: Tensor,  # any shape, float32 or float64
    mask: Tensor | None,  # the same, bool
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    return whiten_with(x, mask, masked_moments(x, mask), shift_mean, unbiased, eps)


def _fake(x, *_):
    return torch.empty_like(x)


masked_whiten_op = define(SCHEMA, masked_whiten_reference, _fake)


def group_moments(x: Tensor, mask: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """Moments over every rank of a process group; one collective of three numbers a rank."""
    local = masked_moments(x, mask)[None]
    return merge_moments(functional.all_gather_tensor(local, gather_dim=0, group=group))


def masked_whiten(
    x: Tensor,  # any shape, float
    mask: Tensor | None = None,  # the same shape, bool, True on elements that count
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Whitened x, float32 (float64 for float64), exactly 0 under the mask, whatever stands there. Not differentiable:
    x is detached.

    Statistics run over the counted elements of this call, and of every rank of `group` when given. A single counted
    element, or none, has variance 0. Raises TypeError or ValueError for wrong dtypes, shapes and devices.
    """
    check.is_float("x", x)
    check.mask_like(mask, "x", x)
    check.number("eps", eps, above=0)
    x = prepare(x.detach(), compute_dtype(x))
    mask = prepare(mask)
    if group is None:
        return call(masked_whiten_op, x, mask, shift_mean, unbiased, float(eps))
    return whiten_with(x, mask, group_moments(x, mask, group), shift_mean, unbiased, eps)
