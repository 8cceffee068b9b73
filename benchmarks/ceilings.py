"""What this machine can do at best, measured in the rounds of the ops: a large copy and a large matrix product."""

from __future__ import annotations

from functools import cache

import torch

from .case import Provider

COPY_BYTES = 2**28
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
COPY, MATMUL = "copy", "matmul"


@cache
def copier(device: torch.device) -> Provider:
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.ones_like(source)
    return Provider("copy_ of 256 MiB", lambda **_: {"target": target.copy_(source)})


@cache
def multiplier(device: torch.device, dtype: torch.dtype) -> tuple[Provider, int]:
    """A square product in torch's settings of the moment, and its floating-point operations."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Provider(f"mm of {size} x {size}", lambda **_: {"out": torch.mm(a, b, out=out)}), 2 * size**3
