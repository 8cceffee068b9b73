"""Scores of rollouts: reward models, process reward models and reward functions, several at once; the KL controller."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.config import EvalConfig, PPOConfig, UsageError
from rlhf.forward import score_sequences, token_scores
from rlhf.model import LanguageModel, Scorer, frozen, load_scorer, same_vocabulary
from rlhf.types import Rollout, SequenceBatch, pad_sequences


class RewardError(UsageError):
    """A reward function that can't be found, failed, or returned something that is no list of scores."""


@dataclass(frozen=True)
class Reward:
    name: str
    score: Callable[[Rollout], Tensor]  # on the host: (B,) one finite number a response, or (B, R) one a token
    weight: float = 1.0
    scorer: Scorer | None = None  # the model behind it
    reader: Scorer | None = None  # the same, where it reads the policy's tokens as they are


def load_rewards(config: PPOConfig | EvalConfig, policy: LanguageModel) -> list[Reward]:
    """Functions, reward models, process reward models, with their weights."""
    rewards = [function_reward(name) for name in config.reward]
    for number, path in enumerate(config.reward_model_path, start=1):
        scorer = frozen(load_scorer(path, config), config)
        rewards.append(model_reward(scorer, policy, *config.budget, name=_numbered("model", number)))
    for number, path in enumerate(config.process_reward_model_path, start=1):
        scorer, name = frozen(load_scorer(path, config), config), _numbered("process", number)
        rewards.append(process_reward(scorer, policy, *config.budget, config.step_separator, name=name))
    weights = config.reward_weights or [1.0] * len(rewards)
    return [replace(reward, weight=weight) for reward, weight in zip(rewards, weights)]


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"


# From rewards to the score of a response


@dataclass(frozen=True)
class Scores:
    """On the host."""

    scores: Tensor  # (B,) float32, the sum of a response's rewards
    rewards: Tensor | None  # (B, R) float32, where some reward tells tokens apart
    parts: dict[str, float]  # mean of each reward before normalisation and weight


@dataclass(frozen=True)
class Shaping:
    """What is done to a weighted sum of rewards, in this order: clip, penalties."""

    score_clip: float | None = None
    missing_eos_penalty: float | None = None
    missing_eos: str = "subtract"
    length_penalty: float = 0.0
    length_penalty_after: int = 0

    @staticmethod
    def of(config: PPOConfig) -> Shaping:
        return Shaping(*(getattr(config, name) for name in Shaping.__dataclass_fields__))


def score_rollout(
    rewards: list[Reward],
    rollout: Rollout,
    shaping: Shaping = Shaping(),
    normalization: str = "none",  # none, batch or running
    moments: dict[str, list[float]] | None = None,  # of each reward so far, brought up to date: a run's state
) -> Scores:
    """The weighted sum of all rewards, clipped, less the penalties."""
    lengths = rollout.sequences.response_lengths
    total, per_token, parts = torch.zeros(len(lengths)), None, {}
    for reward in rewards:
        raw = reward.score(rollout)
        of_response = per_response(raw)
        parts[f"rewards/{reward.name}"] = float(of_response.mean())
        mean, deviation = _moments(of_response, normalization, reward.name, moments)
        if raw.dim() == 1:
            total = total + reward.weight * (raw - mean) / deviation
        else:  # scaled alone: a token that earned nothing stays at 0
            per_token = (0.0 if per_token is None else per_token) + reward.weight * raw / deviation
    if shaping.score_clip is not None:
        total = total.clamp(-shaping.score_clip, shaping.score_clip)
        per_token = None if per_token is None else per_token.clamp(-shaping.score_clip, shaping.score_clip)
    if shaping.length_penalty:
        total = total - shaping.length_penalty * (lengths - shaping.length_penalty_after).clamp(min=0).float()
    if shaping.missing_eos_penalty is not None:
        unfinished = ~rollout.finished
        if shaping.missing_eos == "replace":
            total = total.masked_fill(unfinished, -shaping.missing_eos_penalty)
            per_token = None if per_token is None else per_token.masked_fill(unfinished[:, None], 0.0)
        else:
            total = total - shaping.missing_eos_penalty * unfinished.float()
    if per_token is None:
        return Scores(total, None, parts)
    per_token = per_token.scatter_add(1, lengths[:, None] - 1, total[:, None])
    return Scores(per_token.sum(1), per_token, parts)


def per_response(scores: Tensor) -> Tensor:  # (B,) or (B, R) to (B,)
    return scores if scores.dim() == 1 else scores.sum(1)


def _moments(
    scores: Tensor,  # (B,)
    normalization: str,
    name: str,
    moments: dict[str, list[float]] | None,
) -> tuple[float, float]:  # mean, deviation
    """Of the batch, or of all episodes so far. A reward that is constant keeps its scale."""
    if normalization == "none":
        return 0.0, 1.0
    count, values = len(scores), scores.double()
    mean, squares = float(values.mean()), float((values - values.mean()).square().sum())
    if normalization == "running" and moments is not None:
        before, mean_before, squares_before = moments.get(name, (0.0, 0.0, 0.0))
        gap = mean - mean_before
        squares += squares_before + gap * gap * before * count / (before + count)
        mean, count = mean_before + gap * count / (before + count), before + count
        moments[name] = [count, mean, squares]
    deviation = math.sqrt(squares / count)
    return mean, deviation if deviation > 1e-8 * max(1.0, abs(mean)) else 1.0


# Reward functions


