"""ppo_loss with all terms (policy with dual clip, clipped value, entropy bonus, KL penalty) and all statistics."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .case import Case, Inputs, Outputs, Provider, compiled, response_mask, with_backward

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES, GPU_SIZES = ((512, 1024),), ((8, 64),), ((8, 1024), (64, 1024), (1024, 1024))
OPTIONS = rlhf_kernels.PPOLossOptions(dual_clip=3.0, entropy_coef=0.01, kl_coef=0.05)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def eager(logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy, ref_logprobs) -> Outputs:
    """The unfused loss of TRL and verl with its metrics; they stay on the device, in the order of PPOStats.as_dict."""
    o, mean = OPTIONS, partial(masked_mean, mask=mask)
    d = logprobs - old_logprobs
    ratio = torch.exp(d)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - o.clip_low, 1 + o.clip_high)
    larger = torch.max(unclipped, clipped)
    dual = -advantages * o.dual_clip
    policy = torch.where(advantages < 0, torch.min(larger, dual), larger)
    clipped_values = torch.clamp(values, old_values - o.value_clip, old_values + o.value_clip)
    value_error, clipped_error = (values - returns) ** 2, (clipped_values - returns) ** 2
    x = ref_logprobs - logprobs
    kl = torch.exp(x) - x - 1
    terms = [mean(policy), mean(0.5 * torch.max(value_error, clipped_error)), mean(entropy), mean(kl)]
    loss = terms[0] + o.value_coef * terms[1] - o.entropy_coef * terms[2] + o.kl_coef * terms[3]
    with torch.no_grad():
        is_dual = (larger > dual) & (advantages < 0)
        metrics = [
            *terms, mask.sum(), mean(0.5 * d * d), mean(ratio - 1 - d), mean((clipped > unclipped).to(d.dtype)),
            mean(is_dual.to(d.dtype)),
            mean((clipped_error > value_error).to(d.dtype)), mean(ratio), (ratio * mask).max(),
        ]  # fmt: skip
        stats = torch.stack([metric.detach().to(d.dtype) for metric in metrics])
    return {"loss": loss, "stats": stats}


def ours(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, **others: Tensor) -> Outputs:
    loss, stats = rlhf_kernels.ppo_loss(logprobs, old_logprobs, advantages, mask, **others, options=OPTIONS)
    return {"loss": loss, "stats": stats}


def verl(logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy, ref_logprobs) -> Outputs:
    """The losses of verl's actor and critic in one. They clamp log-ratios to 20, which these inputs do not reach, and
    compute other metrics."""
    from verl.trainer.ppo import core_algos

    o, mask = OPTIONS, mask.to(logprobs.dtype)
    clips = {"cliprange_low": o.clip_low, "cliprange_high": o.clip_high, "clip_ratio_c": o.dual_clip}
    policy = core_algos.compute_policy_loss.__wrapped__(old_logprobs, logprobs, advantages, mask, **clips)[0]
    value = core_algos.compute_value_loss(values, returns, old_values, mask, o.value_clip)[0]
    k3 = core_algos.kl_penalty(logprobs, ref_logprobs, "low_var_kl")
    kl, bonus = (core_algos.agg_loss(x, mask, "token-mean") for x in (k3, entropy))
    return {"loss": policy + o.value_coef * value - o.entropy_coef * bonus + o.kl_coef * kl}


def _with_means(outputs: Outputs) -> Outputs:
    """Our statistics, sums until somebody reads them, as the vector of means that eager has."""
    stats = outputs.get("stats")
    if stats is None:
        return outputs
    if isinstance(stats, rlhf_kernels.PPOStats):
        stats = torch.tensor(list(stats.as_dict().values()), dtype=torch.float64, device=stats.sums.device)
    return {**outputs, "stats": stats}


def _inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, batch, length, dtype=dtype, device=device, generator=generator)
    logprobs, values = -randn().abs(), randn()
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.2 * randn(),
        "advantages": randn(),
        "mask": response_mask(batch, length, device, generator),
        "values": values,
        "old_values": values + 0.3 * randn(),
        "returns": values + randn(),
        "entropy": randn().abs(),
        "ref_logprobs": logprobs + 0.2 * randn(),
    }


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    wrap = partial(with_backward, wrt=("logprobs", "values", "entropy"), through=("loss",))
    for batch, length in QUICK_SIZES if quick else GPU_SIZES if device.type == "cuda" else SIZES:
        yield Case(
            "ppo_loss", "forward+backward", {"sequences": batch, "length": length}, dtype,
            inputs=partial(_inputs, batch, length, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.ppo_loss", wrap(ours)),
                "eager": Provider("the unfused loss of TRL and verl with all its metrics", wrap(eager)),
                "compile": Provider("torch.compile of eager", wrap(compiled(eager))),
                "verl": Provider("verl's policy, value, entropy and KL losses", wrap(verl), package="verl"),
            },
            # eight floats and a byte of mask in, three gradients out
            bytes_moved=batch * length * (11 * dtype.itemsize + 1),
            comparable=_with_means,
        )  # fmt: skip
