"""Records that stages exchange. B sequences, T padded length, R longest response, N tokens, n response tokens.

Sequences are right-padded with prompt and response side by side; lengths are on the host, so that nothing waits for the
device to know a shape. Padding is known by the lengths alone, never by the pad id, so a pad token that equals the EOS
token does no harm. What is stored about each response token is padded to (B, R), column j about response token j;
models and losses work on packed tokens, (n,), row after row. Response tokens that do not count (what a user or a tool
said between two turns of the assistant) are read and nothing else: they are not among the n, and are 0 in (B, R).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import rlhf_kernels


@dataclass(frozen=True)
class PromptBatch:
    token_ids: list[list[int]]  # B prompts, no padding, none empty
    texts: list[str]  # B, as the reward functions see them
    columns: dict[str, list]  # the rows' other columns, B values each


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts with responses: what every log-probability and score is computed on."""

    ids: Tensor  # (B, T) int64
    prompt_lengths: Tensor  # (B,) int64 on the host, each >= 1
    response_lengths: Tensor  # (B,) int64 on the host
    counted: Tensor | None = None  # (B, R) bool on the host, False beyond a response; by default every response token

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> Tensor:  # (B,) int64 on the host
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def width(self) -> int:
        """R."""
        return int(self.response_lengths.max())

    @cached_property
    def counted_lengths(self) -> Tensor:  # (B,) int64 on the host
        return self.response_lengths if self.counted is None else self.counted.sum(1)

    @cached_property
    def response_mask(self) -> Tensor:  # (B, R) bool, of the tokens that count
        mask = self.counted
        if mask is None:
            mask = torch.arange(self.width) < self.response_lengths[:, None]
        return mask.to(self.ids.device, non_blocking=True)

    @cached_property
    def cu_seqlens(self) -> Tensor:  # (B+1,) int32, of the packed response tokens
        return cumulated(self.counted_lengths).int().to(self.ids.device, non_blocking=True)

    @cached_property
    def tokens(self) -> Tensor:  # (N,) int64, where each token stands in the flattened ids
        starts = torch.arange(len(self)) * self.ids.shape[1]
        return ranges(starts, self.lengths).to(self.ids.device, non_blocking=True)

    @cached_property
    def positions(self) -> Tensor:  # (N,) int64, of each token in its sequence
        return ranges(torch.zeros_like(self.lengths), self.lengths).to(self.ids.device, non_blocking=True)

    @cached_property
    def predictors(self) -> Tensor:  # (n,) int64, which of the N tokens each response token is predicted from
        return self._from(cumulated(self.lengths)[:-1] + self.prompt_lengths - 1)

    @cached_property
    def last_tokens(self) -> Tensor:  # (B,) int64, which of the N tokens is a sequence's last
        return (cumulated(self.lengths)[1:] - 1).to(self.ids.device, non_blocking=True)

    @cached_property
    def response_tokens(self) -> Tensor:  # (n,) int64, where each response token stands in a flattened (B, R)
        return self._from(torch.arange(len(self)) * self.width)

    def _from(self, starts: Tensor) -> Tensor:  # (B,) to (n,) int64
        """Where each counted response token stands, if a row's first response token stands at its start."""
        found = ranges(starts, self.response_lengths)
        if self.counted is not None:
            found = found[self.counted[torch.arange(self.width) < self.response_lengths[:, None]]]
        return found.to(self.ids.device, non_blocking=True)

    @cached_property
    def response_ids(self) -> Tensor:  # (n,) int64
        return self.ids.flatten()[self.tokens[self.predictors + 1]]

    def pack(self, per_token: Tensor) -> Tensor:  # (B, R) to (n,)
        return per_token.flatten()[self.response_tokens]

    def unpack(self, packed: Tensor) -> Tensor:  # (n,) to (B, R), 0 elsewhere
        flat = packed.new_zeros(len(self) * self.width)
        return flat.index_copy(0, self.response_tokens, packed).view(len(self), self.width)

    def rows(self, index: Tensor) -> SequenceBatch:
        """These rows (int64 on the host), padded to their own longest: what a row is computed with depends on its
        micro-batch alone."""
        prompts, responses = self.prompt_lengths[index], self.response_lengths[index]
        chosen = self.ids[index.to(self.ids.device, non_blocking=True)]
        counted = None if self.counted is None else self.counted[index, : int(responses.max())]
        return SequenceBatch(chosen[:, : int((prompts + responses).max())], prompts, responses, counted)

    def micro_batches(self, sequences: int, tokens: int | None, packed: bool) -> list[Tensor]:
        """Rows, int64 on the host, of forward passes over `sequences` rows each, or over as many as have `tokens`."""
        return micro_batches(torch.arange(len(self)), self.lengths, sequences, tokens, packed)

    def to(self, device: torch.device) -> SequenceBatch:
        return replace(self, ids=self.ids.to(device, non_blocking=True))


