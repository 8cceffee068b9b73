"""logits_kl on GPUs: one program a row; both logits are read twice forward, for the normalisers and for the terms."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._layout import compute_dtype, prepare
from ..ops.logits_kl import SAVED
from ._common import exp, exp_tail, launch
from ._rows import (
    add_block,
    inverse_temperature,
    load_block,
    log_sum_of,
    row_meta,
    row_start,
    rows_of,
    tanh,
)


@triton.jit
def _normaliser(
    logits, aligned, first, n_read, inverse, cap, DTYPE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    """(row_max, log_sum) of a row."""
    largest = tl.full((), -float("inf"), DTYPE)
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, n_read - first, BLOCK):
        z, columns = load_block(logits + aligned + start + tl.arange(0, BLOCK), first + start, n_read, DTYPE, BLOCK)
        if SOFTCAP:
            z = tl.where((columns >= 0) & (columns < n_read), cap * tanh(z / cap), -float("inf"))
        largest, total, _ = add_block(z, inverse, largest, total, total, False)
    return largest, log_sum_of(largest, tl.sum(total, 0))


@triton.jit
def _shaped(x, cap, SOFTCAP: tl.constexpr):
    return cap * tanh(x / cap) if SOFTCAP else x


@triton.jit
def _weighted(p, x):
    return tl.where(p == 0, 0.0, p * x)  # 0 * inf is 0


@triton.jit
def _log_ratio(z, ref_z, inverse, shift):
    """log p - log q from the difference of the logits, exact where they are close; -inf in both is no difference."""
    return tl.fma(tl.where(z == ref_z, 0.0, z - ref_z), inverse, -shift)


@triton.jit
def _slopes(p, q, x, FORWARD_KL: tl.constexpr):
    """d kl / dz but for a multiple of p that makes their sum 0."""
    return tl.where(tl.abs(x) < 1.0, p * (x - exp_tail(-x)), p - q) if FORWARD_KL else _weighted(p, x)


@triton.jit
def _terms(w, v, x):
    """w (exp(-x) - 1 + x) for w = v exp(x), never negative."""
    return tl.where(tl.abs(x) < 0.35, w * exp_tail(-x), v - w + _weighted(w, x))


@triton.jit
def _forward_kernel(
    logits, ref_logits, mask, temperatures, kl, saved, n_rows, n_columns, origin, inner, stride_outer, stride_inner,
    ref_origin, ref_inner, ref_stride_outer, ref_stride_inner, temperature: tl.float64, softcap: tl.float64,
    TOGETHER: tl.constexpr, FORWARD_KL: tl.constexpr, SOFTCAP: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = kl.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    kept = row >= 0 if mask is None else tl.load(mask + row) != 0
    n_read = tl.where(kept, n_columns, 0)  # a masked row reads nothing
    inverse = inverse_temperature(temperatures, temperature, row, kept, DTYPE)
    cap = tl.full((), softcap, DTYPE)
    aligned, first = row_start(row, origin, inner, stride_outer, stride_inner, ALIGN)
    ref_aligned, ref_first = row_start(row, ref_origin, ref_inner, ref_stride_outer, ref_stride_inner, ALIGN)
    top, log_total = _normaliser(logits, aligned, first, n_read, inverse, cap, DTYPE, SOFTCAP, BLOCK)
    ref_top, ref_log_total = _normaliser(
        ref_logits, ref_aligned, ref_first, n_read, inverse, cap, DTYPE, SOFTCAP, BLOCK
    )
    shift = (top - ref_top) + (log_total - ref_log_total)
    # Where both rows lie alike to 16 bytes, both are loaded by 16 bytes.
    ref_base = ref_aligned if TOGETHER else ref_aligned - ref_first + first
    # Half a block, because two rows and three sums a lane would leave a multiprocessor half the warps.
    HALF: tl.constexpr = BLOCK // 2
    total = tl.zeros((HALF,), DTYPE)
    moment = tl.zeros((HALF,), DTYPE)
    weight = tl.zeros((HALF,), DTYPE)
    for start in range(0, n_read - first, HALF):
        lanes = start + tl.arange(0, HALF)
        z, columns = load_block(logits + aligned + lanes, first + start, n_read, DTYPE, HALF)
        ref_z, _ = load_block(ref_logits + ref_base + lanes, first + start, n_read, DTYPE, HALF)
        z, ref_z = _shaped(z, cap, SOFTCAP), _shaped(ref_z, cap, SOFTCAP)
        x = _log_ratio(z, ref_z, inverse, shift)
        p = exp(tl.fma(z, inverse, -top) - log_total)
        q = exp(tl.fma(ref_z, inverse, -ref_top) - ref_log_total)
        if SOFTCAP:  # a softcap makes -inf finite
            inside = (columns >= 0) & (columns < n_read)
            p, q = tl.where(inside, p, 0.0), tl.where(inside, q, 0.0)
        total += _terms(q, p, -x) if FORWARD_KL else _terms(p, q, x)
        moment += _slopes(p, q, x, FORWARD_KL)
        weight += p
    mean = tl.sum(moment, 0) / tl.sum(weight, 0)
    tl.store(kl + row, tl.where(kept, tl.sum(total, 0), 0.0))
    out = saved + row
    tl.store(out, tl.where(kept, top, 0.0))
    tl.store(out + n_rows, tl.where(kept, log_total, 0.0))
    tl.store(out + 2 * n_rows, tl.where(kept, ref_top, 0.0))
    tl.store(out + 3 * n_rows, tl.where(kept, ref_log_total, 0.0))
    tl.store(out + 4 * n_rows, tl.where(kept, shift, 0.0))
    tl.store(out + 5 * n_rows, tl.where(kept, mean, 0.0))


@triton.jit
def _backward_kernel(
    grad_kl, logits, ref_logits, mask, temperatures, saved, grad, n_rows, n_columns, origin, inner, stride_outer,
    stride_inner, ref_origin, ref_inner, ref_stride_outer, ref_stride_inner, temperature: tl.float64,
    softcap: tl.float64, TOGETHER: tl.constexpr, FORWARD_KL: tl.constexpr, SOFTCAP: tl.constexpr, DENSE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = saved.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    kept = row >= 0 if mask is None else tl.load(mask + row) != 0
    n_read = tl.where(kept, n_columns, 0)
    inverse = inverse_temperature(temperatures, temperature, row, kept, DTYPE)
    cap = tl.full((), softcap, DTYPE)
    aligned, first = row_start(row, origin, inner, stride_outer, stride_inner, ALIGN)
    ref_aligned, ref_first = row_start(row, ref_origin, ref_inner, ref_stride_outer, ref_stride_inner, ALIGN)
    ref_base = ref_aligned if TOGETHER else ref_aligned - ref_first + first
    # Where the logits are as contiguous as the gradient, both rows start at the same distance from a 16-byte boundary.
    row_grad = grad + aligned if DENSE else grad + (row * n_columns + first)
    found = saved + row
    top = tl.load(found, mask=kept, other=0.0)
    log_total = tl.load(found + n_rows, mask=kept, other=0.0)
    ref_top = tl.load(found + 2 * n_rows, mask=kept, other=0.0)
    ref_log_total = tl.load(found + 3 * n_rows, mask=kept, other=0.0)
    shift = tl.load(found + 4 * n_rows, mask=kept, other=0.0)
    mean = tl.load(found + 5 * n_rows, mask=kept, other=0.0)
    upstream = tl.load(grad_kl + row, mask=kept, other=0.0).to(DTYPE) * inverse
    for start in range(0, n_columns - first, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        x, columns = load_block(logits + aligned + lanes, first + start, n_read, DTYPE, BLOCK)
        ref_x, _ = load_block(ref_logits + ref_base + lanes, first + start, n_read, DTYPE, BLOCK)
        z, ref_z = _shaped(x, cap, SOFTCAP), _shaped(ref_x, cap, SOFTCAP)
        ratio = _log_ratio(z, ref_z, inverse, shift)
        p = exp(tl.fma(z, inverse, -top) - log_total)
        q = exp(tl.fma(ref_z, inverse, -ref_top) - ref_log_total) if FORWARD_KL else p
        d = _slopes(p, q, ratio, FORWARD_KL) - p * mean
        d *= upstream
        if SOFTCAP:
            t = z / cap
            d *= 1.0 - t * t
        d = tl.where(kept, d, 0.0).to(grad.dtype.element_ty)
        if (first + start >= 0) & (first + start + BLOCK <= n_columns):
            tl.store(row_grad + lanes, d)
        else:
            tl.store(row_grad + lanes, d, mask=(columns >= 0) & (columns < n_columns))


def _pair(logits: Tensor, ref_logits: Tensor) -> tuple[tuple[Tensor, Tensor], tuple, bool]:
    """(both memories, how the rows of both lie in them, whether they lie alike to 16 bytes)."""
    (memory, rows), (ref_memory, ref_rows) = rows_of(logits), rows_of(ref_logits)
    align = 16 // logits.element_size()
    alike = rows[1] == ref_rows[1] and all((a - b) % align == 0 for a, b in zip(rows, ref_rows))
    return (memory, ref_memory), (*rows, *ref_rows), alike


def logits_kl(
    logits: Tensor,  # (..., V), last stride 1
    ref_logits: Tensor,  # the same
    mask: Tensor | None,  # (...), contiguous, as all below
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    direction: int,
) -> tuple[Tensor, Tensor]:
    shape, dtype = logits.shape[:-1], compute_dtype(logits)
    kl, saved = logits.new_empty(shape, dtype=dtype), logits.new_empty((SAVED, *shape), dtype=dtype)
    if kl.numel():
        memories, rows, alike = _pair(logits, ref_logits)
        launch(
            _forward_kernel, (kl.numel(),), logits,
            *memories, mask, temperatures, kl, saved, kl.numel(), logits.shape[-1], *rows, temperature, softcap or 1.0,
            TOGETHER=alike, FORWARD_KL=direction == 1, SOFTCAP=softcap is not None, **row_meta(logits),
        )  # fmt: skip
    return kl, saved


def logits_kl_backward_into(
    grad: Tensor,  # (..., v) contiguous; holds the logits where none are given
    grad_kl: Tensor,  # (...), any strides
    logits: Tensor | None,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    saved: Tensor,  # (6, ...), any strides
    temperature: float,
    softcap: float | None,
    direction: int,
) -> None:
    logits = grad if logits is None else logits
    if not logits.numel():
        return
    memories, rows, alike = _pair(logits, ref_logits)
    dense = logits.is_contiguous() and not logits.storage_offset()
    launch(
        _backward_kernel, (grad_kl.numel(),), logits,
        prepare(grad_kl), *memories, mask, temperatures, prepare(saved), grad, grad_kl.numel(), logits.shape[-1],
        *rows, temperature, softcap or 1.0,
        TOGETHER=alike, FORWARD_KL=direction == 1, SOFTCAP=softcap is not None, DENSE=dense, **row_meta(logits),
    )  # fmt: skip
