"""linear_dpo_loss: hidden states of 8 pairs of 64 tokens to the sigmoid loss and the gradients of the head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_kernels

from . import heads
from .case import Case, Inputs, Outputs, Provider, compiled, with_backward

DTYPES = ("float32", "bfloat16")
HALF_ON_CUDA = True
SIZES, QUICK_SIZES = ((16, 64, 512, 32000),), ((4, 8, 16, 1000),)  # sequences, tokens of each, H, V
GPU_SIZES = ((16, 512, 4096, 128256),)
BETA = 0.1


def in_chunks(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    found = heads.in_chunks(heads.logprobs, hidden.flatten(0, 1), weight, token_ids.flatten(), rows=(0, 2))
    return (found[0].view_as(token_ids),)


def eager(hidden: Tensor, weight: Tensor, token_ids: Tensor, ref_logps: Tensor, of_head=heads.logprobs) -> Outputs:
    ratios = of_head(hidden, weight, token_ids)[0].sum(-1) - ref_logps
    chosen, rejected = ratios.chunk(2)
    return {"loss": -logsigmoid(BETA * (chosen - rejected)).mean()}


def liger(hidden: Tensor, weight: Tensor, token_ids: Tensor, ref_logps: Tensor) -> Outputs:
    """Without a reference its log-probabilities count as 0, which is what ref_logps holds here."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, average_log_prob=False, compute_nll_loss=False)
    return {"loss": loss(weight, hidden, token_ids)[0]}


def ours(hidden: Tensor, weight: Tensor, token_ids: Tensor, ref_logps: Tensor) -> Outputs:
    return {"loss": rlhf_kernels.linear_dpo_loss(hidden, weight, token_ids, ref_logps)[0]}


def _inputs(sequences: int, length: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    new = partial(torch.randn, dtype=dtype, device=device, generator=generator)
    per_token = torch.promote_types(dtype, torch.float32)
    return {
        "hidden": new(sequences, length, width), "weight": new(vocab, width) / width**0.5,
        "token_ids": torch.randint(vocab, (sequences, length), device=device, generator=generator),
        "ref_logps": torch.zeros(sequences, dtype=per_token, device=device),
        "grad_loss": torch.ones((), dtype=per_token, device=device),
    }  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for size in QUICK_SIZES if quick else GPU_SIZES if device.type == "cuda" else SIZES:
        wrap = lambda f: with_backward(f, ("hidden", "weight"), ("loss",))  # noqa: E731
        sequences, length, width, vocab = size
        yield Case(
            "linear_dpo_loss", "forward+backward",
            {"sequences": sequences, "length": length, "width": width, "vocabulary": vocab}, dtype,
            inputs=partial(_inputs, *size, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.linear_dpo_loss", wrap(ours)),
                "products": Provider("3 bare matrix products", partial(heads.products, 3), judged=False),
                "eager": Provider("logits, log_softmax, gather, sums, logsigmoid", wrap(eager)),
                "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
                "liger": Provider("Liger's chunked DPO loss", wrap(liger), package="liger_kernel"),
            },
            bytes_moved=heads.bytes_moved(sequences * length, width, vocab, dtype),
            flops=3 * heads.product_flops(sequences * length, width, vocab),
            exact=wrap(partial(eager, of_head=in_chunks)),
        )  # fmt: skip
