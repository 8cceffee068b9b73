"""ppo_advantages with one score a sequence and whitened advantages: TRL's path from log-probabilities to advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .bench_gae import GAMMA, LAM, compiled_blocks, loop
from .bench_masked_whiten import whiten
from .case import Case, Inputs, Outputs, Provider, compiled, masked, response_mask

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES, GPU_SIZES = ((512, 1024),), ((8, 64),), ((512, 1024), (8192, 4096))
OPTIONS = rlhf_kernels.AdvantageOptions(kl_coef=0.05, kl_estimator="k1", gamma=GAMMA, lam=LAM, score_clip=5.0)


def shaped_rewards(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    kl = (logprobs - ref_logprobs) * mask
    rewards = -OPTIONS.kl_coef * kl
    last = mask.sum(1, keepdim=True) - 1
    clipped = torch.clamp(scores, -OPTIONS.score_clip, OPTIONS.score_clip)
    return rewards.scatter_add(1, last, clipped[:, None]), kl


def peer(shape: Callable, estimate: Callable, whiten: Callable) -> Callable[..., Outputs]:
    """TRL's three steps: shaped rewards, GAE, whitening."""

    def run(logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor, mask: Tensor) -> Outputs:
        rewards, kl = shape(logprobs, ref_logprobs, scores, mask)
        advantages, returns = estimate(rewards, values, mask).values()
        return {"advantages": whiten(advantages, mask), "returns": returns, "rewards": rewards, "kl": kl}

    return run


def ours(logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor, mask: Tensor) -> Outputs:
    return rlhf_kernels.ppo_advantages(logprobs, ref_logprobs, values, scores, mask, options=OPTIONS)._asdict()


def _inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, dtype=dtype, device=device, generator=generator)
    logprobs = -randn(batch, length).abs()
    return {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.1 * randn(batch, length),
        "values": randn(batch, length),
        "scores": 3 * randn(batch),
        "mask": response_mask(batch, length, device, generator),
    }


def verl(logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor, mask: Tensor) -> Outputs:
    """As verl's trainer does it. Its whitening divides by n - 1, so the advantages are not comparable."""
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return, compute_rewards

    of_tokens = torch.zeros_like(logprobs)
    clipped = torch.clamp(scores, -OPTIONS.score_clip, OPTIONS.score_clip)
    of_tokens.scatter_(1, mask.sum(1, keepdim=True) - 1, clipped[:, None])
    counted = mask.to(logprobs.dtype)
    rewards = compute_rewards(of_tokens, logprobs, ref_logprobs, OPTIONS.kl_coef) * counted
    _, returns = compute_gae_advantage_return(rewards, values, counted, GAMMA, LAM)
    return {"returns": returns, "rewards": rewards, "mask": mask}


def case(
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    dynamic: bool | None = False,
) -> Case:
    batch, length = size
    steps = compiled(shaped_rewards, dynamic), compiled_blocks(dynamic), compiled(whiten, dynamic)
    return Case(
        "ppo_advantages", "forward", {"sequences": batch, "length": length}, dtype,
        inputs=partial(_inputs, batch, length, dtype, device),
        providers={
            "ours": Provider("rlhf_kernels.ppo_advantages", ours),
            "eager": Provider("TRL's rewards, loop over time, whitening", peer(shaped_rewards, loop, whiten)),
            "compile": Provider("each step of eager compiled, the loop in blocks", peer(*steps)),
            "verl": Provider("verl's compute_rewards and compute_gae_advantage_return", verl, package="verl"),
        },
        # three floats and a byte of mask in, four floats out; a score a sequence
        bytes_moved=batch * length * (7 * dtype.itemsize + 1) + batch * dtype.itemsize,
        comparable=masked,
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for size in QUICK_SIZES if quick else GPU_SIZES if device.type == "cuda" else SIZES:
        yield case(size, dtype, device)
