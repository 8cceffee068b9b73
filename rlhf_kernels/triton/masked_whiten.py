"""Masked whitening on GPUs in two launches: moments of at most PARTS parts, which each program of the second merges.

Statistics are float64: count, mean and squared deviations of a block, merged as Chan, Golub and LeVeque (1979) do. The
number of parts depends on the size alone, so that results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check_tokens, counted, launch, load_counted

PARTS, BLOCK = 256, 1024


@triton.jit
def _moments_kernel(x, mask, parts, n, BLOCK: tl.constexpr):
    """count, mean and squared deviations of the blocks of this program, into a column of parts (3, programs)."""
    part, n_parts = tl.program_id(0), tl.num_programs(0)
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    squares = tl.full((), 0.0, tl.float64)
    for start in range(part.to(tl.int64) * BLOCK, n, n_parts * BLOCK):
        index = start + tl.arange(0, BLOCK)
        counts = counted(mask, index, index < n)
        values = load_counted(x, index, index < n, counts).to(tl.float64)
        added = tl.sum(counts.to(tl.float64), 0)
        block_mean = tl.sum(values, 0) / tl.maximum(added, 1.0)
        deviations = tl.where(counts, values - block_mean, 0.0)
        merged = tl.maximum(count + added, 1.0)
        shift = block_mean - mean
        squares += tl.sum(deviations * deviations, 0) + shift * shift * (count * added / merged)
        mean += shift * (added / merged)
        count += added
    tl.store(parts + part, count)
    tl.store(parts + n_parts + part, mean)
    tl.store(parts + 2 * n_parts + part, squares)


@triton.jit
def _whiten_kernel(
    x, mask, parts, out, n, n_parts, eps: tl.float64,
    SHIFT_MEAN: tl.constexpr, UNBIASED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.arange(0, PARTS)
    count = tl.load(parts + part, mask=part < n_parts, other=0.0)
    means = tl.load(parts + n_parts + part, mask=part < n_parts, other=0.0)
    squares = tl.load(parts + 2 * n_parts + part, mask=part < n_parts, other=0.0)
    total = tl.sum(count, 0)
    mean = tl.sum(count * means, 0) / tl.maximum(total, 1.0)
    deviations = tl.sum(squares + count * (means - mean) * (means - mean), 0)
    variance = deviations / tl.maximum(total - 1.0 if UNBIASED else total, 1.0)
    scale = 1.0 / tl.sqrt(variance + eps)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = counted(mask, index, index < n)
    values = load_counted(x, index, index < n, counts).to(tl.float64)
    whitened = (values - mean) * scale
    if not SHIFT_MEAN:
        whitened += mean
    tl.store(out + index, tl.where(counts, whitened, 0.0).to(out.dtype.element_ty), mask=index < n)


def whiten_into(out: Tensor, x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float) -> None:
    """out may be x."""
    n = x.numel()
    if not n:
        return
    n_parts = min(triton.cdiv(n, BLOCK), PARTS)
    parts = torch.empty((3, n_parts), dtype=torch.float64, device=x.device)
    launch(_moments_kernel, (n_parts,), x, x, mask, parts, n, BLOCK=BLOCK)
    launch(
        _whiten_kernel, (triton.cdiv(n, BLOCK),), x, x, mask, parts, out, n, n_parts, eps,
        SHIFT_MEAN=shift_mean, UNBIASED=unbiased, PARTS=PARTS, BLOCK=BLOCK,
    )  # fmt: skip


def masked_whiten(
    x: Tensor,  # any shape, contiguous
    mask: Tensor | None,  # the same, bool
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    check_tokens(x, x=x, mask=mask)
    out = torch.empty_like(x)
    whiten_into(out, x, mask, shift_mean, unbiased, eps)
    return out
