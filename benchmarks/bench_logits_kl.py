"""logits_kl: the exact divergence over the vocabulary from two logits, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .case import Case, Inputs, Outputs, Provider, compiled, with_backward

DTYPES = ("float32", "float64", "bfloat16", "float16")
HALF_ON_CUDA = True
SIZES, QUICK_SIZES = ((512, 151936), (2048, 32000)), ((8, 1000),)
GPU_SIZES = ((8192, 128256), (8192, 151936))
TRUTH_ROWS = 64


def eager(logits: Tensor, ref_logits: Tensor) -> Outputs:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p, q = (torch.log_softmax(x.to(dtype), -1) for x in (logits, ref_logits))
    return {"kl": (p.exp() * (p - q)).sum(-1)}


def ours(logits: Tensor, ref_logits: Tensor) -> Outputs:
    return {"kl": rlhf_kernels.logits_kl(logits, ref_logits)}


def _inputs(rows: int, vocab: int, dtype: torch.dtype, device: torch.device, backward: bool) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    new = partial(torch.randn, device=device, generator=generator)
    logits = 2 * new(rows, vocab, dtype=dtype)
    out = {"logits": logits, "ref_logits": logits + 0.3 * new(rows, vocab, dtype=dtype)}
    return out | ({"grad_kl": new(rows, dtype=torch.promote_types(dtype, torch.float32))} if backward else {})


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for rows, vocab in QUICK_SIZES if quick else GPU_SIZES if device.type == "cuda" else SIZES:
        for mode in ("forward", "forward+backward"):
            backward = mode != "forward"
            wrap = (lambda f: with_backward(f, ("logits",), ("kl",))) if backward else (lambda f: f)
            yield Case(
                "logits_kl", mode, {"tokens": rows, "vocabulary": vocab}, dtype,
                inputs=partial(_inputs, rows, vocab, dtype, device, backward),
                providers={
                    "ours": Provider("rlhf_kernels.logits_kl", wrap(ours)),
                    "eager": Provider("two log_softmax, sum p (log p - log q)", wrap(eager)),
                    "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
                },
                # Both logits once; backward reads them again and writes a gradient.
                bytes_moved=rows * vocab * dtype.itemsize * (5 if backward else 2), truth_rows=TRUTH_ROWS,
            )  # fmt: skip
