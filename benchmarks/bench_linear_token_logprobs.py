"""linear_token_logprobs and the gradients of the head: with entropy, through both outputs, and alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from . import heads
from .case import Case, Outputs, Provider, compiled, with_backward
from .heads import DTYPES

__all__ = ["DTYPES", "cases"]
HALF_ON_CUDA = True


def eager(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    return dict(zip(("logprobs", "entropy"), heads.logprobs_and_entropy(hidden, weight, token_ids)))


def exact(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    return dict(zip(("logprobs", "entropy"), heads.exact_logprobs_and_entropy(hidden, weight, token_ids)))


def ours(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    found = rlhf_kernels.linear_token_logprobs(hidden, weight, token_ids, return_entropy=True)
    return dict(zip(("logprobs", "entropy"), found))


def liger(hidden: Tensor, weight: Tensor, token_ids: Tensor, entropy: bool = True) -> Outputs:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, token_ids, 1.0, -100, 1, entropy)
    return {"logprobs": -found[0], "entropy": found[1]} if entropy else {"logprobs": -found}


def trl(hidden: Tensor, weight: Tensor, token_ids: Tensor, also: tuple[str, ...] = ("entropy",)) -> Outputs:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    found = ChunkedLogProbFunction.apply(hidden, weight, None, token_ids, 1.0, columns, None, 1.0, also)
    return dict(zip(("logprobs", *also), found))


def verl(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return dict(zip(("logprobs", "entropy"), linear_cross_entropy(hidden, weight, token_ids, 1.0, "none")))


def alone(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    return lambda **inputs: {"logprobs": function(**inputs)["logprobs"]}


def eager_alone(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    return {"logprobs": heads.logprobs(hidden, weight, token_ids)[0]}


def ours_alone(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    return {"logprobs": rlhf_kernels.linear_token_logprobs(hidden, weight, token_ids)}


def torch_alone(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    return {"logprobs": -torch.nn.functional.linear_cross_entropy(hidden, weight, token_ids, reduction="none")}


def cce_alone(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Outputs:
    from cut_cross_entropy import linear_cross_entropy

    kernel = "cce" if hidden.is_cuda else "torch_compile"
    return {"logprobs": -linear_cross_entropy(hidden, weight, token_ids, reduction="none", impl=kernel)}


def providers(entropy: bool, wrap: Callable, dynamic: bool | None) -> dict[str, Provider]:
    if entropy:
        return {
            "ours": Provider("rlhf_kernels.linear_token_logprobs", wrap(ours)),
            "eager": Provider("logits, log_softmax, gather, entropy", wrap(eager)),
            "compile": Provider("torch.compile of eager", wrap(compiled(eager, dynamic))),
            "trl": Provider("TRL's ChunkedLogProbFunction", wrap(trl), package="trl"),
            "liger": Provider("Liger's fused linear scaled cross-entropy", wrap(liger), package="liger_kernel"),
            "verl": Provider("verl's Triton linear_cross_entropy", wrap(verl), package="verl", needs_cuda=True),
        }
    return {
        "ours": Provider("rlhf_kernels.linear_token_logprobs", wrap(ours_alone)),
        "eager": Provider("logits, log_softmax, gather", wrap(eager_alone)),
        "compile": Provider("torch.compile of eager", wrap(compiled(eager_alone, dynamic))),
        "torch": Provider("torch's linear_cross_entropy", wrap(torch_alone)),
        "trl": Provider("TRL's ChunkedLogProbFunction", wrap(partial(trl, also=())), package="trl"),
        "liger": Provider(
            "Liger's fused linear scaled cross-entropy", wrap(partial(liger, entropy=False)), package="liger_kernel"
        ),
        "cce": Provider(
            "cut-cross-entropy; without a GPU its torch_compile fallback", wrap(cce_alone), package="cut_cross_entropy"
        ),
    }


def case(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    mode: str = "forward+backward",
    entropy: bool = True,
    dynamic: bool | None = False,
) -> Case:
    backward, through = mode != "forward", ("logprobs", "entropy") if entropy else ("logprobs",)
    wrap = (lambda f: with_backward(f, ("hidden", "weight"), through)) if backward else (lambda f: f)
    upstream, needed = (tuple(f"grad_{name}" for name in through), 4) if backward else ((), 1)
    bare = Provider(f"{needed} bare matrix products", partial(heads.products, needed), judged=False)
    return Case(
        "linear_token_logprobs", mode, heads.named(*size), dtype,
        inputs=partial(heads.inputs, *size, dtype, device, upstream),
        providers=providers(entropy, wrap, dynamic) | {"products": bare},
        bytes_moved=heads.bytes_moved(*size, dtype, *((2, 1) if backward else (1, 0))),
        variant="with entropy" if entropy else "alone",
        flops=heads.product_flops(*size) * (3 if backward else 1),
        exact=wrap(exact if entropy else alone(exact)),
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    sizes = heads.sizes(device, quick)
    for size in sizes:
        for mode in ("forward", "forward+backward"):
            yield case(size, dtype, device, mode)
    yield case(sizes[0], dtype, device, entropy=False)