def function_reward(name: str) -> Reward:
    """`module:function`, importable from the current directory too: f(prompts, completions, **columns) -> floats.

    Arguments go by these names where the function has them, in any order (TRL's functions), else by place. A function
    with a parameter `completion_ids` gets the tokens of each response too, and may return a list of one
    number a token in place of a number."""
    function = _find(name)
    taken = _parameters(function)
    takes_ids = "completion_ids" in taken
    by_name = {"prompts", "completions"} <= set(taken) or taken[:1] == ["completions"]

    def score(rollout: Rollout) -> Tensor:
        extra = {"completion_ids": [list(ids) for ids in rollout.completion_ids]} if takes_ids else {}
        texts = {"prompts": list(rollout.prompts.texts), "completions": list(rollout.completions)}
        columns = rollout.prompts.columns | extra
        try:
            scores = function(**columns | texts) if by_name else function(*texts.values(), **columns)
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


def _parameters(function: Callable) -> list[str]:  # that can be given by name
    try:
        found = inspect.signature(function).parameters
        return [name for name, parameter in found.items() if parameter.kind is not parameter.POSITIONAL_ONLY]
    except (TypeError, ValueError):  # of a function in C
        return []


def _checked(name: str, scores: object, rollout: Rollout) -> Tensor:  # (B,) or (B, R) float32
    expected = len(rollout.completions)
    try:
        scores = list(scores)
        rows = [
            list(map(float, s)) if isinstance(s, (list, tuple)) or getattr(s, "ndim", 0) else float(s) for s in scores
        ]
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name}: expected a list of {expected} numbers: {error}") from error
    if len(rows) != expected:
        raise RewardError(f"reward {name}: expected {expected} scores, one a completion, got {len(rows)}")
    by_token = [isinstance(row, list) for row in rows]
    if any(by_token) and not all(by_token):
        raise RewardError(f"reward {name}: expected numbers or lists of one number a token, got both")
    for row, (score, ids) in enumerate(zip(rows, rollout.completion_ids)):
        values = score if by_token[row] else [score]
        if by_token[row] and len(score) != len(ids):
            raise RewardError(f"reward {name}: expected {len(ids)} numbers, one a token, got {len(score)} in row {row}")
        if bad := [value for value in values if not math.isfinite(value)]:
            text = rollout.completions[row]
            raise RewardError(f"reward {name}: expected finite scores, got {bad[0]} in row {row} for {text!r:.80}")
    if not any(by_token):
        return torch.tensor(rows, dtype=torch.float32)
    width = rollout.sequences.width
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float32)


# Reward models


def model_reward(
    scorer: Scorer,
    policy: LanguageModel,
    batch_size: int,  # sequences, or
    tokens: int | None = None,  # tokens, in a forward pass
    *,
    name: str = "model",
) -> Reward:
    """A reward model in its own tokens: text goes through both tokenizers unless they are the same."""
    shared = same_vocabulary(scorer, policy)

    def score(rollout: Rollout) -> Tensor:
        sequences = rollout.sequences if shared else _retokenize(scorer, rollout)
        return _finite(name, score_sequences(scorer, sequences, batch_size, tokens).cpu(), rollout)

    return Reward(name, score, scorer=scorer, reader=scorer if shared else None)


def process_reward(
    scorer: Scorer,
    policy: LanguageModel,
    batch_size: int,
    tokens: int | None,
    separator: str,
    *,
    name: str = "process",
) -> Reward:
    """Each step of a response earns the score of the text up to its end, on its last token."""
    if not same_vocabulary(scorer, policy):
        path = scorer.module.name_or_path
        raise UsageError(
            f"process_reward_model_path: {path} has another vocabulary than the policy, whose tokens it scores"
        )

    @torch.no_grad()
    def score(rollout: Rollout) -> Tensor:
        sequences = rollout.sequences
        scores = torch.zeros(len(sequences), sequences.width, device=scorer.device)
        for rows in sequences.micro_batches(batch_size, tokens, scorer.packed):
            part = sequences.rows(rows)
            at_tokens = part.unpack(token_scores(scorer, part)[part.predictors + 1])
            scores[rows.to(scorer.device), : part.width] = at_tokens
        ends = torch.zeros(scores.shape, dtype=torch.bool)
        for row, ids in enumerate(rollout.completion_ids):
            ends[row, step_ends(ids, policy.tokenizer, separator)] = True
        return _finite(name, scores.cpu().masked_fill(~ends, 0.0), rollout)

    return Reward(name, score, scorer=scorer, reader=scorer)


def step_ends(ids: list[int], tokenizer, separator: str) -> list[int]:
    """Positions of the tokens that end a step: those that complete a separator, and the last, unless nothing but it
    (an EOS token, say) follows a separator."""

    def known(count: int) -> int:
        """Characters that the first tokens make. Of a token alone some tokenizers leave out its space, and all what is
        part of a character."""
        part = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        return next((i for i, (a, b) in enumerate(zip(part, text)) if a != b), min(len(part), len(text)))

    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    ends, searched = [], 0
    while (found := text.find(separator, searched)) >= 0:
        searched = found + len(separator)
        ends.append(bisect_left(range(1, len(ids) + 1), searched, key=known))
    last = len(ids) - 1
    return sorted({*ends} | ({last} if last - 1 not in ends else set()))


def _finite(name: str, scores: Tensor, rollout: Rollout) -> Tensor:
    finite = scores.isfinite() if scores.dim() == 1 else scores.isfinite().all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        text = rollout.completions[row]
        raise RewardError(f"reward {name}: expected finite scores, got {scores[row]} in row {row} for {text!r:.80}")
    return scores


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
