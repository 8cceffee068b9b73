"""What the kernels share: the launch, the checks of direct callers, and small device functions.

Options that are not tensors reach a kernel as float64 (`tl.float64` on the parameter: Triton passes a bare Python float
as float32) and are rounded to the compute dtype there. A limit that is switched off is inf, so that one compiled kernel
serves both.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

INF = float("inf")
LOG2_E = tl.constexpr(math.log2(math.e))


def launch(kernel, grid: tuple[int, ...], like: Tensor, *args, **meta) -> None:
    """Runs a kernel on the device of `like`. Fusion into FMA is pinned: its default differs between Triton versions."""
    with torch.cuda.device_of(like):
        kernel[grid](*args, enable_fp_fusion=True, **meta)


def check_tokens(like: Tensor, **tensors: Tensor | None) -> None:
    """Refuses what the public functions never pass and a pointer would misread: other dtype, shape, device, layout."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dtype = torch.bool if name == "mask" else like.dtype
        same = (tensor.dtype, tensor.shape, tensor.device) == (dtype, like.shape, like.device)
        if not (same and tensor.is_contiguous()):
            expected = f"expected contiguous {dtype} {tuple(like.shape)} on {like.device}"
            got = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            raise ValueError(f"{name}: {expected}, got {got}; the public function prepares it")


def bound(limit: float | None) -> float:
    """A clip or clamp for a kernel: None is no limit."""
    return INF if limit is None else limit


@triton.jit
def sequence_bounds(sequence, cu_seqlens, length, n_tokens):
    """Flat [begin, end) of a sequence, int64: `length` tokens, or from cu_seqlens, clamped to the tokens there are."""
    if cu_seqlens is None:
        begin = tl.minimum(sequence * length, n_tokens)
        end = tl.minimum(begin + length, n_tokens)
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), 0), n_tokens)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), begin), n_tokens)
    return begin, end


@triton.jit
def counted(mask, index, inside):
    """Whether each token counts; nothing is read where `inside` is False."""
    return inside if mask is None else inside & (tl.load(mask + index, mask=inside, other=0) != 0)


@triton.jit
def load_counted(tokens, index, inside, counts):
    """Values of the tokens that count, 0 for the others. All are read, then selected: a mask of data would split the
    16-byte loads."""
    return tl.where(counts, tl.load(tokens + index, mask=inside, other=0.0), 0.0)


@triton.jit
def last_counted(mask, begin, end, BLOCK: tl.constexpr):
    """Position of the last counted token of [begin, end), else begin - 1: searched from the end, block by block."""
    last = begin - 1
    if mask is None:
        last = end - 1
    else:
        stop = end
        while (last < begin) & (stop > begin):
            index = stop - 1 - tl.arange(0, BLOCK)
            last = tl.max(tl.where(counted(mask, index, index >= begin), index, begin - 1), 0)
            stop -= BLOCK
    return last


@triton.jit
def clip(x, low, high):
    """x in [low, high]; NaN stays NaN."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def exp(x):
    """tl.exp; of float32 results below 1e-38 are 0, which spares three instructions of five."""
    return tl.exp2(x * LOG2_E) if x.dtype == tl.float32 else tl.exp(x)


@triton.jit
def exp_tail(x):
    """exp(x) - 1 - x, to the last digits near 0 too: there by its Taylor series, cut below the last digit."""
    if x.dtype == tl.float64:  # by fewer constants, for registers
        series = tl.full(x.shape, 1.0, x.dtype)
        for k in tl.static_range(13, 2, -1):
            series = 1.0 + series * x * (1.0 / k)
    else:
        series = 1.0 / 60 + x * (1.0 / 360 + x * (1.0 / 2520 + x * (1.0 / 20160)))
        series = 1.0 + x * (1.0 / 3 + x * (1.0 / 12 + x * series))
    return tl.where(tl.abs(x) < 0.35, 0.5 * x * x * series, exp(x) - 1.0 - x)


@triton.jit
def kl_value(x, KIND: tl.constexpr):
    """k1, abs, k2, k3 at x = logprobs - ref_logprobs."""
    if KIND == 0:
        value = x
    elif KIND == 1:
        value = tl.abs(x)
    elif KIND == 2:
        value = 0.5 * x * x
    else:
        value = exp_tail(-x)
    return value
