"""dpo_loss, sigmoid, with its statistics and gradients. Small vectors: what counts is the number of ops."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_kernels

from .case import Case, Inputs, Outputs, Provider, compiled, with_backward

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES = (1024,), (8,)
BETA = 0.1


def eager(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Outputs:
    """TRL's loss, and what it logs; that stays on the device."""
    of_chosen, of_rejected = chosen - ref_chosen, rejected - ref_rejected
    loss = -logsigmoid(BETA * (of_chosen - of_rejected)).mean()
    with torch.no_grad():
        rewards = BETA * of_chosen, BETA * of_rejected
        margins = rewards[0] - rewards[1]
        accuracy = (margins > 0).to(chosen.dtype).mean()
        metrics = torch.stack([*(x.mean() for x in (*rewards, margins, chosen, rejected)), accuracy])
    return {"loss": loss, "metrics": metrics}


def ours(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Outputs:
    return {"loss": rlhf_kernels.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=BETA)[0]}


def _loss(outputs: Outputs) -> Outputs:
    return {name: x for name, x in outputs.items() if name != "metrics"}


def _inputs(pairs: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    reference = -100 + 10 * torch.randn(2, pairs, dtype=dtype, device=device, generator=generator)
    policy = reference + 5 * torch.randn(2, pairs, dtype=dtype, device=device, generator=generator)
    return dict(zip(("chosen", "rejected", "ref_chosen", "ref_rejected"), (*policy, *reference)))


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    wrap = partial(with_backward, wrt=("chosen", "rejected"), through=("loss",))
    for pairs in QUICK_SIZES if quick else SIZES:
        yield Case(
            "dpo_loss", "forward+backward", {"pairs": pairs}, dtype,
            inputs=partial(_inputs, pairs, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.dpo_loss", wrap(ours)),
                "eager": Provider("the loss of TRL and what it logs", wrap(eager)),
                "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
            },
            bytes_moved=6 * pairs * dtype.itemsize,
            comparable=_loss,
        )  # fmt: skip
