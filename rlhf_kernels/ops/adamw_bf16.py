"""AdamW on bfloat16 weights and moments, in place, stochastically rounded: 8 bytes a parameter, its gradient included.

    g     = grad / grad_scale
    p     = param (1 - lr weight_decay)
    m     = exp_avg + (1 - beta1) (g - exp_avg)
    v     = beta2 exp_avg_sq + (1 - beta2) g^2
    p     = p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
    param, exp_avg, exp_avg_sq = round(p), round(m), round(v)

All of it in float32; the update sees m and v before they are rounded. `round` adds 16 random bits to the half of a
float32 that bfloat16 lacks and cuts it off, so that E[round(x)] = x; bfloat16 values, inf and NaN stay what they are.
Rounded to nearest, a weight ignores updates below half a unit in its last place, 1/512 to 1/256 of it, and a second
moment that loses 1/1000 a step never falls.

The random bits are a hash of seed, step and the element's position, and of nothing else: the same on every backend, for
any number of threads and after a resume. An element draws 32 bits, the halves for two tensors and their sum for the
third: any two of the three are independent. With one multiplication less (lowbias32) bits of elements a power of two
apart correlate, by 40 standard errors over 2^20 of them. Sources: Loshchilov and Hutter, arXiv 1711.05101 (AdamW);
Steele, Lea and Flood 2014 (splitmix64, for keys); Wellons' triple32, with half of the key after its first product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import call, define, invalid

# step, found_inf and grad_scale are () float32 on the device; seed is 64 bits, signed as schemas have them.
SCHEMA = (
    "adamw_bf16_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor step, "
    "Tensor? found_inf, Tensor? grad_scale, int seed, float lr, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()"
)
LAST_STEP = 2**24  # from where float32 counts no further
PART = 2**31  # elements that one int32 counts


def mix64(z: int) -> int:
    """One step of splitmix64 from the state z: all 64 bits depend on all 64."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def signed(word: int, bits: int = 64) -> int:
    """The signed integer of the same bits: what schemas and torch's integer tensors carry."""
    word %= 2**bits
    return word - 2**bits if word >> (bits - 1) else word


def _shift(x: Tensor, by: int) -> Tensor:
    """x >> by of unsigned integers; torch's are signed."""
    return (x >> by) & ((1 << (8 * x.dtype.itemsize - by)) - 1)


