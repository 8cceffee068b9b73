"""Sequences that cross the tiles, warps and chunks of the GPU scans: one argument list for a kernel and its reference.

Shared by the tests on a GPU and by those of the CUDA kernels on the emulator.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rlhf_kernels._library import OPS

LENGTHS = {  # of the sequences; the lengths decide how many threads and blocks a scan gives each of them
    "warps": [250, 3, 129, 128, 256, 1, 40, 255, 200],
    "blocks": [3000, 2500, 1025, 4],
    "chunks": [9001, 8192],
    "uneven_chunks": [16500, 5, 0, 20001],
}
LAYOUTS = ("padded", "packed")


def arguments(name: str, lengths: list[int], layout: str) -> list:
    """float64 arguments of an op's schema for sequences of these lengths, one token in five masked."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = len(lengths)
    shape = (sum(lengths),) if layout == "packed" else (rows, max(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int() if layout == "packed" else None
    mask = torch.rand(shape, generator=generator) > 0.2
    if layout == "padded":
        mask &= torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    per_token = [random(*shape).masked_fill(~mask, float("nan")) for _ in range(9)]
    if name == "gae":
        return [*per_token[:2], mask, bounds, random(rows), 0.99, 0.97, True]
    if name == "ppo_advantages":
        options = [None, 0.05, 3, 0.999, 0.95, 1.5, True, True]
        return [per_token[0], per_token[0] + 0.1 * per_token[1], per_token[2], random(rows), mask, bounds, *options]
    if name == "masked_whiten":
        return [1e4 + per_token[0], mask, True, True, 1e-8]
    logprobs, old, advantages, *others = per_token
    options = [None, 0.2, 0.28, 3.0, 0.2, 0.1, 0.01, 0.05, 2, None, None, 2, True, True, True]  # seq_mean_token_mean
    return [old + 0.2 * logprobs, old, advantages, mask, bounds, *others[:4], old + 0.1 * others[4], None, *options]


def convert(args: list, device: str, dtype: torch.dtype) -> list:
    float_or_not = lambda x: x.to(device, dtype if x.is_floating_point() else None)  # noqa: E731
    return [float_or_not(x) if isinstance(x, Tensor) else x for x in args]


@cache
def expected(name: str, lengths: tuple[int, ...], layout: str) -> tuple[list, list[Tensor], list[Tensor]]:
    """(arguments, plain torch in float32, the truth in float64)."""
    args = arguments(name, list(lengths), layout)
    return args, outputs(OPS[name].reference(*convert(args, "cpu", torch.float32))), outputs(OPS[name].reference(*args))


def outputs(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def check(name: str, lengths: list[int], layout: str, device: str) -> None:
    """The op on `device` against its reference: its error may exceed plain torch's by 3e-6 of the largest value."""
    args, plain, truth = expected(name, tuple(lengths), layout)
    for dtype in (torch.float32, torch.float64):
        ours = outputs(OPS[name].overload(*convert(args, device, dtype)))
        for i, (a, p, t) in enumerate(zip(ours, plain, truth)):
            scale, naive = t.abs().max().item(), (p.double() - t).abs().max().item()
            allowed = naive + 3e-6 * scale if dtype == torch.float32 else 1e-10 * scale
            error = (a.cpu().double() - t).abs().max().item()
            assert error <= allowed, f"{name} {layout} {lengths} {dtype} output {i}: {error:.3g} over {allowed:.3g}"
