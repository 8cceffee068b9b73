"""token_logprobs on GPUs: one program a row, one read of the logits forward, one read and one write backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import compute_dtype, prepare
from ._common import exp, launch
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
def _token(ids, row, n_columns, ignore_index):
    """(id, whether the row is not ignored, whether the id is out of range)."""
    token = tl.load(ids + row).to(tl.int64)
    kept = token != ignore_index
    return token, kept, kept & ((token < 0) | (token >= n_columns))


@triton.jit
def _forward_kernel(
    logits, ids, temperatures, logprobs, entropy, row_max, log_sum, n_columns, origin, inner, stride_outer,
    stride_inner, ignore_index, temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    token, kept, bad = _token(ids, row, n_columns, ignore_index)
    inverse = inverse_temperature(temperatures, temperature, row, kept, DTYPE)
    cap = tl.full((), softcap, DTYPE)
    aligned, first = row_start(row, origin, inner, stride_outer, stride_inner, ALIGN)
    largest = tl.full((), -float("inf"), DTYPE)
    total, weighted = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for start in range(0, tl.where(kept, n_columns - first, 0), BLOCK):
        z, columns = load_block(logits + aligned + start + tl.arange(0, BLOCK), first + start, n_columns, DTYPE, BLOCK)
        if SOFTCAP:
            z = tl.where((columns >= 0) & (columns < n_columns), cap * tanh(z / cap), -float("inf"))
        largest, total, weighted = add_block(z, inverse, largest, total, weighted, ENTROPY)
    sums = tl.sum(total, 0)
    log_total = log_sum_of(largest, sums)
    z = tl.load(logits + aligned - first + tl.where(kept & (bad == 0), token, 0)).to(DTYPE)
    if SOFTCAP:
        z = cap * tanh(z / cap)
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
    inverse = inverse_temperature(temperatures, temperature, row, kept, DTYPE)
    cap = tl.full((), softcap, DTYPE)
    aligned, first = row_start(row, origin, inner, stride_outer, stride_inner, ALIGN)
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
        x, columns = load_block(logits + aligned + lanes, first + start, n_read, DTYPE, BLOCK)
        z = x
        if SOFTCAP:
            t = tanh(x / cap)
            z = cap * t
        logp = tl.fma(z, inverse, -shift) - log_total
        p = exp(logp)
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
        memory, rows = rows_of(logits)
        tokens = map(prepare, (token_ids, temperatures))
        launch(
            _forward_kernel, (token_ids.numel(),), logits,
            memory, *tokens, logprobs, entropy, row_max, log_sum, logits.shape[-1], *rows, ignore_index, temperature,
            softcap or 1.0, SOFTCAP=softcap is not None, ENTROPY=return_entropy, **row_meta(logits),
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
    memory, rows = rows_of(logits)
    upstream, tokens = map(prepare, (grad_logprobs, grad_entropy)), map(prepare, (token_ids, temperatures))
    dense = logits.is_contiguous() and not logits.storage_offset()
    launch(
        _backward_kernel, (token_ids.numel(),), logits,
        *upstream, memory, *tokens, entropy, row_max, log_sum, grad, logits.shape[-1], *rows,
        ignore_index, first_id or 0, temperature, softcap or 1.0,
        WHOLE=first_id is None, SOFTCAP=softcap is not None, DENSE=dense, **row_meta(logits),
    )  # fmt: skip
