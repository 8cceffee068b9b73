"""linear_ppo_loss: hidden states to the clipped loss and the gradients of the head, with entropy bonus and KL term; and
with the KL term alone and an advantage a sequence, which is GRPO."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from . import heads
from .case import Case, Inputs, Outputs, Provider, compiled, with_backward
from .heads import DTYPES

__all__ = ["DTYPES", "cases"]
HALF_ON_CUDA = True
OPTIONS = rlhf_kernels.PPOLossOptions(entropy_coef=0.01, kl_coef=0.05)
GRPO = rlhf_kernels.PPOLossOptions(kl_coef=0.05)
SEQUENCES = 8  # of GRPO


def eager(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, old: Tensor, ref: Tensor, advantages: Tensor,
    of_head=heads.logprobs_and_entropy, options=OPTIONS,
) -> Outputs:  # fmt: skip
    logprobs, entropy = of_head(hidden, weight, token_ids)
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    x = logprobs - ref
    kl = torch.exp(-x) - 1 + x
    return {"loss": (policy - options.entropy_coef * entropy + options.kl_coef * kl).mean()}


def logprobs_only(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, float]:
    return *heads.logprobs(hidden, weight, token_ids), 0.0


def eager_grpo(**inputs: Tensor) -> Outputs:
    return eager(**inputs, of_head=logprobs_only, options=GRPO)


def ours(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, options=OPTIONS
) -> Outputs:
    of_tokens = (x[None] for x in (hidden, token_ids, old, advantages))
    rows, ids, old, advantages = of_tokens
    given = {"ref_logprobs": ref[None], "options": options}
    return {"loss": rlhf_kernels.linear_ppo_loss(rows, weight, ids, old, advantages, **given)[0]}


def liger_grpo(hidden: Tensor, weight: Tensor, token_ids: Tensor, old: Tensor, ref: Tensor, advantages: Tensor):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=GRPO.kl_coef, epsilon_low=GRPO.clip_low, epsilon_high=GRPO.clip_high, loss_type="bnpo", use_ref_model=True
    )
    rows, ids, old, ref, advantages = (
        x.unflatten(0, (SEQUENCES, -1)) for x in (hidden, token_ids, old, ref, advantages)
    )
    mask = torch.ones_like(old)
    found = loss(rows, weight, ids, mask, advantages[:, 0], ref_per_token_logps=ref, old_per_token_logps=old)
    return {"loss": found[0]}


def _inputs(*size: int, dtype: torch.dtype, device: torch.device, grpo: bool) -> Inputs:
    """Ratios of about 1, as in training."""
    out = heads.inputs(*size, dtype, device, ("old", "ref", "advantages"))
    with torch.no_grad():
        logprobs = rlhf_kernels.linear_token_logprobs(out["hidden"], out["weight"], out["token_ids"])
    out |= {name: logprobs + 0.1 * out[name] for name in ("old", "ref")}
    if grpo:
        of_sequences = out["advantages"].view(SEQUENCES, -1)[:, :1]
        out["advantages"] = of_sequences.expand(SEQUENCES, size[0] // SEQUENCES).flatten()
    return out | {"grad_loss": torch.ones_like(logprobs[0])}


def case(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    grpo: bool = False,
    dynamic: bool | None = False,
) -> Case:
    wrap = lambda f: with_backward(f, ("hidden", "weight"), ("loss",))  # noqa: E731
    plain = eager_grpo if grpo else eager
    providers = {
        "ours": Provider("rlhf_kernels.linear_ppo_loss", wrap(partial(ours, options=GRPO if grpo else OPTIONS))),
        "products": Provider("3 bare matrix products", partial(heads.products, 3), judged=False),
        "eager": Provider("logits, log_softmax, gather, clipped loss", wrap(plain)),
        "compile": Provider("torch.compile of eager", wrap(compiled(plain, dynamic))),
    }
    if grpo:
        providers["liger"] = Provider("Liger's chunked GRPO loss, bnpo", wrap(liger_grpo), package="liger_kernel")
    return Case(
        "linear_ppo_loss", "forward+backward", heads.named(*size), dtype,
        inputs=partial(_inputs, *size, dtype=dtype, device=device, grpo=grpo),
        providers=providers,
        bytes_moved=heads.bytes_moved(*size, dtype),
        variant="GRPO" if grpo else "",
        flops=3 * heads.product_flops(*size),
        exact=wrap(partial(eager, of_head=heads.exact_logprobs_and_entropy, options=GRPO if grpo else OPTIONS)),
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    sizes = heads.sizes(device, quick)
    for size in sizes:
        yield case(size, dtype, device)
    yield case(sizes[0], dtype, device, grpo=True)
