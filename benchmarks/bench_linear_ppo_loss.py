"""linear_ppo_loss: hidden states to the clipped loss with entropy bonus and KL term, and the gradients of the head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .harness import Case, Inputs, Outputs, Provider, compiled, with_backward
from .heads import DTYPES, bytes_moved, inputs, logprobs_and_entropy, products, sizes

__all__ = ["DTYPES", "cases"]
OPTIONS = rlhf_kernels.PPOLossOptions(entropy_coef=0.01, kl_coef=0.05)


def eager(hidden: Tensor, weight: Tensor, token_ids: Tensor, old: Tensor, ref: Tensor, advantages: Tensor) -> Outputs:
    logprobs, entropy = logprobs_and_entropy(hidden, weight, token_ids)
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - OPTIONS.clip_low, 1 + OPTIONS.clip_high)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    x = logprobs - ref
    kl = torch.exp(-x) - 1 + x
    return {"loss": (policy - OPTIONS.entropy_coef * entropy + OPTIONS.kl_coef * kl).mean()}


def ours(hidden: Tensor, weight: Tensor, token_ids: Tensor, old: Tensor, ref: Tensor, advantages: Tensor) -> Outputs:
    of_tokens = (x[None] for x in (hidden, token_ids, old, advantages))
    rows, ids, old, advantages = of_tokens
    options = {"ref_logprobs": ref[None], "options": OPTIONS}
    return {"loss": rlhf_kernels.linear_ppo_loss(rows, weight, ids, old, advantages, **options)[0]}


def _inputs(*size, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Ratios of about 1, as in training."""
    out = inputs(*size, dtype, device, ("old", "ref", "advantages"))
    with torch.no_grad():
        logprobs = rlhf_kernels.linear_token_logprobs(out["hidden"], out["weight"], out["token_ids"])
    out |= {name: logprobs + 0.1 * out[name] for name in ("old", "ref")}
    return out | {"grad_loss": torch.ones_like(logprobs[0])}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for size in sizes(device, quick):
        wrap = lambda f: with_backward(f, ("hidden", "weight"), ("loss",))  # noqa: E731
        yield Case(
            "linear_ppo_loss", "forward+backward", size, dtype, partial(_inputs, *size, dtype=dtype, device=device),
            providers={
                "ours": Provider("rlhf_kernels.linear_ppo_loss", wrap(ours)),
                "products": Provider("three bare matrix products", partial(products, 3), judged=False),
                "eager": Provider("logits, log_softmax, gather, entropy, clipped loss", wrap(eager)),
                "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
            },
            bytes_moved=bytes_moved(*size, dtype),
        )  # fmt: skip
