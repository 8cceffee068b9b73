"""token_logprobs with entropy, both differentiable, at vocabularies of 151,936 (Qwen 2.5) and 32,000 (Llama 2)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .harness import Case, Inputs, Outputs, Provider, compiled, with_backward

DTYPES = ("float32", "float64", "bfloat16", "float16")
SIZES, QUICK_SIZES = ((512, 151936), (2048, 32000)), ((16, 1000),)
TEMPERATURE = 0.7
TRUTH_ROWS = 32  # float64 of the whole would take 5 GB


def eager(logits: Tensor, token_ids: Tensor) -> Outputs:
    """log_softmax and gather, and the entropy from the same log_softmax: the cheapest that peers write."""
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE, -1)
    logprobs = logp.gather(-1, token_ids[..., None]).squeeze(-1)
    return {"logprobs": logprobs, "entropy": -(logp.exp() * logp).sum(-1)}


def ours(logits: Tensor, token_ids: Tensor) -> Outputs:
    logprobs, entropy = rlhf_kernels.token_logprobs(logits, token_ids, temperature=TEMPERATURE, return_entropy=True)
    return {"logprobs": logprobs, "entropy": entropy}


def _inputs(rows: int, vocab: int, dtype: torch.dtype, device: torch.device, backward: bool) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    inputs = {
        "logits": 2 * torch.randn(rows, vocab, dtype=dtype, device=device, generator=generator),
        "token_ids": torch.randint(vocab, (rows,), device=device, generator=generator),
    }
    per_token = torch.promote_types(dtype, torch.float32)
    for name in ("grad_logprobs", "grad_entropy") if backward else ():
        inputs[name] = torch.randn(rows, dtype=per_token, device=device, generator=generator)
    return inputs


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for rows, vocab in QUICK_SIZES if quick else SIZES:
        for mode in ("forward", "forward+backward"):
            backward = mode != "forward"
            wrap = (lambda f: with_backward(f, ("logits",), ("logprobs", "entropy"))) if backward else (lambda f: f)
            logits, per_token = rows * vocab * dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
            yield Case(
                "token_logprobs", mode, (rows, vocab), dtype,
                inputs=partial(_inputs, rows, vocab, dtype, device, backward),
                providers={
                    "ours": Provider("rlhf_kernels.token_logprobs", wrap(ours)),
                    "eager": Provider("log_softmax, gather, entropy from the same log_softmax", wrap(eager)),
                    "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
                },
                # The logits once; backward reads them again and writes a gradient of their size. A row has an id, two
                # results and, in backward, two upstream gradients.
                bytes_moved=logits * (3 if backward else 1) + rows * (8 + per_token * (4 if backward else 2)),
                truth_rows=TRUTH_ROWS,
            )  # fmt: skip
