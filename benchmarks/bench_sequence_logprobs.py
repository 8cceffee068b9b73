"""sequence_logprobs: sums over the counted tokens of each sequence, and their gradient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .case import Case, Inputs, Outputs, Provider, compiled, response_mask, with_backward

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES = ((512, 1024),), ((8, 64),)


def eager(logprobs: Tensor, mask: Tensor) -> Outputs:
    return {"sums": (logprobs * mask).sum(-1)}


def ours(logprobs: Tensor, mask: Tensor) -> Outputs:
    return {"sums": rlhf_kernels.sequence_logprobs(logprobs, mask)}


def _inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, dtype=dtype, device=device, generator=generator)
    mask = response_mask(batch, length, device, generator)
    return {"logprobs": -randn(batch, length).abs(), "mask": mask, "grad_sums": randn(batch)}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    wrap = partial(with_backward, wrt=("logprobs",), through=("sums",))
    for batch, length in QUICK_SIZES if quick else SIZES:
        yield Case(
            "sequence_logprobs", "forward+backward", {"sequences": batch, "length": length}, dtype,
            inputs=partial(_inputs, batch, length, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.sequence_logprobs, whatever stands under the mask", wrap(ours)),
                "eager": Provider("product with the mask, sum", wrap(eager)),
                "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
            },
            # log-probabilities and mask in, the mask again in the backward, the gradient out
            bytes_moved=batch * length * (2 * dtype.itemsize + 2) + 2 * batch * dtype.itemsize,
        )  # fmt: skip
