"""token_kl, estimator k3, and its gradient in the policy's log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .case import Case, Inputs, Outputs, Provider, compiled, with_backward

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES = ((512, 1024),), ((8, 64),)


def eager(logprobs: Tensor, ref_logprobs: Tensor) -> Outputs:
    x = ref_logprobs - logprobs
    return {"kl": torch.exp(x) - x - 1}


def ours(logprobs: Tensor, ref_logprobs: Tensor) -> Outputs:
    return {"kl": rlhf_kernels.token_kl(logprobs, ref_logprobs, "k3")}


def verl(logprobs: Tensor, ref_logprobs: Tensor) -> Outputs:
    from verl.trainer.ppo.core_algos import kl_penalty

    return {"kl": kl_penalty(logprobs, ref_logprobs, "low_var_kl")}


def _inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, batch, length, dtype=dtype, device=device, generator=generator)
    logprobs = -randn().abs()
    return {"logprobs": logprobs, "ref_logprobs": logprobs + 0.1 * randn(), "grad_kl": randn()}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    wrap = partial(with_backward, wrt=("logprobs",), through=("kl",))
    for batch, length in QUICK_SIZES if quick else SIZES:
        yield Case(
            "token_kl", "forward+backward", {"sequences": batch, "length": length}, dtype,
            inputs=partial(_inputs, batch, length, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.token_kl", wrap(ours)),
                "eager": Provider("exp(x) - x - 1", wrap(eager)),
                "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
                "verl": Provider("verl's kl_penalty, low_var_kl, with its clamps", wrap(verl), package="verl"),
            },
            # both inputs in, the estimate out; in the backward both again, the upstream gradient in, the gradient out
            bytes_moved=batch * length * 7 * dtype.itemsize,
        )  # fmt: skip
