"""A task with a known best answer: reviews from a small grammar, a gold reward, noisy preferences, and the optimum.

A review is two or three sentences ``the NOUN was [very] ADJ [and ADJ] .`` whose adjectives agree, nine times in ten,
with the review's hidden sentiment. The gold reward wants grammatical reviews with many good words. Because the reward
is programmatic and every prompt is the same, the best value any policy can reach under a KL penalty is known from
samples of the reference alone, so a training run can be scored against it rather than merely seen to go up.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PROMPT = "review"
NOUNS = ("film", "plot", "cast", "score", "ending", "script")
GOOD = ("good", "great", "clever", "funny", "moving", "fresh", "warm", "bold")
BAD = ("bad", "dull", "stupid", "boring", "flat", "stale", "cold", "weak")

KIND = {"the": "the", "was": "was", "very": "very", "and": "and", ".": "."}
KIND |= dict.fromkeys(NOUNS, "noun") | dict.fromkeys(GOOD + BAD, "adjective")
FOLLOWS = {
    ".": ("the",),  # also the state before the first word
    "the": ("noun",),
    "noun": ("was",),
    "was": ("very", "adjective"),
    "very": ("adjective",),
    "adjective": ("and", "."),
    "and": ("adjective",),
}


def sample_review(rng: random.Random) -> str:
    """One review of two or three sentences, 10 to 24 words."""
    likes = rng.random() < 0.5
    sentences = []
    for _ in range(rng.choice((2, 3))):
        adjectives = [rng.choice(GOOD if (rng.random() < 0.9) == likes else BAD) for _ in range(rng.choice((1, 2)))]
        very = "very " if rng.random() < 0.3 else ""
        sentences.append(f"the {rng.choice(NOUNS)} was {very}{' and '.join(adjectives)} .")
    return " ".join(sentences)


def violations(words: Sequence[str]) -> int:
    """Words the grammar does not allow after their predecessor, a second ``and`` in a sentence, an unfinished end."""
    count, state, ands = 0, ".", 0
    for word in words:
        kind = KIND.get(word, "unknown")
        ands = ands + (kind == "and") if kind != "." else 0
        count += kind not in FOLLOWS.get(state, ()) or (kind == "and" and ands > 1)
        state = kind
    return count + (state != "." or not words)


def gold(review: str) -> float:
    """``2 tanh((good - bad) / 2) - violations - 0.5 * sentences that say an adjective twice``: at most 2."""
    words = review.split()
    balance = sum((word in GOOD) - (word in BAD) for word in words)
    echoes = sum(len(said) > len(set(said)) for said in map(adjectives, review.split(".")))
    return 2 * math.tanh(balance / 2) - violations(words) - 0.5 * echoes


def adjectives(sentence: str) -> list[str]:
    return [word for word in sentence.split() if KIND.get(word) == "adjective"]


def gold_reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The gold reward in the form of ``rlhf ppo --reward rlhf.task:gold_reward``."""
    return [gold(completion) for completion in completions]


def very_reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """How often a review says ``very``: a second wish, in which the gold reward has no part."""
    return [float(completion.split().count("very")) for completion in completions]


def stepwise_gold_reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
) -> list[list[float]]:
    """The gold reward paid out as it is earned: each word (a token) gets what it changes, and the sum is the same."""
    rows = []
    for completion, ids in zip(completions, completion_ids):
        words = completion.split()
        so_far = [gold(" ".join(words[:end])) for end in range(1, len(words) + 1)] or [gold("")]
        changes = [after - before for before, after in zip([0.0, *so_far], so_far)]
        rows.append(changes + [0.0] * (len(ids) - len(changes)))
    return rows


def prefer(first: str, second: str, rng: random.Random) -> tuple[str, str]:
    """(chosen, rejected) as a noisy judge has it: first wins with probability sigmoid(gold(first) - gold(second))."""
    first_wins = rng.random() < 1 / (1 + math.exp(gold(second) - gold(first)))
    return (first, second) if first_wins else (second, first)


@dataclass(frozen=True)
class KnownOptimum:
    """The best of ``E[r] - beta*KL`` over all policies, and where it stands."""

    beta: float
    """The KL penalty, in reward per nat."""
    objective: float
    """``J* = beta * log E_ref[exp(r / beta)]``."""
    baseline: float
    """``E_ref[r]``: the objective of the reference itself, whose KL is 0."""
    reward: float
    """``E[r]`` of the optimal policy ``ref * exp(r / beta) / Z``."""
    kl: float
    """KL of the optimal policy to the reference, in nats."""
    effective_samples: float
    """How many equally weighted samples the weighted estimate is worth: ``(sum w)^2 / sum w^2``."""

    def score(self, reward: float, kl: float) -> float:
        """``(reward - beta*kl - baseline) / (objective - baseline)``: 0 for the reference, 1 for the optimum.

        Adding a constant to the reward changes nothing.
        """
        return (reward - self.beta * kl - self.baseline) / (self.objective - self.baseline)


def known_optimum(
    rewards: Tensor,  # (N,) float, of samples of the reference: everything the policy is trained on
    beta: float,
) -> KnownOptimum:
    """The optimum of a KL-penalised reward, estimated from reference samples of one prompt.

    Follows from Gibbs' variational principle: over policies p, ``max E_p[r] - beta*KL(p || ref)`` is reached at
    ``p* = ref * exp(r / beta) / Z``. Not valid for rewards pooled over several prompts: a policy can't choose its
    prompt. Raises ValueError on fewer than two rewards or where all rewards are equal, as then nothing can be learnt.
    """
    rewards = rewards.double()
    if rewards.numel() < 2 or rewards.max() == rewards.min():
        raise ValueError(f"rewards: expected at least two different values, got {rewards.numel()} value(s), all equal")
    logits = rewards / beta
    weights = torch.softmax(logits, 0)
    objective = beta * (logits.logsumexp(0).item() - math.log(rewards.numel()))
    reward = (weights * rewards).sum().item()
    return KnownOptimum(
        beta=beta,
        objective=objective,
        baseline=rewards.mean().item(),
        reward=reward,
        kl=(reward - objective) / beta,
        effective_samples=1 / weights.square().sum().item(),
    )
