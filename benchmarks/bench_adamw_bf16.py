"""adamw_bf16_: one optimizer step of bfloat16 weights and moments. The dtype of a case is its gradient's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import rlhf_kernels
from rlhf_kernels.ops.adamw_bf16 import random_bits, round_stochastically

from .case import Case, Inputs, Outputs, Provider, compiled

DTYPES = ("float32", "bfloat16")
HALF_ON_CUDA = True
SIZES, QUICK_SIZES, GPU_SIZES = (2**24,), (1000,), (2**28,)
LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 3e-6, 0.9, 0.999, 1e-8, 0.01
STEP, SEED = 100, 1
RELATIVE_ERROR = 2**-7  # a result may be rounded up or down: by less than a unit in the last place


def eager(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """The formula in float32, rounded with the same random bits; float64 stays exact."""
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    p, g, m, v = (x.to(dtype) for x in (param, grad, exp_avg, exp_avg_sq))
    m = m + (g - m) * (1 - BETA1)
    v = v * BETA2 + g * g * (1 - BETA2)
    p = p * (1 - LR * WEIGHT_DECAY) - LR / (1 - BETA1**STEP) * m / ((v / (1 - BETA2**STEP)).sqrt() + EPS)
    states = param, exp_avg, exp_avg_sq
    if dtype == torch.float64:
        for old, new in zip(states, (p, m, v)):
            old.copy_(new)
        return
    step = torch.full((), STEP, device=param.device)
    for old, new, bits in zip(states, (p, m, v), random_bits(SEED, step, 0, param.numel())):
        old.copy_(round_stochastically(new, bits))


def ours(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    options = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    rlhf_kernels.adamw_bf16_(param, grad, exp_avg, exp_avg_sq, step=STEP, seed=SEED, **options)


def fused_fp32(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    step = torch.full((), STEP - 1.0, device=param.device)  # which it counts itself
    options = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    lists = ([x] for x in (param, grad, exp_avg, exp_avg_sq))
    adamw(*lists, [], [step], fused=True, amsgrad=False, maximize=False, **options)


def in_place(step: Callable[..., None], dtype: torch.dtype | None = None) -> Callable[..., Outputs]:
    """The step on copies of its own, which the first call makes and is judged by: no provider sees another's."""
    kept: dict[torch.dtype, tuple[Tensor, Inputs]] = {}  # and whose copies they are

    def run(**inputs: Tensor) -> Outputs:
        param = inputs["param"]  # the truth comes in float64
        if param.dtype not in kept or kept[param.dtype][0] is not param:
            copies = {name: x.clone() if dtype is None else x.to(dtype) for name, x in inputs.items()}
            kept[param.dtype] = param, copies
        copies = kept[param.dtype][1]
        step(**copies)
        return {name: x for name, x in copies.items() if name != "grad"}

    return run


def _inputs(n: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    new = partial(torch.randn, n, device=device, generator=generator)
    states = {"param": 0.02 * new(), "exp_avg": 1e-3 * new(), "exp_avg_sq": (1e-3 * new()) ** 2}
    return {**{name: x.bfloat16() for name, x in states.items()}, "grad": (1e-3 * new()).bfloat16().to(dtype)}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for n in QUICK_SIZES if quick else GPU_SIZES if device.type == "cuda" else SIZES:
        yield Case(
            "adamw_bf16_", "forward", {"weights": n}, dtype, partial(_inputs, n, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.adamw_bf16_", in_place(ours)),
                "eager": Provider("the formula in plain torch", in_place(eager)),
                "compile": Provider("torch.compile of eager", in_place(compiled(eager))),
                "fused_fp32": Provider("torch's fused AdamW, all in float32", in_place(fused_fp32, torch.float32)),
            },
            # Three states in bfloat16 in and out, the gradient in; fused_fp32 moves 28 bytes an element.
            bytes_moved=n * (6 * 2 + dtype.itemsize),
        )  # fmt: skip
