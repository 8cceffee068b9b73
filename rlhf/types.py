"""Records that stages exchange. B sequences, T padded length, R longest response.

Sequences are right-padded with prompt and response side by side. Padding is known by the lengths alone, never by the
pad id, so a pad token that equals the EOS token does no harm. Per-token fields are aligned with the response: column j
belongs to response token j.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptBatch:
    token_ids: list[list[int]]  # B prompts, no padding, none empty
    texts: list[str]  # B, as the reward functions see them
    columns: dict[str, list]  # the rows' other columns, B values each


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts with responses: what every log-probability and score is computed on."""

    ids: Tensor  # (B, T) int64
    prompt_lengths: Tensor  # (B,) int64, each >= 1
    response_lengths: Tensor  # (B,) int64

    @property
    def lengths(self) -> Tensor:  # (B,) int64
        return self.prompt_lengths + self.response_lengths

    @property
    def response_mask(self) -> Tensor:  # (B, R) bool
        return length_mask(self.response_lengths)

    @property
    def response_ids(self) -> Tensor:  # (B, R) int64, any valid id beyond a response
        at = self.prompt_lengths[:, None] + torch.arange(self.response_mask.shape[1], device=self.ids.device)
        return self.ids.gather(1, at.clamp(max=self.ids.shape[1] - 1))

    def rows(self, index: Tensor) -> SequenceBatch:
        """These rows, padded to their own longest: what a row is computed with depends on its micro-batch alone."""
        prompts, responses = self.prompt_lengths[index], self.response_lengths[index]
        return SequenceBatch(self.ids[index, : int((prompts + responses).max())], prompts, responses)

    def to(self, device: torch.device) -> SequenceBatch:
        return SequenceBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class Rollout:
    sequences: SequenceBatch
    finished: Tensor  # (B,) bool: the response ends with an EOS token
    prompts: PromptBatch
    completions: list[str]  # B, special tokens left out


@dataclass(frozen=True)
class Experience:
    sequences: SequenceBatch
    logprobs: Tensor  # (B, R) float32, of the policy that sampled
    ref_logprobs: Tensor  # (B, R) float32
    values: Tensor  # (B, R) float32, before each response token
    scores: Tensor  # (B,) float32
    advantages: Tensor | None = None  # (B, R) float32
    returns: Tensor | None = None  # (B, R) float32
    kl: Tensor | None = None  # (B, R) float32

    def rows(self, index: Tensor) -> Experience:
        """These rows, padded to their own longest."""
        sequences = self.sequences.rows(index)
        width = sequences.response_mask.shape[1]
        cut = {
            f.name: value[index, :width] if value.dim() == 2 else value[index]
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


def length_mask(
    lengths: Tensor,  # (B,) int64
) -> Tensor:  # (B, max length) bool
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def pad_sequences(
    prompts: list[list[int]],
    responses: list[list[int]],
    pad_id: int,
) -> SequenceBatch:
    rows = [p + r for p, r in zip(prompts, responses)]
    width = max(map(len, rows))
    return SequenceBatch(
        torch.tensor([row + [pad_id] * (width - len(row)) for row in rows]),
        torch.tensor([len(p) for p in prompts]),
        torch.tensor([len(r) for r in responses]),
    )
