"""Statistics of a loss as one small device tensor of sums and counts: adding is exact, reading a view is the only
host sync."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class _Stats:
    """Sums with a name each. A view is what `_means` makes of one: a 0-dim device tensor."""

    sums: Tensor  # (FIELDS,) float64

    FIELDS: ClassVar[tuple[str, ...]] = ()
    HIDDEN: ClassVar[tuple[str, ...]] = ()  # which have no view

    def __add__(self, other):
        """The statistics of both batches together."""
        return type(self)(self.sums + other.sums)

    def all_reduce_(self, group: dist.ProcessGroup | None = None):
        """Merges the ranks of a process group in place, on the device."""
        dist.all_reduce(self.sums, group=group)
        return self

    def _means(self) -> Tensor:
        raise NotImplementedError

    def as_dict(self) -> dict[str, float]:
        """Every view as a Python number: one host sync."""
        return {name: x for name, x in zip(self.FIELDS, self._means().tolist()) if name not in self.HIDDEN}

    def __getattr__(self, name: str) -> Tensor:
        views = [field for field in self.FIELDS if field not in self.HIDDEN]
        if name not in views:
            raise AttributeError(f"{type(self).__name__} has no view {name!r}; it has {', '.join(views)}")
        return self._means()[self.FIELDS.index(name)]


# The first four are sums with the weights of the reduction, to be divided by `units` (tokens or sequences; 0 for
# reduction="sum"); those between tokens and ratio_max are sums over tokens.
PPO_FIELDS = (
    "policy_loss", "value_loss", "entropy", "kl", "units", "tokens", "approx_kl", "approx_kl_k3",
    "clip_fraction", "dual_clip_fraction", "value_clip_fraction", "ratio_mean", "ratio_max",
)  # fmt: skip
_OF_VALUES = [i for i, name in enumerate(PPO_FIELDS) if name.startswith("value_")]
_UNITS, _TOKENS, _MAX = PPO_FIELDS.index("units"), PPO_FIELDS.index("tokens"), len(PPO_FIELDS) - 1


@dataclass(frozen=True)
class PPOStats(_Stats):
    """Statistics of `ppo_loss`. Views are 0-dim device tensors; `as_dict()` reads all of them with one transfer.

    policy_loss, value_loss, entropy, kl: as the reduction reduces them, so that loss is their combination
    (denominator aside). approx_kl is the mean of d^2/2 and approx_kl_k3 of exp(d) - 1 - d, d = logprobs -
    old_logprobs; the fractions say how often each clip decided the loss. A batch with no counted token gives zeros.
    """

    FIELDS: ClassVar = PPO_FIELDS  # (13,) float64
    HIDDEN: ClassVar = ("units",)

    def __add__(self, other: PPOStats) -> PPOStats:
        """The statistics of both batches together."""
        merged = self.sums + other.sums
        merged[_MAX] = torch.maximum(self.sums[_MAX], other.sums[_MAX])
        return PPOStats(merged)

    def with_values_of(self, other: PPOStats) -> PPOStats:
        """These statistics with the value terms of `other`, of the same tokens: for a loss formed in two calls,
        linear_ppo_loss for the policy and ppo_loss for the values."""
        sums = self.sums.clone()
        for i in _OF_VALUES:
            sums[i] = other.sums[i]
        return PPOStats(sums)

    def all_reduce_(self, group: dist.ProcessGroup | None = None) -> PPOStats:
        """Merges the ranks of a process group in place, on the device."""
        largest = self.sums[_MAX].clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(self.sums, group=group)
        self.sums[_MAX] = largest
        return self

    def _means(self) -> Tensor:
        tokens = self.sums[_TOKENS].clamp(min=1)
        means = self.sums / tokens
        means[:_UNITS] = self.sums[:_UNITS] / self.sums[_UNITS].clamp(min=1)
        means[_UNITS : _TOKENS + 1] = self.sums[_UNITS : _TOKENS + 1]
        means[_MAX] = self.sums[_MAX]
        return means


DPO_FIELDS = ("chosen_rewards", "rejected_rewards", "margins", "accuracy", "logps_chosen", "logps_rejected", "pairs")


@dataclass(frozen=True)
class DPOStats(_Stats):
    """Statistics of `dpo_loss`: means over pairs, 0-dim device tensors; `as_dict()` reads all with one transfer.

    A reward is beta * (logp - ref_logp), without the reference where the loss takes none, and of mean log-probabilities
    for simpo and orpo. accuracy is how often the chosen reward is the larger; logps are sums over sequences.
    """

    FIELDS: ClassVar = DPO_FIELDS  # (7,) float64

    def _means(self) -> Tensor:
        return torch.cat([self.sums[:-1] / self.sums[-1].clamp(min=1), self.sums[-1:]])


KTO_FIELDS = ("chosen_rewards", "rejected_rewards", "logps_chosen", "logps_rejected", "chosen", "rejected")


@dataclass(frozen=True)
class KTOStats(_Stats):
    """Statistics of `kto_loss`: means over desirable (chosen) and undesirable (rejected) sequences, and how many there
    are; 0-dim device tensors. `as_dict()` reads all with one transfer. A reward is beta * (logp - ref_logp); means of a
    kind without sequences are 0."""

    FIELDS: ClassVar = KTO_FIELDS  # (6,) float64

    def _means(self) -> Tensor:
        counts = self.sums[4:]
        return torch.cat([self.sums[:4] / counts.clamp(min=1).repeat(2), counts])
