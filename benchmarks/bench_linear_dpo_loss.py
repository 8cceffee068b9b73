"""linear_dpo_loss: hidden states of 8 pairs of 64 tokens to the sigmoid loss and the gradients of the head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_kernels

from .harness import Case, Inputs, Outputs, Provider, compiled, with_backward

DTYPES = ("float32", "bfloat16")
SIZES, QUICK_SIZES = ((16, 64, 512, 32000),), ((4, 8, 16, 1000),)  # sequences, tokens of each, H, V


def eager(hidden: Tensor, weight: Tensor, token_ids: Tensor, ref_logps: Tensor) -> Outputs:
    logp = torch.log_softmax((hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)), -1)
    ratios = logp.gather(-1, token_ids[..., None])[..., 0].sum(-1) - ref_logps
    chosen, rejected = ratios.chunk(2)
    return {"loss": -logsigmoid(0.1 * (chosen - rejected)).mean()}


def ours(hidden: Tensor, weight: Tensor, token_ids: Tensor, ref_logps: Tensor) -> Outputs:
    return {"loss": rlhf_kernels.linear_dpo_loss(hidden, weight, token_ids, ref_logps)[0]}


def products(hidden: Tensor, weight: Tensor, token_ids: Tensor, ref_logps: Tensor, **_: Tensor) -> Outputs:
    """The three matrix products alone, with the logits standing in for their gradient."""
    rows = hidden.detach().flatten(0, 1)
    logits = rows @ weight.detach().T
    return {"d_hidden": logits @ weight.detach(), "d_weight": logits.T @ rows}


def _inputs(sequences: int, length: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    new = partial(torch.randn, dtype=dtype, device=device, generator=generator)
    per_token = torch.promote_types(dtype, torch.float32)
    return {
        "hidden": new(sequences, length, width), "weight": new(vocab, width) / width**0.5,
        "token_ids": torch.randint(vocab, (sequences, length), device=device, generator=generator),
        "ref_logps": torch.full((sequences,), -10.0 * length, dtype=per_token, device=device),
        "grad_loss": torch.ones((), dtype=per_token, device=device),
    }  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for size in QUICK_SIZES if quick else SIZES:
        wrap = lambda f: with_backward(f, ("hidden", "weight"), ("loss",))  # noqa: E731
        sequences, length, width, vocab = size
        yield Case(
            "linear_dpo_loss", "forward+backward", size, dtype, inputs=partial(_inputs, *size, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.linear_dpo_loss", wrap(ours)),
                "products": Provider("three bare matrix products", products, judged=False),
                "eager": Provider("logits, log_softmax, gather, sums, logsigmoid", wrap(eager)),
                "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
            },
            bytes_moved=(2 * sequences * length * width + 3 * vocab * width) * dtype.itemsize,
        )  # fmt: skip
