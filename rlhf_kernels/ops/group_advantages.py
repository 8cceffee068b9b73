"""Advantages of samples within their group, without a value model.

    grpo        (s - mean_g) / (std_g + eps)     unbiased standard deviation; arXiv 2402.03300
    grpo_no_std  s - mean_g                      arXiv 2503.20783
    rloo         s - mean of the others          arXiv 2402.14740

Small vectors: plain torch is the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._layout import compute_dtype
from .._library import call, define_composite, invalid

SCHEMA = "group_advantages(Tensor scores, Tensor group_ids, int kind, float eps) -> Tensor"
KINDS = ("grpo", "grpo_no_std", "rloo")


def group_advantages_reference(
    scores: Tensor,  # (B,) float32 or float64
    group_ids: Tensor,  # (B,) int64
    kind: int,
    eps: float,
) -> Tensor:
    count = scores.shape[0]
    on_cpu = type(group_ids) is Tensor and group_ids.device.type == "cpu"  # where looking is free
    if on_cpu and bool(((group_ids < 0) | (group_ids >= count)).any()):
        raise invalid(f"group_ids: expected ids in [0, {count}), got {int(group_ids.min())} to {int(group_ids.max())}")
    if not count:
        return scores.clone()
    bad = (group_ids < 0) | (group_ids >= count)
    ids, order = torch.sort(torch.where(bad, count, group_ids), stable=True)
    offsets = torch.searchsorted(ids, torch.arange(count + 2, device=ids.device))  # one group more: of bad ids
    sums = lambda x: torch.segment_reduce(x, "sum", offsets=offsets, initial=0, unsafe=True)[ids]  # noqa: E731
    size = (offsets[1:] - offsets[:-1])[ids].to(scores.dtype)
    # Differences from a member, not scores, are averaged: equal scores give 0. A NaN stays in its own group.
    x = scores[order]
    x = x - x[offsets[ids]]
    deviation = x - sums(x) / size
    if KINDS[kind] == "rloo":
        deviation = deviation * (size / (size - 1).clamp(min=1))
    elif KINDS[kind] == "grpo":
        scale = (sums(deviation * deviation) / (size - 1).clamp(min=1)).sqrt() + eps
        deviation = torch.where(deviation == 0, deviation, deviation / scale)
    deviation = deviation.masked_fill((size == 1) & scores[order].isfinite(), 0)
    return torch.empty_like(scores).scatter_(0, order, deviation).masked_fill(bad, float("nan"))


group_advantages_op = define_composite(SCHEMA, group_advantages_reference)


def group_advantages(
    scores: Tensor,  # (B,) float
    group_ids: Tensor,  # (B,) int64 in [0, B): samples of one prompt share an id
    *,
    kind: str = "grpo",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages `(B,)`, float32 (float64 for float64 scores), of each sample against the others of its group.

    A group of one gets 0. Not differentiable: inputs are detached. Raises TypeError or ValueError for
    wrong dtypes and shapes, and on the CPU for an id out of range.
    """
    check.is_float("scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"scores: expected (B,), got {tuple(scores.shape)}")
    check.is_tensor("group_ids", group_ids)
    if group_ids.dtype != torch.int64:
        raise TypeError(f"group_ids: expected int64, got {group_ids.dtype}; convert it with .long()")
    check.same_shape("group_ids", group_ids, "scores", scores.shape)
    check.same_device("group_ids", group_ids, "scores", scores)
    check.number("eps", eps, 0)
    scores = scores.detach().to(compute_dtype(scores))
    return call(group_advantages_op, scores, group_ids, check.one_of("kind", kind, KINDS), eps)
