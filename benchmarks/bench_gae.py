"""gae of a rollout batch: many sequences, and few long ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .case import Case, Inputs, Outputs, Provider, compiled, masked, response_mask

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES = ((512, 2048), (8, 8192)), ((8, 64),)
GPU_SIZES = ((512, 2048), (8192, 4096), (32768, 8))
PACKED, GPU_PACKED, QUICK_PACKED = 256, 4096, 8  # sequences
GAMMA, LAM = 1.0, 0.95
BLOCK = 32  # steps in a compiled graph: torch.compile takes 0.2 s a step, 8 minutes for 2,048


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
    """TRL's and OpenRLHF's loop over time: no mask inside, so right padding only."""
    rewards, values = rewards * mask, values * mask
    advantage, next_value, steps = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        next_value = values[:, t]
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], dim=1) * mask
    return {"advantages": advantages, "returns": advantages + values}


def verl(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
    """verl's loop over time, which takes any mask. It whitens the advantages too: only the returns are comparable."""
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    _, returns = compute_gae_advantage_return(rewards, values, mask.to(rewards.dtype), GAMMA, LAM)
    return {"returns": returns, "mask": mask}


def _block(rewards: Tensor, values: Tensor, advantage: Tensor, next_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    steps = []
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * advantage
        next_value = values[:, t]
        steps.append(advantage)
    return torch.stack(steps[::-1], dim=1), advantage, next_value.clone()


def compiled_blocks(dynamic: bool | None = False) -> Callable[..., Outputs]:
    """The loop of TRL, 32 steps a compiled graph."""
    block = compiled(_block, dynamic)

    def run(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
        rewards, values = rewards * mask, values * mask
        # Two tensors: one given twice would be compiled for, once more.
        advantage, next_value = rewards.new_zeros(2, rewards.shape[0]).unbind()
        blocks = []
        for part in reversed(range(0, rewards.shape[1], BLOCK)):
            span = slice(part, part + BLOCK)
            advantages, advantage, next_value = block(rewards[:, span], values[:, span], advantage, next_value)
            blocks.append(advantages)
        advantages = torch.cat(blocks[::-1], dim=1) * mask
        return {"advantages": advantages, "returns": advantages + values}

    return run


def ours(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
    advantages, returns = rlhf_kernels.gae(rewards, values, mask, gamma=GAMMA, lam=LAM)
    return {"advantages": advantages, "returns": returns}


def _inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rewards, values = torch.randn(2, batch, length, dtype=dtype, device=device, generator=generator)
    return {"rewards": rewards, "values": values, "mask": response_mask(batch, length, device, generator)}


def case(
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    dynamic: bool | None = False,
) -> Case:
    batch, length = size
    return Case(
        "gae", "forward", {"sequences": batch, "length": length}, dtype,
        inputs=partial(_inputs, batch, length, dtype, device),
        providers={
            "ours": Provider("rlhf_kernels.gae", ours),
            "eager": Provider("the loop over time of TRL and OpenRLHF", loop),
            "compile": Provider(f"torch.compile of that loop, {BLOCK} steps a graph", compiled_blocks(dynamic)),
            "verl": Provider("verl's compute_gae_advantage_return, whitening included", verl, package="verl"),
        },
        # rewards, values, advantages, returns, and a byte of mask
        bytes_moved=batch * length * (4 * dtype.itemsize + 1),
        comparable=masked,
    )  # fmt: skip


def packed(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, at: Tensor) -> Outputs:
    found = rlhf_kernels.gae(rewards, values, cu_seqlens=cu_seqlens, gamma=GAMMA, lam=LAM)
    return dict(zip(("advantages", "returns"), found))


def padded(estimate: Callable[..., Outputs], shape: tuple[int, int]) -> Callable[..., Outputs]:
    """A padded estimate of packed tokens: there and back. `at` is a token's place in the (B, T) rectangle, known."""

    def run(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, at: Tensor) -> Outputs:
        there = [torch.zeros(shape, dtype=x.dtype, device=x.device) for x in (rewards, values)]
        mask = torch.zeros(shape, dtype=torch.bool, device=at.device)
        for rectangle, x in zip((*there, mask), (rewards, values, True)):
            rectangle.view(-1)[at] = x
        return {name: x.reshape(-1)[at] for name, x in estimate(*there, mask).items()}

    return run


def _lengths(sequences: int) -> list[int]:
    """Responses as they come: lognormal, median 400, the longest cut at 4,096."""
    normal = torch.randn(sequences, generator=torch.Generator().manual_seed(0))
    return (400 * torch.exp(0.8 * normal)).long().clamp(16, 4096).tolist()


def _packed_inputs(lengths: list[int], dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rewards, values = torch.randn(2, sum(lengths), dtype=dtype, device=device, generator=generator)
    at = torch.cat([row * max(lengths) + torch.arange(n) for row, n in enumerate(lengths)]).to(device)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    return {"rewards": rewards, "values": values, "cu_seqlens": ends, "at": at}


def packed_case(sequences: int, dtype: torch.dtype, device: torch.device) -> Case:
    lengths = _lengths(sequences)
    shape = (sequences, max(lengths))
    return Case(
        "gae", "forward", {"sequences": sequences, "tokens": sum(lengths)}, dtype,
        inputs=partial(_packed_inputs, lengths, dtype, device),
        providers={
            "ours": Provider("rlhf_kernels.gae on packed tokens", packed),
            "eager": Provider("the loop of TRL and OpenRLHF, padded and back", padded(loop, shape)),
            "compile": Provider("torch.compile of that loop, padded and back", padded(compiled_blocks(), shape)),
        },
        bytes_moved=sum(lengths) * 4 * dtype.itemsize,
        variant="packed",
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    cuda = device.type == "cuda"
    for size in QUICK_SIZES if quick else GPU_SIZES if cuda else SIZES:
        yield case(size, dtype, device)
    yield packed_case(QUICK_PACKED if quick else GPU_PACKED if cuda else PACKED, dtype, device)
