"""linear_token_logprobs: log-probability and entropy from hidden states, and the gradients of the head through both."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .harness import Case, Outputs, Provider, compiled, with_backward
from .heads import DTYPES, bytes_moved, inputs, installed, logprobs_and_entropy, products, sizes

__all__ = ["DTYPES", "cases"]


def eager(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    return dict(zip(("logprobs", "entropy"), logprobs_and_entropy(hidden, weight, token_ids)))


def ours(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    found = rlhf_kernels.linear_token_logprobs(hidden, weight, token_ids, return_entropy=True)
    return dict(zip(("logprobs", "entropy"), found))


def liger(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, token_ids, 1.0, -100, 1, True)
    return {"logprobs": -found[0], "entropy": found[1]}


def trl(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    found = ChunkedLogProbFunction.apply(hidden, weight, None, token_ids, 1.0, columns, None, 1.0, ("entropy",))
    return {"logprobs": found[0], "entropy": found[1]}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for size in sizes(device, quick):
        for mode in ("forward", "forward+backward"):
            backward = mode != "forward"
            through = ("logprobs", "entropy")
            wrap = (lambda f: with_backward(f, ("hidden", "weight"), through)) if backward else (lambda f: f)  # noqa: B023
            upstream = tuple(f"grad_{name}" for name in through) if backward else ()
            providers = {
                "ours": Provider("rlhf_kernels.linear_token_logprobs", wrap(ours)),
                "eager": Provider("logits, log_softmax, gather, entropy", wrap(eager)),
                "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
            }
            if backward:
                providers["products"] = Provider("four bare matrix products", partial(products, 4), judged=False)
            for name, function in (("liger", liger), ("trl", trl)):
                if installed(name):
                    providers[name] = Provider(f"{name}'s fused linear log-probabilities", wrap(function))
            yield Case(
                "linear_token_logprobs", mode, size, dtype, partial(inputs, *size, dtype, device, upstream), providers,
                bytes_moved=bytes_moved(*size, dtype) // (1 if backward else 2),
            )  # fmt: skip
