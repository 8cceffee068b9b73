"""group_advantages of GRPO: samples in groups of 8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rlhf_kernels

from .case import Case, Inputs, Outputs, Provider, compiled

DTYPES = ("float32", "float64")
SIZES, QUICK_SIZES = (1024,), (16,)
GROUP, EPS = 8, 1e-4


def eager(scores: Tensor, group_ids: Tensor) -> Outputs:
    """TRL's: groups of one size that lie next to each other."""
    groups = scores.view(-1, GROUP)
    mean, deviation = (x.repeat_interleave(GROUP) for x in (groups.mean(1), groups.std(1)))
    return {"advantages": (scores - mean) / (deviation + EPS)}


def ours(scores: Tensor, group_ids: Tensor) -> Outputs:
    return {"advantages": rlhf_kernels.group_advantages(scores, group_ids, eps=EPS)}


def verl(scores: Tensor, group_ids: Tensor) -> Outputs:
    """Its vectorised form. Groups of any size and place, as ours; a value a token, here one token. Its ids are on the
    host, where it keeps them."""
    import numpy as np
    from verl.trainer.ppo.core_algos import compute_grpo_vectorized_outcome_advantage

    mask = torch.ones_like(scores)[:, None]
    ids = np.arange(len(scores)) // GROUP
    found, _ = compute_grpo_vectorized_outcome_advantage(scores[:, None], mask, ids, EPS)
    return {"advantages": found[:, 0]}


def _inputs(count: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    scores = torch.randn(count, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(0))
    return {"scores": scores, "group_ids": torch.arange(count, device=device) // GROUP}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for count in QUICK_SIZES if quick else SIZES:
        yield Case(
            "group_advantages", "forward", {"sequences": count}, dtype,
            inputs=partial(_inputs, count, dtype, device),
            providers={
                "ours": Provider("rlhf_kernels.group_advantages, groups of any size and place", ours),
                "eager": Provider("TRL's view of equal groups", eager),
                "compile": Provider("torch.compile of eager", compiled(eager)),
                "verl": Provider("verl's vectorised GRPO advantages", verl, package="verl"),
            },
            bytes_moved=count * (2 * dtype.itemsize + 8),
        )  # fmt: skip
