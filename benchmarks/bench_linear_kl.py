"""linear_kl: the exact divergence from the hidden states of policy and reference, and the gradients of the head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from . import heads
from .bench_logits_kl import eager as of_logits
from .case import Case, Inputs, Outputs, Provider, compiled, with_backward
from .heads import DTYPES

__all__ = ["DTYPES", "cases"]
HALF_ON_CUDA = True


def eager(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Outputs:
    return of_logits(hidden @ weight.T, ref_hidden @ ref_weight.T)


def exact(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Outputs:
    of_rows = lambda *inputs: (eager(*inputs)["kl"],)  # noqa: E731
    return {"kl": heads.in_chunks(of_rows, hidden, weight, ref_hidden, ref_weight, rows=(0, 2))[0]}


def ours(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Outputs:
    return {"kl": rlhf_kernels.linear_kl(hidden, weight, ref_hidden, ref_weight)}


def trl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Outputs:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return {"kl": ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)[0]}


def products(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, **_: Tensor) -> Outputs:
    """The six matrix products alone: both logits twice, and the gradients."""
    hidden, weight = hidden.detach(), weight.detach()
    for _ in range(2):
        logits, ref_logits = hidden @ weight.T, ref_hidden @ ref_weight.T
    return {"kl": ref_logits[:, 0], "d_hidden": logits @ weight, "d_weight": logits.T @ hidden}


def _inputs(*size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    out = heads.inputs(*size, dtype, device, ("grad_kl",))
    generator = torch.Generator(device).manual_seed(1)
    noise = torch.randn(out["weight"].shape, dtype=dtype, device=device, generator=generator)
    del out["token_ids"]
    return out | {"ref_hidden": out["hidden"].clone(), "ref_weight": out["weight"] + 0.2 * noise / size[1] ** 0.5}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for size in heads.sizes(device, quick)[:1]:
        wrap = lambda f: with_backward(f, ("hidden", "weight"), ("kl",))  # noqa: E731
        yield Case(
            "linear_kl", "forward+backward", heads.named(*size), dtype,
            inputs=partial(_inputs, *size, dtype=dtype, device=device),
            providers={
                "ours": Provider("rlhf_kernels.linear_kl", wrap(ours)),
                "products": Provider("6 bare matrix products", products, judged=False),
                "eager": Provider("both logits, two log_softmax, sum p (log p - log q)", wrap(eager)),
                "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
                "trl": Provider("TRL's ChunkedDivergenceFunction, and the entropy", wrap(trl), package="trl"),
            },
            # Hidden states and weight of both read, the gradients of one written.
            bytes_moved=heads.bytes_moved(*size, dtype, reads=4),
            flops=4 * heads.product_flops(*size),
            exact=wrap(exact),
        )  # fmt: skip
