"""Scores of rollouts: reward models, reward functions, several at once; and the KL controller."""

from __future__ import annotations

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.config import PPOConfig, UsageError
from rlhf.model import LanguageModel, Scorer, load_scorer, same_vocabulary, sequence_scores
from rlhf.types import Rollout, SequenceBatch, pad_sequences


class RewardError(UsageError):
    """A reward function that can't be found, failed, or returned something that is no list of scores."""


@dataclass(frozen=True)
class Reward:
    name: str
    score: Callable[[Rollout], list[float]]  # one finite number a response
    reader: Scorer | None = None  # the reward model, where it reads the policy's tokens as they are


def load_rewards(config: PPOConfig, policy: LanguageModel) -> list[Reward]:
    rewards = [function_reward(name) for name in config.reward]
    if config.reward_model_path:
        scorer = load_scorer(config.reward_model_path, config)
        scorer.module.requires_grad_(False)
        rewards.append(model_reward(scorer, policy, config.per_device_train_batch_size))
    return rewards


def score_rollout(
    rewards: list[Reward],
    rollout: Rollout,
    missing_eos_penalty: float | None,
    score_clip: float | None = None,
) -> tuple[Tensor, dict[str, float]]:  # (B,) float32, on the CPU; mean of each reward
    """The sum of all rewards, clipped, less the penalty where a response did not end."""
    parts = torch.tensor([reward.score(rollout) for reward in rewards], dtype=torch.float32)
    total = parts.sum(0)
    if score_clip is not None:
        total = total.clamp(-score_clip, score_clip)
    if missing_eos_penalty is not None:
        total = total - missing_eos_penalty * (~rollout.finished.cpu()).float()
    return total, {f"rewards/{reward.name}": float(scores.mean()) for reward, scores in zip(rewards, parts)}


# Reward functions


def function_reward(name: str) -> Reward:
    """`module:function`, importable from the current directory too: f(prompts, completions, **columns) -> floats."""
    function = _find(name)

    def score(rollout: Rollout) -> list[float]:
        try:
            scores = function(list(rollout.prompts.texts), list(rollout.completions), **rollout.prompts.columns)
        except Exception as error:  # a user's code may raise anything; the line must still name it
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            raise RewardError(f"reward {name}: {type(error).__name__} at {place}: {error}") from error
        return _checked(name, scores, rollout)

    return Reward(name, score)


def _find(name: str) -> Callable:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for good: the function may import its neighbours when called
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # importing runs a user's code
        raise RewardError(f"reward {name}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise RewardError(f"reward {name}: expected a function, got {type(function).__name__}")
    return function


def _checked(name: str, scores: object, rollout: Rollout) -> list[float]:
    expected = len(rollout.completions)
    try:
        scores = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name}: expected a list of {expected} numbers: {error}") from error
    if len(scores) != expected:
        raise RewardError(f"reward {name}: expected {expected} scores, one a completion, got {len(scores)}")
    for row, score in enumerate(scores):
        if not math.isfinite(score):
            text = rollout.completions[row]
            raise RewardError(f"reward {name}: expected finite scores, got {score} in row {row} for {text!r:.80}")
    return scores


# Reward models


def model_reward(scorer: Scorer, policy: LanguageModel, batch_size: int) -> Reward:
    """A reward model in its own tokens: text goes through both tokenizers unless they are the same."""
    shared = same_vocabulary(scorer, policy)

    @torch.no_grad()
    def score(rollout: Rollout) -> list[float]:
        sequences = rollout.sequences if shared else _retokenize(scorer, rollout)
        parts = torch.arange(len(rollout.completions), device=scorer.device).split(batch_size)
        scores = torch.cat([sequence_scores(scorer, sequences.rows(part)) for part in parts]).tolist()
        return _checked("model", scores, rollout)

    return Reward("model", score, scorer if shared else None)


def _retokenize(scorer: Scorer, rollout: Rollout) -> SequenceBatch:
    """As much of the texts' ends as fits, in the reward model's tokens, with its EOS where the response ended."""
    texts = [prompt + completion for prompt, completion in zip(rollout.prompts.texts, rollout.completions)]
    limit = getattr(scorer.module.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    rows = []
    for ids, ended in zip(scorer.tokenizer(texts, verbose=False)["input_ids"], rollout.finished.tolist()):
        while ids and ids[-1] in scorer.eos_ids:  # tokenizers that end every text
            ids = ids[:-1]
        ids = ids + list(scorer.eos_ids[:1]) if ended else ids
        rows.append(ids[-limit:] or [scorer.pad_id])
    return pad_sequences([row[:1] for row in rows], [row[1:] for row in rows], scorer.pad_id).to(scorer.device)


# KL


@dataclass(frozen=True)
class KLController:
    """The weight of the KL penalty: fixed, or steered to `target` nats per response (arXiv 1909.08593, section 2.2)."""

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, episodes: int) -> KLController:
        if self.target is None or not math.isfinite(kl):
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, coef=self.coef * (1 + error * episodes / self.horizon))
