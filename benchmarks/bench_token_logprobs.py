"""token_logprobs at the vocabularies of Llama 3, Qwen 2.5 and Llama 2: with entropy, both differentiable, and alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

import rlhf_kernels

from .case import Case, Inputs, Outputs, Provider, compiled, with_backward

DTYPES = ("float32", "float64", "bfloat16", "float16")
HALF_ON_CUDA = True
SIZES, QUICK_SIZES = ((512, 151936), (2048, 32000)), ((16, 1000),)
GPU_SIZES = ((8192, 128256), (8192, 151936))
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


def trl(logits: Tensor, token_ids: Tensor) -> Outputs:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    found = selective_log_softmax_and_entropy(logits, token_ids, True, TEMPERATURE, None)
    return dict(zip(("logprobs", "entropy"), found))


def verl(logits: Tensor, token_ids: Tensor) -> Outputs:
    """As its workers run it: the entropy compiled."""
    from verl.utils.torch_functional import logprobs_from_logits

    scaled = logits / TEMPERATURE
    found = logprobs_from_logits(scaled, token_ids, inplace_backward=False), _verl_entropy()(scaled)
    return dict(zip(("logprobs", "entropy"), found))


@cache
def _verl_entropy() -> Callable[[Tensor], Tensor]:
    from verl.utils.torch_functional import entropy_from_logits

    return torch.compile(entropy_from_logits, dynamic=True)


def eager_alone(logits: Tensor, token_ids: Tensor) -> Outputs:
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return {"logprobs": logp.gather(-1, token_ids[..., None]).squeeze(-1)}


def ours_alone(logits: Tensor, token_ids: Tensor) -> Outputs:
    return {"logprobs": rlhf_kernels.token_logprobs(logits, token_ids)}


def torch_alone(logits: Tensor, token_ids: Tensor) -> Outputs:
    return {"logprobs": -torch.nn.functional.cross_entropy(logits, token_ids, reduction="none")}


def trl_alone(logits: Tensor, token_ids: Tensor) -> Outputs:
    from trl.trainer.utils import selective_log_softmax

    return {"logprobs": selective_log_softmax(logits, token_ids)}


def verl_alone(logits: Tensor, token_ids: Tensor) -> Outputs:
    from verl.utils.torch_functional import logprobs_from_logits

    return {"logprobs": logprobs_from_logits(logits, token_ids, inplace_backward=False)}


def flash_attn_alone(logits: Tensor, token_ids: Tensor) -> Outputs:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return {"logprobs": -cross_entropy_loss(logits, token_ids, inplace_backward=False)[0]}


def providers(entropy: bool, wrap: Callable, dynamic: bool | None) -> dict[str, Provider]:
    if entropy:
        return {
            "ours": Provider("rlhf_kernels.token_logprobs", wrap(ours)),
            "eager": Provider("log_softmax, gather, entropy from the same log_softmax", wrap(eager)),
            "compile": Provider("torch.compile of eager", wrap(compiled(eager, dynamic))),
            "trl": Provider("TRL's selective_log_softmax_and_entropy", wrap(trl), package="trl"),
            "verl": Provider("verl's logprobs_from_logits and entropy_from_logits", wrap(verl), package="verl"),
        }
    return {
        "ours": Provider("rlhf_kernels.token_logprobs", wrap(ours_alone)),
        "eager": Provider("log_softmax, gather", wrap(eager_alone)),
        "compile": Provider("torch.compile of eager", wrap(compiled(eager_alone, dynamic))),
        "torch": Provider("torch's cross_entropy, in the dtype of the logits", wrap(torch_alone)),
        "trl": Provider("TRL's selective_log_softmax", wrap(trl_alone), package="trl"),
        "verl": Provider("verl's logprobs_from_logits", wrap(verl_alone), package="verl"),
        "flash_attn": Provider(
            "flash-attention's cross_entropy_loss", wrap(flash_attn_alone), package="flash_attn", needs_cuda=True
        ),
    }


def _inputs(rows: int, vocab: int, dtype: torch.dtype, device: torch.device, upstream: tuple[str, ...]) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    inputs = {
        "logits": 2 * torch.randn(rows, vocab, dtype=dtype, device=device, generator=generator),
        "token_ids": torch.randint(vocab, (rows,), device=device, generator=generator),
    }
    per_token = torch.promote_types(dtype, torch.float32)
    return inputs | {name: torch.randn(rows, dtype=per_token, device=device, generator=generator) for name in upstream}


def case(
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    mode: str = "forward+backward",
    entropy: bool = True,
    dynamic: bool | None = False,
) -> Case:
    (rows, vocab), backward = size, mode != "forward"
    through = ("logprobs", "entropy") if entropy else ("logprobs",)
    upstream = tuple(f"grad_{name}" for name in through) if backward else ()
    wrap = (lambda f: with_backward(f, ("logits",), through)) if backward else (lambda f: f)
    logits, per_token = rows * vocab * dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    return Case(
        "token_logprobs", mode, {"tokens": rows, "vocabulary": vocab}, dtype,
        inputs=partial(_inputs, rows, vocab, dtype, device, upstream),
        providers=providers(entropy, wrap, dynamic),
        # The logits once; backward reads them again and writes a gradient of their size. A row has an id, a number an
        # output and, in backward, one upstream gradient each.
        bytes_moved=logits * (3 if backward else 1) + rows * (8 + per_token * (len(through) + len(upstream))),
        variant="with entropy" if entropy else "alone",
        truth_rows=TRUTH_ROWS,
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    sizes = QUICK_SIZES if quick else GPU_SIZES if device.type == "cuda" else SIZES
    for size in sizes:
        for mode in ("forward", "forward+backward"):
            yield case(size, dtype, device, mode)
    yield case(sizes[0], dtype, device, entropy=False)
