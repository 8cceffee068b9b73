"""masked_whiten of the advantages of a rollout batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .case import Case, Inputs, Outputs, Provider, compiled, masked, response_mask

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES, GPU_SIZES = ((512, 2048),), ((8, 64),), ((512, 2048), (8192, 4096))
EPS = 1e-8


def whiten(x: Tensor, mask: Tensor, unbiased: bool = False) -> Tensor:
    """masked_whiten of TRL and verl: masked mean, masked variance, and a rescale."""
    mask = mask.to(x.dtype)
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean) ** 2 * mask).sum() / (count - 1 if unbiased else count)
    return (x - mean) * torch.rsqrt(variance + EPS) * mask


def eager(x: Tensor, mask: Tensor) -> Outputs:
    return {"whitened": whiten(x, mask, unbiased=True)}


def ours(x: Tensor, mask: Tensor) -> Outputs:
    return {"whitened": rlhf_kernels.masked_whiten(x, mask, unbiased=True, eps=EPS)}


def verl(x: Tensor, mask: Tensor) -> Outputs:
    """As verl calls it, which zeroes nothing under the mask."""
    from verl.utils.torch_functional import masked_whiten

    return {"whitened": masked_whiten(x, mask), "mask": mask}


def _inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, length, dtype=dtype, device=device, generator=generator)
    return {"x": x, "mask": response_mask(batch, length, device, generator)}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for batch, length in QUICK_SIZES if quick else GPU_SIZES if device.type == "cuda" else SIZES:
        yield Case(
            "masked_whiten", "forward", {"sequences": batch, "length": length}, dtype,
            inputs=partial(_inputs, batch, length, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.masked_whiten", ours),
                "eager": Provider("masked_whiten as TRL and verl write it", eager),
                "compile": Provider("torch.compile of eager", compiled(eager)),
                "verl": Provider("verl's masked_whiten", verl, package="verl"),
            },
            # x and a byte of mask in, the result out; the sweep for the statistics before it is not counted
            bytes_moved=batch * length * (2 * dtype.itemsize + 1),
            comparable=masked,
        )  # fmt: skip
