"""Rollout to Experience: log-probabilities, values, scores, then advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import rlhf_kernels
from rlhf.config import PPOConfig
from rlhf.model import LanguageModel, Scorer, check_context, response_logprobs, response_values
from rlhf.reward import Reward, score_rollout
from rlhf.types import Experience, Rollout


@dataclass(frozen=True)
class Models:
    policy: LanguageModel
    value: Scorer
    reference: LanguageModel
    rewards: list[Reward]

    def check_context(self, length: int, fields: str) -> None:
        """Of every model that reads the policy's tokens."""
        readers = [reward.reader for reward in self.rewards if reward.reader]
        for model in (self.policy, self.value, *readers):
            check_context(model, length, fields)


@torch.no_grad()
def score(
    rollout: Rollout,
    models: Models,
    config: PPOConfig,
    poll: Callable[[], None] = lambda: None,
) -> tuple[Experience, dict[str, float]]:  # and the mean of each reward
    """Everything about a rollout that training holds fixed.

    The forward passes are those of training, over the micro-batches of the first PPO epoch, so that the ratio of the
    first update is exactly 1. `poll` is called between forward passes, and never after the reward functions: they may
    draw random numbers, and a checkpoint holds the generators as they stood before the step.
    """
    columns = []
    for rows in torch.arange(len(rollout.completions)).split(config.per_device_train_batch_size):
        poll()
        part = rollout.sequences.rows(rows.to(rollout.sequences.ids.device))
        logprobs, _ = response_logprobs(models.policy, part, config.temperature)
        reference, _ = response_logprobs(models.reference, part, config.temperature)
        columns.append((logprobs, reference, response_values(models.value, part)))
    poll()
    scores, parts = score_rollout(models.rewards, rollout, config.missing_eos_penalty, config.score_clip)
    width = rollout.sequences.response_mask.shape[1]
    joined = (torch.cat([_widen(t, width) for t in tensors]) for tensors in zip(*columns))
    return Experience(rollout.sequences, *joined, scores.to(rollout.sequences.ids.device)), parts


def _widen(per_token: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(per_token, (0, width - per_token.shape[1]))


def with_advantages(experience: Experience, config: PPOConfig, kl_coef: float) -> Experience:
    """KL penalty, shaped reward, GAE and whitening, over the whole batch."""
    result = rlhf_kernels.ppo_advantages(
        experience.logprobs,
        experience.ref_logprobs,
        experience.values,
        experience.scores,
        experience.sequences.response_mask,
        options=rlhf_kernels.AdvantageOptions(
            kl_coef=kl_coef,
            kl_estimator=config.kl_estimator,
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
            whiten_advantages=config.whiten_advantages,
        ),
    )
    shaped = {name: getattr(result, name) for name in ("advantages", "returns", "kl")}
    return replace(experience, **shaped)
