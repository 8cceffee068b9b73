"""What the benchmarks of ops on hidden states share: inputs, and the plain projection."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .case import Inputs, Outputs

DTYPES = ("float32", "bfloat16")
# (tokens, H, V): a small model's vocabulary, and that of Llama 3 for the memory
SIZES = ((1024, 512, 32000), (256, 512, 128256))
GPU_SIZES = ((8192, 4096, 128256), (8192, 2048, 151936))
QUICK_SIZES = ((24, 16, 1000),)
EXACT_ROWS = 1024  # in float64 a chunk of logits and what is computed from them take 8 GB at a vocabulary of 151,936


def sizes(device: torch.device, quick: bool) -> tuple[tuple[int, int, int], ...]:
    return QUICK_SIZES if quick else GPU_SIZES if device.type == "cuda" else SIZES


def named(tokens: int, width: int, vocab: int) -> dict[str, int]:
    return {"tokens": tokens, "width": width, "vocabulary": vocab}


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


def logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    """Every logit, log_softmax, gather."""
    logits = hidden @ weight.T
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return (logp.gather(-1, token_ids[..., None]).squeeze(-1),)


def logprobs_and_entropy(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As peers write it: every logit, log_softmax, gather, and the entropy from the same log_softmax."""
    logits = hidden @ weight.T
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return logp.gather(-1, token_ids[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def in_chunks(of_rows: callable, *rows_and_weights: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A function of independent rows, a chunk at a time, computed again in the backward: float64 in little memory."""
    count = rows_and_weights[rows[0]].shape[0]
    parts = []
    for start in range(0, count, EXACT_ROWS):
        given = [x[start : start + EXACT_ROWS] if i in rows else x for i, x in enumerate(rows_and_weights)]
        parts.append(checkpoint(of_rows, *given, use_reentrant=False))
    return tuple(torch.cat(outputs) for outputs in zip(*parts))


def exact_logprobs_and_entropy(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """logprobs_and_entropy for the truth."""
    return in_chunks(logprobs_and_entropy, hidden, weight, token_ids, rows=(0, 2))


def products(count: int, hidden: Tensor, weight: Tensor, **_: Tensor) -> Outputs:
    """Bare matrix products, the logits standing in for their gradient: one, three, or four with the logits again."""
    hidden, weight = hidden.detach().flatten(0, -2), weight.detach()
    for _ in range(max(1, count - 2)):
        logits = hidden @ weight.T
    return {"d_hidden": logits @ weight, "d_weight": logits.T @ hidden} if count > 1 else {}


def product_flops(tokens: int, width: int, vocab: int) -> int:
    """Of one product of a head."""
    return 2 * tokens * width * vocab


def bytes_moved(tokens: int, width: int, vocab: int, dtype: torch.dtype, reads: int = 1, writes: int = 1) -> int:
    """Hidden states and weight, read once a pass that needs them, and their gradients, written once."""
    return (reads + writes) * (tokens + vocab) * width * dtype.itemsize