@dataclass(frozen=True)
class Rollout:
    sequences: SequenceBatch
    finished: Tensor  # (B,) bool on the host: the response ends with an EOS token
    prompts: PromptBatch
    completions: list[str]  # B, special tokens left out
    completion_ids: list[list[int]]  # B responses, the EOS token included


@dataclass(frozen=True)
class Experience:
    sequences: SequenceBatch
    logprobs: Tensor  # (B, R) float32, of the policy that sampled
    ref_logprobs: Tensor  # (B, R) float32
    kl: Tensor  # (B, R) float32, policy to reference by the configured estimator
    scores: Tensor  # (B,) float32, the sum of a response's rewards
    rewards: Tensor | None = None  # (B, R) float32, of each token, where some reward tells tokens apart
    values: Tensor | None = None  # (B, R) float32, before each response token
    advantages: Tensor | None = None  # (B, R) float32
    returns: Tensor | None = None  # (B, R) float32

    def rows(self, index: Tensor) -> Experience:
        """These rows (int64 on the host), padded to their own longest."""
        sequences, there = self.sequences.rows(index), index.to(self.scores.device, non_blocking=True)
        cut = {
            f.name: value[there, : sequences.width] if value.dim() == 2 else value[there]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, sequences=sequences, **cut)


@dataclass(frozen=True)
class TrainResult:
    output_dir: Path
    final_dir: Path  # the model, as transformers loads it
    steps: int
    metrics: dict[str, float]  # of the last step


def cumulated(lengths: Tensor) -> Tensor:  # (B,) to (B+1,) int64, from 0
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def ranges(
    starts: Tensor,  # (B,) int64
    lengths: Tensor,  # (B,) int64
) -> Tensor:  # (sum of lengths,) int64
    """start, start + 1, ... of each row, one after the other."""
    shift = starts - cumulated(lengths)[:-1]
    return torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)


def micro_batches(
    rows: Tensor,  # (n,) int64 on the host
    lengths: Tensor,  # (B,) int64 on the host, tokens of every row
    sequences: int,
    tokens: int | None,
    packed: bool,
) -> list[Tensor]:
    """Rows of each forward pass: `sequences` of them in order, or as many as have `tokens` together, padding included
    where they are not packed."""
    if tokens is None:
        return list(rows.split(sequences))
    return [rows[torch.tensor(sorted(part))] for part in plan_passes(lengths[rows].tolist(), tokens, packed)]


def plan_passes(lengths: list[int], tokens: int, packed: bool) -> list[list[int]]:
    """Indices of each pass; a row longer than `tokens` has a pass of its own, and leaves the budget of the others."""
    alone = [i for i, n in enumerate(lengths) if n > tokens]
    fitting = [i for i, n in enumerate(lengths) if n <= tokens]
    plan = rlhf_kernels.pack_sequences if packed else rlhf_kernels.plan_microbatches
    return [[i] for i in alone] + [[fitting[i] for i in part] for part in plan([lengths[i] for i in fitting], tokens)]


def pad_sequences(
    prompts: list[list[int]],
    responses: list[list[int]],
    pad_id: int,
    counted: list[list[bool]] | None = None,  # of the responses' tokens; by default all of them
) -> SequenceBatch:
    return SequenceBatch(
        _padded([p + r for p, r in zip(prompts, responses)], pad_id),
        torch.tensor([len(p) for p in prompts]),
        torch.tensor([len(r) for r in responses]),
        None if counted is None else _padded(counted, False),
    )


def _padded(rows: list[list], filler: int | bool) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])
