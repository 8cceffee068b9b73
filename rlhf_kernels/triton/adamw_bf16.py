"""AdamW on bfloat16 with stochastic rounding on GPUs: one launch, two where the size is no multiple of 16.

Rounding is done on the bits, which are stored as they are. At most PROGRAMS programs, so that the float64 powers of the
bias corrections and the key of the random bits are worked out once for several blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.adamw_bf16 import mix64, signed
from ._common import check_tokens, launch

BLOCK, PROGRAMS = 1024, 2048
ALIGNED = 16  # 16-byte loads under a mask need a size that is a multiple of so many elements


@triton.jit
def _mix64(z):
    """One step of splitmix64 on uint64."""
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _random_bits(low, key):
    """16 random bits for each of param, exp_avg and exp_avg_sq; low is the position modulo 2^32, uint32."""
    x = low + key.to(tl.uint32)
    x = (x ^ (x >> 17)) * 0xED5AD4BB + (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    x = x ^ (x >> 14)
    return x >> 16, x & 0xFFFF, ((x >> 16) + x) & 0xFFFF


@triton.jit
def _store_rounded(out, index, inside, x, bits):
    """x + bits, cut to bfloat16. inf has no low half to carry into; NaN is kept from carrying."""
    rounded = (x.to(tl.uint32, bitcast=True) + bits) >> 16
    rounded = tl.where(x == x, rounded, 0x7FC0)
    tl.store(out + index, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)


@triton.jit
def _power(base, exponent):
    """base^exponent in float64 by products alone, which are the same on every device."""
    result, square = tl.full((), 1.0, tl.float64), tl.full((), base, tl.float64)
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * square, result)
        square = square * square
        exponent = exponent // 2
    return result


@triton.jit(do_not_specialize=["key", "first"], do_not_specialize_on_alignment=["key", "first"])
def _adamw_kernel(
    param, grad, exp_avg, exp_avg_sq, step, found_inf, grad_scale, n, key: tl.int64, first: tl.int64,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, decay, exp_avg_rate, exp_avg_sq_kept, exp_avg_sq_rate, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """n elements, the first at the position `first`; key is that of the seed. The options that end the list are float32
    in the kernel, as Triton passes floats."""
    count = tl.load(step).to(tl.int64)
    step_size = (lr / (1.0 - _power(beta1, count))).to(tl.float32)
    root_scale = (1.0 / tl.sqrt(1.0 - _power(beta2, count))).to(tl.float32)
    key = _mix64((key.to(tl.int64) + count).to(tl.uint64))
    stop = n if found_inf is None else tl.where(tl.load(found_inf) != 0, 0, n)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, stop, tl.num_programs(0) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < n
        g = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
        if grad_scale is not None:
            g *= 1.0 / tl.load(grad_scale)
        m = tl.load(exp_avg + index, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + index, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(param + index, mask=inside, other=0.0).to(tl.float32)
        m = m + (g - m) * exp_avg_rate
        v = v * exp_avg_sq_kept + (g * g) * exp_avg_sq_rate
        p = p * decay - step_size * (m / (tl.sqrt(v) * root_scale + eps))
        position = (start + first).to(tl.uint64)
        low = position.to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
        p_bits, m_bits, v_bits = _random_bits(low, _mix64(key + (position >> 32)))
        _store_rounded(param, index, inside, p, p_bits)
        _store_rounded(exp_avg, index, inside, m, m_bits)
        _store_rounded(exp_avg_sq, index, inside, v, v_bits)


def _check(param: Tensor, grad: Tensor, scalars: dict[str, Tensor | None]) -> None:
    """What check_tokens does not know: the dtypes of this op, and scalars beside the elements."""
    if param.dtype != torch.bfloat16:
        raise ValueError(f"param: expected {torch.bfloat16}, got {param.dtype}; the public function refuses it")
    same = (grad.shape, grad.device) == (param.shape, param.device) and grad.is_contiguous()
    if grad.dtype not in (torch.bfloat16, torch.float32) or not same:
        expected = f"expected contiguous {torch.bfloat16} or {torch.float32} {tuple(param.shape)} on {param.device}"
        got = f"{grad.dtype} {tuple(grad.shape)} with strides {grad.stride()} on {grad.device}"
        raise ValueError(f"grad: {expected}, got {got}; the public function prepares it")
    for name, value in scalars.items():
        if value is not None and (value.dtype, value.dim(), value.device) != (torch.float32, 0, param.device):
            expected, got = f"{torch.float32} () on {param.device}", f"{value.dtype} {tuple(value.shape)}"
            raise ValueError(f"{name}: expected {expected}, got {got} on {value.device}")


def adamw_bf16(
    param: Tensor,  # any shape, bfloat16, contiguous
    grad: Tensor,  # the same, bfloat16 or float32
    exp_avg: Tensor,  # as param
    exp_avg_sq: Tensor,
    step: Tensor,  # () float32
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    seed: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    check_tokens(param, param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check(param, grad, {"step": step, "found_inf": found_inf, "grad_scale": grad_scale})
    flat = [x.view(-1) for x in (param, grad, exp_avg, exp_avg_sq)]
    key = signed(mix64(seed % 2**64))
    options = (lr, beta1, beta2, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps)
    n = param.numel()
    whole = n - n % ALIGNED
    for first, count in ((0, whole), (whole, n - whole)):
        if count:
            launch(
                _adamw_kernel, (min(triton.cdiv(count, BLOCK), PROGRAMS),), param,
                *(x[first:] for x in flat), step, found_inf, grad_scale, count, key, first, *options, BLOCK=BLOCK,
            )  # fmt: skip
