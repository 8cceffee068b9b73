"""masked_whiten of the advantages of a rollout batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .harness import Case, Inputs, Outputs, Provider, compiled, response_mask

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES = ((512, 2048),), ((8, 64),)
EPS = 1e-8


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """masked_whiten of TRL and verl: masked mean, masked variance, and a rescale."""
    mask = mask.to(x.dtype)
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean) ** 2 * mask).sum() / mask.sum()
    return (x - mean) * torch.rsqrt(variance + EPS) * mask


def eager(x: Tensor, mask: Tensor) -> Outputs:
    return {"whitened": whiten(x, mask)}


def ours(x: Tensor, mask: Tensor) -> Outputs:
    return {"whitened": rlhf_kernels.masked_whiten(x, mask, eps=EPS)}


def _inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, length, dtype=dtype, device=device, generator=generator)
    return {"x": x, "mask": response_mask(batch, length, device, generator)}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for batch, length in QUICK_SIZES if quick else SIZES:
        yield Case(
            "masked_whiten", "forward", (batch, length), dtype,
            inputs=partial(_inputs, batch, length, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.masked_whiten", ours),
                "eager": Provider("masked_whiten of TRL and verl", eager),
                "compile": Provider("torch.compile of eager", compiled(eager)),
            },
            # x and a byte of mask in, the result out; the sweep for the statistics before it is not counted
            bytes_moved=batch * length * (2 * dtype.itemsize + 1),
        )  # fmt: skip
