"""gae of a rollout batch: many sequences, and few long ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .harness import Case, Inputs, Outputs, Provider, compiled, response_mask

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES = ((512, 2048), (8, 8192)), ((8, 64),)
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


def verl_style(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
    """verl's loop over time: carries the last value and advantage across masked tokens, so any mask, as ours."""
    mask = mask.to(rewards.dtype)
    advantage, next_value, steps = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        candidate = delta + GAMMA * LAM * advantage
        next_value = values[:, t] * mask[:, t] + (1 - mask[:, t]) * next_value
        advantage = candidate * mask[:, t] + (1 - mask[:, t]) * advantage
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], dim=1) * mask
    return {"advantages": advantages, "returns": (advantages + values) * mask}


def _block(rewards: Tensor, values: Tensor, advantage: Tensor, next_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    steps = []
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * advantage
        next_value = values[:, t]
        steps.append(advantage)
    return torch.stack(steps[::-1], dim=1), advantage, next_value.clone()


def compiled_blocks() -> Callable[..., Outputs]:
    """The loop of TRL, 32 steps a compiled graph."""
    block = compiled(_block)

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


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for batch, length in QUICK_SIZES if quick else SIZES:
        yield Case(
            "gae", "forward", (batch, length), dtype,
            inputs=partial(_inputs, batch, length, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.gae", ours),
                "eager": Provider("the loop over time of TRL and OpenRLHF", loop),
                "compile": Provider(f"torch.compile of that loop, {BLOCK} steps a graph", compiled_blocks()),
                "verl": Provider("the loop over time of verl, which like ours takes any mask", verl_style),
            },
            # rewards, values, advantages, returns, and a byte of mask
            bytes_moved=batch * length * (4 * dtype.itemsize + 1),
        )  # fmt: skip
