"""Cases of adamw_bf16_. The op works in place, so a case gives it copies and takes those for the results."""

from __future__ import annotations

from functools import partial

import torch

from ..ops.adamw_bf16 import adamw_bf16_
from ..testing import OpCase

OPTIONS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 7}
ROUNDING = 2.0**-8  # beside the half a unit that the battery allows bfloat16: rounded up or down, not to nearest


def _inputs(generator, shape):
    def new(scale):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    return {"param": new(0.02), "grad": new(1e-2), "exp_avg": new(1e-2), "exp_avg_sq": new(1e-2) ** 2}


def _call(param, grad, exp_avg, exp_avg_sq, grad_dtype, scale, **options):
    param, exp_avg, exp_avg_sq = (
        x.detach().bfloat16().contiguous().clone() for x in (param, exp_avg, exp_avg_sq)
    )  # fmt: skip
    grad = grad.bfloat16().to(grad_dtype) if scale is None else (grad.bfloat16() * scale).to(grad_dtype)
    scalars = {} if scale is None else {"grad_scale": torch.full((), scale, device=param.device)}
    if scale is not None:
        scalars["found_inf"] = torch.zeros((), device=param.device)
    adamw_bf16_(param, grad, exp_avg, exp_avg_sq, seed=3, **scalars, **options)
    return param, exp_avg, exp_avg_sq


def _oracle(param, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step):
    """As torch.optim.AdamW documents it, without rounding."""
    half = param.dtype in (torch.bfloat16, torch.float16)
    param, grad, exp_avg, exp_avg_sq = (x.float() if half else x for x in (param, grad, exp_avg, exp_avg_sq))
    param = param - lr * weight_decay * param
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad**2
    mean, square = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    return param - lr * mean / (square.sqrt() + eps), exp_avg, exp_avg_sq


def _case(name, shape=(5, 37), grad_dtype=torch.bfloat16, scale=None, values_only=True, **changed) -> OpCase:
    options = {**OPTIONS, **changed}
    return OpCase(
        "adamw_bf16_", name, partial(_inputs, shape=shape),
        partial(_call, grad_dtype=grad_dtype, scale=scale, **options), partial(_oracle, **options),
        dtypes=(torch.bfloat16,), tolerance=ROUNDING, values_only=values_only,
    )  # fmt: skip


ADAMW_BF16 = [
    _case("bf16_grad", values_only=False),
    _case("fp32_grad", grad_dtype=torch.float32, values_only=False),
    _case("scaled", scale=1024.0, values_only=False),
    _case("scaled_fp32_grad", scale=4.0, grad_dtype=torch.float32),
    _case("decay", weight_decay=0.1, lr=0.05),
    _case("first_step", step=1),
    _case("late", step=2**24, beta2=0.999),
    _case("momentless", beta1=0.0, beta2=0.0),
    _case("large_eps", eps=0.1),
    _case("empty", shape=(0, 3)),
    _case("scalar", shape=()),
    _case("one", shape=(1,)),
    _case("seven", shape=(7,)),
    _case("aligned", shape=(64, 32)),
    _case("many", shape=(3, 12001)),
]
