"""kto_loss, its statistics and gradient. Small vectors: what counts is the number of ops."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .case import Case, Inputs, Outputs, Provider, compiled, with_backward

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES = (1024,), (8,)
BETA, KL = 0.1, 0.5


def eager(logps: Tensor, ref_logps: Tensor, labels: Tensor) -> Outputs:
    ratios = logps - ref_logps
    losses = torch.where(labels, 1 - torch.sigmoid(BETA * (ratios - KL)), 1 - torch.sigmoid(BETA * (KL - ratios)))
    return {"loss": losses.mean()}


def ours(logps: Tensor, ref_logps: Tensor, labels: Tensor) -> Outputs:
    return {"loss": rlhf_kernels.kto_loss(logps, ref_logps, labels, KL, beta=BETA)[0]}


def _inputs(count: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    reference, change, sign = torch.randn(3, count, dtype=dtype, device=device, generator=generator)
    reference = -100 + 10 * reference
    return {"logps": reference + 5 * change, "ref_logps": reference, "labels": sign > 0}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    wrap = partial(with_backward, wrt=("logps",), through=("loss",))
    for count in QUICK_SIZES if quick else SIZES:
        yield Case(
            "kto_loss", "forward+backward", {"sequences": count}, dtype,
            inputs=partial(_inputs, count, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.kto_loss, with its statistics", wrap(ours)),
                "eager": Provider("the bare loss", wrap(eager)),
                "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
            },
            bytes_moved=count * (3 * dtype.itemsize + 1),
        )  # fmt: skip