def _mix64(z: Tensor) -> Tensor:
    z = z + signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def random_bits(
    seed: int,
    step: Tensor,  # ()
    first: int,  # position of the first element
    n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """16 random bits of n elements for each of param, exp_avg and exp_avg_sq, int32; [first, first + n) crosses no
    multiple of 2^32."""
    key = _mix64(_mix64(step.long() + signed(mix64(seed))) + (first >> 32))
    x = torch.arange(n, dtype=torch.int32, device=step.device) + signed(first, 32) + key.to(torch.int32)
    x = (x ^ _shift(x, 17)) * signed(0xED5AD4BB, 32) + _shift(key, 32).to(torch.int32)
    x = (x ^ _shift(x, 11)) * signed(0xAC4C1B51, 32)
    x = (x ^ _shift(x, 15)) * 0x31848BAB
    x = x ^ _shift(x, 14)
    high, low = _shift(x, 16), x & 0xFFFF
    return high, low, (high + low) & 0xFFFF


def round_stochastically(
    x: Tensor,  # float32
    bits: Tensor,  # int32, 16 random bits
) -> Tensor:
    rounded = ((x.view(torch.int32) + bits) & ~0xFFFF).view(torch.float32)
    return torch.where(x == x, rounded, x).bfloat16()


def updated(
    param: Tensor,  # float32, as all tensors here
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,  # ()
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """param, exp_avg and exp_avg_sq after the step, not rounded. What elements share is computed in float64."""
    count = step.double()
    step_size = (lr / (1 - beta1**count)).to(param.dtype)
    root_scale = (1 / (1 - beta2**count).sqrt()).to(param.dtype)
    if grad_scale is not None:
        grad = grad * (1 / grad_scale)
    exp_avg = exp_avg + (grad - exp_avg) * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + (grad * grad) * (1 - beta2)
    param = param * (1 - lr * weight_decay) - step_size * (exp_avg / (exp_avg_sq.sqrt() * root_scale + eps))
    return param, exp_avg, exp_avg_sq


def _check_count(step: Tensor, found_inf: Tensor | None) -> None:
    """Refuses a count below 1, at which no bias is corrected; on the CPU only, where looking is free."""
    if step.device.type == "cpu" and not (found_inf is not None and bool(found_inf != 0)) and not bool(step >= 1):
        raise invalid(f"step: expected a count of at least 1, this step included, got {float(step):g}; add 1 before")


def adamw_bf16_reference(
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
    _check_count(step, found_inf)
    flat = [x.view(-1) for x in (param, grad, exp_avg, exp_avg_sq)]
    for first in range(0, param.numel(), PART):
        p, g, m, v = (x[first : first + PART] for x in flat)
        exact = updated(
            *(x.float() for x in (p, g, m, v)), step, grad_scale, lr, beta1, beta2, eps, weight_decay
        )  # fmt: skip
        for old, new, bits in zip((p, m, v), exact, random_bits(seed, step, first, p.numel())):
            new = round_stochastically(new, bits)
            old.copy_(new if found_inf is None else torch.where(found_inf != 0, old, new))


def _fake(*_):
    return None


adamw_bf16_op = define(SCHEMA, adamw_bf16_reference, _fake)


def _check_in_place(name: str, value: Tensor, param: Tensor) -> None:
    check.is_tensor(name, value)
    if value.dtype != torch.bfloat16:
        raise TypeError(
            f"{name}: expected bfloat16, got {value.dtype}; torch.optim.AdamW(fused=True) serves the others"
        )
    check.same_shape(name, value, "param", param.shape)
    check.same_device(name, value, "param", param)
    if not value.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, because it is updated in place, got strides {value.stride()}; "
            "create it with .contiguous()"
        )


def _check_scalar(name: str, value: Tensor | None, param: Tensor) -> None:
    if value is None:
        return
    check.is_tensor(name, value)
    if value.dtype != torch.float32 or value.dim():
        raise TypeError(
            f"{name}: expected a float32 tensor of shape (), got {value.dtype} {tuple(value.shape)}; "
            "convert it with .float().reshape(())"
        )
    check.same_device(name, value, "param", param)


def _count(step: Tensor | int, param: Tensor) -> Tensor:
    if not isinstance(step, Tensor):
        if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= LAST_STEP:
            raise ValueError(
                f"step: expected an int in [1, {LAST_STEP}], this step included, or a float32 tensor of shape (), "
                f"got {step!r}"
            )
        return torch.full((), float(step), dtype=torch.float32, device=param.device)
    _check_scalar("step", step, param)
    return step


def adamw_bf16_(
    param: Tensor,  # any shape, bfloat16, contiguous
    grad: Tensor,  # the same shape, bfloat16 or float32
    exp_avg: Tensor,  # as param
    exp_avg_sq: Tensor,  # as param
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: Tensor | int,  # the count, this step included: an int, or () float32 on the device
    seed: int,  # in [0, 2^64); another one for every parameter
    found_inf: Tensor | None = None,  # () float32: where it is not 0, nothing is changed
    grad_scale: Tensor | None = None,  # () float32: what the loss was multiplied by
) -> None:
    """One AdamW step in place on param, exp_avg and exp_avg_sq, stochastically rounded. Nothing waits for the device.

    The random bits are the same on every backend, float32 arithmetic but for FMA and the last bits of a GPU's division
    and square root: where these carry a value over its random threshold, in an element of some ten thousand, backends
    differ by a unit in the last place of bfloat16 (a first moment whose terms cancel by 2^-24 of them). One backend
    repeats bit for bit.

    Not differentiable; autograd is told that the tensors changed. grad is only read. Raises TypeError or ValueError for
    wrong dtypes, shapes, layouts, devices and options; a count below 1 in a tensor raises on the CPU and gives inf or
    NaN on a GPU. `AdamWBF16` is the optimizer.
    """
    for name, value in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_in_place(name, value, param)
    check.like("grad", grad, "param", param)
    if grad is None or grad.dtype not in (torch.bfloat16, torch.float32):
        got = "None" if grad is None else f"{grad.dtype}; convert it with .float()"
        raise TypeError(f"grad: expected bfloat16 or float32, got {got}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        check.number(name, value, 0)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        check.number(name, value, 0, below=1)
    check.number("eps", eps, above=0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an int in [0, 2^64), got {seed!r}")
    step = _count(step, param)
    for name, value in (("found_inf", found_inf), ("grad_scale", grad_scale)):
        _check_scalar(name, value, param)
    changed = [x.detach() for x in (param, exp_avg, exp_avg_sq)]
    options = (signed(seed), float(lr), float(beta1), float(beta2), float(eps), float(weight_decay))
    call(adamw_bf16_op, changed[0], grad.detach().contiguous(), *changed[1:], step, found_inf, grad_scale, *options)
    if not torch.compiler.is_compiling():  # the compiler sees the change in the schema
        torch.autograd.graph.increment_version(changed)
