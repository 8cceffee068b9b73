"""Rows of logits: what the kernels share that read a row of the vocabulary a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import exp


@triton.jit
def tanh(u):
    """tanh to a few units in the last place: a Padé approximant below 0.6, where 1 - exp(-2|u|) cancels, or by exp."""
    s = u * u
    e = tl.exp(-2.0 * tl.abs(u))
    small = tl.abs(u) < 0.6
    numerator = tl.where(small, u * (135135.0 + s * (17325.0 + s * (378.0 + s))), tl.where(u < 0, e - 1.0, 1.0 - e))
    return numerator / tl.where(small, 135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)), 1.0 + e)


@triton.jit
def row_start(row, origin, inner, stride_outer, stride_inner, ALIGN: tl.constexpr):
    """(offset of the row rounded down to 16 bytes, the column that stands there: 0, or negative before the row)."""
    offset = origin + (row // inner) * stride_outer + (row % inner) * stride_inner
    aligned = offset // ALIGN * ALIGN
    return aligned, (aligned - offset).to(tl.int32)


@triton.jit
def load_block(pointers, column, n_columns, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """(a block of a row from an aligned position with -inf outside [0, n_columns), its columns). A whole block is not
    masked: a mask whose edge is not aligned would split the 16-byte loads."""
    columns = column + tl.arange(0, BLOCK)
    if (column >= 0) & (column + BLOCK <= n_columns):
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(columns >= 0) & (columns < n_columns), other=-float("inf"))
    return x.to(DTYPE), columns


@triton.jit
def add_block(z, inverse, largest, total, weighted, WEIGHTED: tl.constexpr):
    """Adds a block z of logits to what is known of a row: its largest logit times `inverse` and, a lane each, total =
    sum exp(d) and weighted = sum exp(d) d for d = z inverse - largest.

    One maximum for the block, so that an iteration has one reduction; a lane keeps its own sums until the end."""
    new = tl.maximum(largest, tl.max(z, 0) * inverse)
    if new > largest:  # seldom after the first blocks; otherwise the sums would be multiplied by 1
        rescale = exp(largest - new)
        if WEIGHTED:
            weighted = (weighted + total * tl.where(largest == -float("inf"), 0.0, largest - new)) * rescale
        total *= rescale
        largest = new
    # The product is exact inside the FMA: z inverse is never rounded, and an offset of 1e4 costs no digit.
    d = tl.fma(z, inverse, -tl.where(largest == -float("inf"), 0.0, largest))
    weight = exp(d)
    if WEIGHTED:
        # exp(-1e4) is 0 in every dtype: the bound keeps 0 * -inf away.
        weighted += weight * tl.maximum(d, -1e4)
    return largest, total + weight, weighted


@triton.jit
def log_sum_of(largest, sums):
    """NaN for a row of -inf alone."""
    return tl.where(largest == -float("inf"), float("nan"), tl.log(sums))


@triton.jit
def inverse_temperature(temperatures, temperature, row, kept, DTYPE: tl.constexpr):
    if temperatures is None:
        value = tl.full((), temperature, tl.float64)
    else:
        value = tl.load(temperatures + row, mask=kept, other=1.0).to(tl.float64)
    return (1.0 / value).to(DTYPE)


def rows_of(logits: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """(a tensor that starts where the memory starts, (origin, inner, outer stride, inner stride)).

    Row i begins at element origin + (i // inner) * outer stride + (i % inner) * inner stride. Leading dimensions that
    two strides cannot describe (three, permuted) are copied once; causal shifts and other slices never are. Offsets
    count from the start of the memory because that is aligned where a view such as logits[:, prompt:-1] is not.
    """
    dims: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1]):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            size *= dims.pop()[0]
        dims.append((size, stride))
    if len(dims) > 2 or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        return rows_of(logits.contiguous())
    (_, outer), (inner, stride) = [(1, 0), (1, 0), *dims][-2:]
    return logits.as_strided((1,), (1,), 0), (logits.storage_offset(), inner, outer, stride)


def row_meta(logits: Tensor) -> dict[str, int]:
    """16 elements a thread are two 16-byte loads in flight in 16-bit dtypes; float64 has 4, for its registers."""
    largest, lanes = (1024, 4) if logits.dtype == torch.float64 else (4096, 16)
    block = min(max(triton.next_power_of_2(logits.shape[-1]), 32 * lanes), largest)
    return {"ALIGN": 16 // logits.element_size(), "BLOCK": block, "num_warps": block // (32 * lanes)}
