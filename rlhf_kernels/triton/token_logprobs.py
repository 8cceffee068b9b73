"""token_logprobs on GPUs: one program a row, one read of the logits forward, one read and one write backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import compute_dtype, prepare
from ._common import launch


@triton.jit
def _tanh(u):
    """tanh to a few units in the last place: a Padé approximant below 0.6, where 1 - exp(-2|u|) cancels, or by exp."""
    s = u * u
    e = tl.exp(-2.0 * tl.abs(u))
    small = tl.abs(u) < 0.6
    numerator = tl.where(small, u * (135135.0 + s * (17325.0 + s * (378.0 + s))), tl.where(u < 0, e - 1.0, 1.0 - e))
    return numerator / tl.where(small, 135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)), 1.0 + e)


@triton.jit
def _row_start(row, origin, inner, stride_outer, stride_inner, ALIGN: tl.constexpr):
    """(offset of the row rounded down to 16 bytes, the column that stands there: 0, or negative before the row)."""
    offset = origin + (row // inner) * stride_outer + (row % inner) * stride_inner
    aligned = offset // ALIGN * ALIGN
    return aligned, (aligned - offset).to(tl.int32)


@triton.jit
def _load(pointers, column, n_columns, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """(a block of a row from an aligned position with -inf outside [0, n_columns), its columns). A whole block is not
    masked: a mask whose edge is not aligned would split the 16-byte loads."""
    columns = column + tl.arange(0, BLOCK)
    if (column >= 0) & (column + BLOCK <= n_columns):
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(columns >= 0) & (columns < n_columns), other=-float("inf"))
    return x.to(DTYPE), columns


@triton.jit
def _token(ids, row, n_columns, ignore_index):
    """(id, whether the row is not ignored, whether the id is out of range)."""
    token = tl.load(ids + row).to(tl.int64)
    kept = token != ignore_index
    return token, kept, kept & ((token < 0) | (token >= n_columns))


@triton.jit
def _inverse_temperature(temperatures, temperature, row, kept, DTYPE: tl.constexpr):
    if temperatures is None:
        value = tl.full((), temperature, tl.float64)
    else:
        value = tl.load(temperatures + row, mask=kept, other=1.0).to(tl.float64)
    return (1.0 / value).to(DTYPE)


@triton.jit
def _forward_kernel(
    logits, ids, temperatures, logprobs, entropy, row_max, log_sum, n_columns, origin, inner, stride_outer,
    stride_inner, ignore_index, temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    token, kept, bad = _token(ids, row, n_columns, ignore_index)
    inverse = _inverse_temperature(temperatures, temperature, row, kept, DTYPE)
    cap = tl.full((), softcap, DTYPE)
    aligned, first = _row_start(row, origin, inner, stride_outer, stride_inner, ALIGN)
    # One maximum for the block, so that an iteration has one reduction; a lane keeps its own sums until the end.
    largest = tl.full((), -float("inf"), DTYPE)
    total = tl.zeros((BLOCK,), DTYPE)  # sum exp(z - largest)
    weighted = tl.zeros((BLOCK,), DTYPE)  # sum exp(z - largest) (z - largest)
    for start in range(0, tl.where(kept, n_columns - first, 0), BLOCK):
        z, columns = _load(logits + aligned + start + tl.arange(0, BLOCK), first + start, n_columns, DTYPE, BLOCK)
        if SOFTCAP:
            z = tl.where((columns >= 0) & (columns < n_columns), cap * _tanh(z / cap), -float("inf"))
        new = tl.maximum(largest, tl.max(z, 0) * inverse)
        shift = tl.where(new == -float("inf"), 0.0, new)
        rescale = tl.exp(largest - shift)
        # The product is exact inside the FMA: z / temperature is never rounded, and an offset of 1e4 costs no digit.
        d = tl.fma(z, inverse, -shift)
        weight = tl.exp(d)
        if ENTROPY:
            moved = tl.where(largest == -float("inf"), 0.0, largest - shift)
            # exp(-1e4) is 0 in every dtype: the bound keeps 0 * -inf away.
            weighted = (weighted + total * moved) * rescale + weight * tl.maximum(d, -1e4)
        total = total * rescale + weight
        largest = new
    sums = tl.sum(total, 0)
    log_total = tl.where(largest == -float("inf"), float("nan"), tl.log(sums))
    z = tl.load(logits + aligned - first + tl.where(kept & (bad == 0), token, 0)).to(DTYPE)
    if SOFTCAP:
        z = cap * _tanh(z / cap)
    logprob = tl.fma(z, inverse, -largest) - log_total
    logprob = tl.where(bad, float("nan"), tl.where(logprob > 0, 0.0, logprob))
    tl.store(logprobs + row, tl.where(kept, logprob, 0.0))
    tl.store(row_max + row, tl.where(kept, largest, 0.0))
    tl.store(log_sum + row, tl.where(kept, log_total, 0.0))
    if ENTROPY:
        tl.store(entropy + row, tl.where(kept, log_total - tl.sum(weighted, 0) / sums, 0.0))


@triton.jit
def _backward_kernel(
    grad_logprobs, grad_entropy, logits, ids, temperatures, entropy, row_max, log_sum, grad, n_columns, origin, inner,
    stride_outer, stride_inner, ignore_index, first_id, temperature: tl.float64, softcap: tl.float64,
    WHOLE: tl.constexpr, SOFTCAP: tl.constexpr, DENSE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = row_max.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    token, kept, bad = _token(ids, row, n_columns, ignore_index)
    if not WHOLE:  # ids of other columns are no error; one that is has made log_sum NaN
        token -= first_id
        bad = kept & (row < 0)
    inverse = _inverse_temperature(temperatures, temperature, row, kept, DTYPE)
    cap = tl.full((), softcap, DTYPE)
    aligned, first = _row_start(row, origin, inner, stride_outer, stride_inner, ALIGN)
    # Where the logits are as contiguous as the gradient, both rows start at the same distance from a 16-byte boundary.
    row_grad = grad + aligned if DENSE else grad + (row * n_columns + first)
    # An ignored row reads nothing: its logits and what was saved of them may be NaN, and its gradient is 0.
    n_read = tl.where(kept, n_columns, 0)
    shift = tl.load(row_max + row, mask=kept, other=0.0)
    # An id out of range makes its row NaN, through the probabilities.
    log_total = tl.where(bad, float("nan"), tl.load(log_sum + row, mask=kept, other=0.0))
    if grad_logprobs is not None:
        by_logprob = tl.load(grad_logprobs + row, mask=kept, other=0.0).to(DTYPE) * inverse
    if grad_entropy is not None:
        row_entropy = tl.load(entropy + row, mask=kept, other=0.0)
        by_entropy = tl.load(grad_entropy + row, mask=kept, other=0.0).to(DTYPE) * inverse
    for start in range(0, n_columns - first, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        x, columns = _load(logits + aligned + lanes, first + start, n_read, DTYPE, BLOCK)
        z = x
        if SOFTCAP:
            t = _tanh(x / cap)
            z = cap * t
        logp = tl.fma(z, inverse, -shift) - log_total
        p = tl.exp(logp)
        d = tl.zeros((BLOCK,), DTYPE)
        if grad_logprobs is not None:
            d = by_logprob * (tl.where(columns == token, 1.0, 0.0) - p)
        if grad_entropy is not None:
            d -= by_entropy * (p * tl.maximum(logp + row_entropy, -1e4))
        if SOFTCAP:
            d *= 1.0 - t * t
        # A logit of -inf gets 0; NaN, of a row that is -inf alone or has a bad id, stays.
        d = tl.where((x == -float("inf")) & (d == d), 0.0, d).to(grad.dtype.element_ty)
        if (first + start >= 0) & (first + start + BLOCK <= n_columns):
            tl.store(row_grad + lanes, d)
        else:
            tl.store(row_grad + lanes, d, mask=(columns >= 0) & (columns < n_columns))


def _rows(logits: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
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
        return _rows(logits.contiguous())
    (_, outer), (inner, stride) = [(1, 0), (1, 0), *dims][-2:]
    return logits.as_strided((1,), (1,), 0), (logits.storage_offset(), inner, outer, stride)


def _meta(logits: Tensor) -> dict[str, int]:
    """16 elements a thread are two 16-byte loads in flight in 16-bit dtypes; float64 has 4, for its registers."""
    largest, lanes = (1024, 4) if logits.dtype == torch.float64 else (4096, 16)
    block = min(max(triton.next_power_of_2(logits.shape[-1]), 32 * lanes), largest)
    return {"ALIGN": 16 // logits.element_size(), "BLOCK": block, "num_warps": block // (32 * lanes)}


def token_logprobs(
    logits: Tensor,  # (..., V), last stride 1
    token_ids: Tensor,  # (...), contiguous, as all below
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits)
    logprobs, row_max, log_sum = (logits.new_empty(token_ids.shape, dtype=dtype) for _ in range(3))
    entropy = logits.new_empty(token_ids.shape if return_entropy else (0,), dtype=dtype)
    if token_ids.numel():
        memory, rows = _rows(logits)
        tokens = map(prepare, (token_ids, temperatures))
        launch(
            _forward_kernel, (token_ids.numel(),), logits,
            memory, *tokens, logprobs, entropy, row_max, log_sum, logits.shape[-1], *rows, ignore_index, temperature,
            softcap or 1.0, SOFTCAP=softcap is not None, ENTROPY=return_entropy, **_meta(logits),
        )  # fmt: skip
    return logprobs, entropy, row_max, log_sum


def token_logprobs_backward(
    grad_logprobs: Tensor | None,  # (...), any strides, as grad_entropy
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    temperatures: Tensor | None,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    saved = (token_ids, temperatures, entropy, row_max, log_sum)
    _backward(grad, grad_logprobs, grad_entropy, logits, *saved, temperature, softcap, ignore_index, None)
    return grad


def token_logprobs_backward_into(
    grad: Tensor,  # (..., v) contiguous; holds the logits where none are given
    grad_logprobs: Tensor | None,  # (...), any strides, as grad_entropy
    grad_entropy: Tensor | None,
    logits: Tensor | None,
    *rest,
) -> None:
    _backward(grad, grad_logprobs, grad_entropy, grad if logits is None else logits, *rest)


def _backward(
    grad, grad_logprobs, grad_entropy, logits, token_ids, temperatures, entropy, row_max, log_sum, temperature,
    softcap, ignore_index, first_id,
) -> None:  # fmt: skip
    """first_id None: the logits are whole rows, and an id outside them is an error."""
    if not logits.numel():
        return
    memory, rows = _rows(logits)
    upstream, tokens = map(prepare, (grad_logprobs, grad_entropy)), map(prepare, (token_ids, temperatures))
    dense = logits.is_contiguous() and not logits.storage_offset()
    launch(
        _backward_kernel, (token_ids.numel(),), logits,
        *upstream, memory, *tokens, entropy, row_max, log_sum, grad, logits.shape[-1], *rows,
        ignore_index, first_id or 0, temperature, softcap or 1.0,
        WHOLE=first_id is None, SOFTCAP=softcap is not None, DENSE=dense, **_meta(logits),
    )  # fmt: skip
