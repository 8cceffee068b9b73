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
    # A table of who is with whom: B x B, sums in a fixed order, and a NaN stays in its own group. Differences are
    # averaged, not scores: equal scores give 0, and a constant added to all of them changes nothing.
    together = group_ids[:, None] == group_ids
    sums = lambda x: x.expand(count, count).masked_fill(~together, 0).sum(-1)  # noqa: E731
    size = together.sum(-1, dtype=scores.dtype)
    alone = size == 1
    deviation = sums(scores[:, None] - scores) / size.clamp(min=1)
    if KINDS[kind] == "rloo":
        deviation = deviation * (size / (size - 1).clamp(min=1))
    elif KINDS[kind] == "grpo":
        deviation = deviation / ((sums(deviation * deviation) / (size - 1).clamp(min=1)).sqrt() + eps)
    return deviation.masked_fill(alone & scores.isfinite(), 0)


group_advantages_op = define_composite(SCHEMA, group_advantages_reference)


def group_advantages(
    scores: Tensor,  # (B,) float
    group_ids: Tensor,  # (B,) int64 in [0, B): samples of one prompt share an id
    *,
    kind: str = "grpo",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages `(B,)`, float32 (float64 for float64 scores), of each sample against the others of its group.

    A group of one gets 0. Not differentiable: inputs are detached. Memory B x B. Raises TypeError or ValueError for
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
