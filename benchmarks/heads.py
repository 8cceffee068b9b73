"""What the benchmarks of ops on hidden states share: inputs, and the plain projection."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from torch import Tensor

from .harness import Inputs, Outputs

DTYPES = ("float32", "bfloat16")
# (tokens, H, V): a small model's vocabulary, and that of Llama 3 for the memory
SIZES = ((1024, 512, 32000), (1024, 512, 128256))
GPU_SIZES = ((8192, 4096, 128256), (8192, 2048, 151936))
QUICK_SIZES = ((24, 16, 1000),)
PEERS = {"liger": "liger_kernel", "trl": "trl"}  # provider and the package it comes from, where it is installed


def sizes(device: torch.device, quick: bool) -> tuple[tuple[int, int, int], ...]:
    return QUICK_SIZES if quick else GPU_SIZES if device.type == "cuda" else SIZES


def installed(provider: str) -> bool:
    return importlib.util.find_spec(PEERS[provider]) is not None


def inputs(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device, per_token: tuple[str, ...] = ()
) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    new = partial(torch.randn, device=device, generator=generator)
    out = {
        "hidden": new(tokens, width, dtype=dtype), "weight": new(vocab, width, dtype=dtype) * (2 / width**0.5),
        "token_ids": torch.randint(vocab, (tokens,), device=device, generator=generator),
    }  # fmt: skip
    return out | {name: new(tokens, dtype=torch.promote_types(dtype, torch.float32)) for name in per_token}


def logprobs_and_entropy(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As peers write it: every logit, log_softmax, gather, and the entropy from the same log_softmax."""
    logits = hidden @ weight.T
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return logp.gather(-1, token_ids[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def products(count: int, hidden: Tensor, weight: Tensor, **_: Tensor) -> Outputs:
    """Bare matrix products, the logits standing in for their gradient: three, or four with the logits again."""
    hidden, weight = hidden.detach(), weight.detach()
    for _ in range(count - 2):
        logits = hidden @ weight.T
    return {"d_hidden": logits @ weight, "d_weight": logits.T @ hidden}


def bytes_moved(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> int:
    """Hidden states and weight read, and their gradients written."""
    return 2 * (tokens + vocab) * width * dtype.itemsize
