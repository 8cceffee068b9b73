"""Watching for reward hacking while training: what a batch of responses looks like, and when to warn.

A policy that games its reward keeps the score rising, so the score alone never shows it. What does, with its field:

| warn_... | signal, watch/... | tells |
|---|---|---|
| gold_drop | gold, gold_std | the held-out reward falls while the score rises: over-optimisation (arXiv 2210.10760) |
| kl | kl | how far the policy has left the reference, and with it the texts that rewards can judge |
| distinct | distinct_1, distinct_2 | responses repeat themselves or each other: mode collapse |
| length | length | length is what the reward pays for, or responses no longer end |
| length_correlation | score_length_correlation | the score follows the length, which the policy can use |
| entropy | entropy | little is explored any more; what is wrong now stays wrong |
| eos_rate | eos_rate | responses are cut off at response_length, and their scores are of fragments |

Different n-grams over all n-grams falls as there are more of them, so distinct_2 is compared with its own first value,
of batches of the same size; where watch/length has grown, a part of the fall is due to that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.config import PPOConfig

FIRST_STEPS = 3  # whose mean is what later values are compared with
# Of the exponential means: about the last MEAN_STEPS steps, and none before. Where gold is noise, 6 of 100 runs of 100
# steps warn of a drop with batches of 8 and none with 16; with a decay of 0.8 they are 55 and 4.
DECAY, MEAN_STEPS = 0.9, 10
PAUSE = 10  # steps before a warning is repeated


def health(
    completion_ids: list[list[int]],  # B responses, their EOS tokens included
    finished: Tensor,  # (B,) bool
    scores: Tensor,  # (B,) float, what training maximises
    entropy: float,  # of the policy, in nats a token
    kl: float,  # to the reference, in nats a response
    gold: Tensor | None = None,  # (B,) float, the held-out reward
) -> dict[str, float]:
    """The signals of one batch. Deviations are of the batch, not estimates (B may be 1)."""
    lengths = torch.tensor([len(ids) for ids in completion_ids], dtype=torch.float64)
    scores = scores.detach().double().cpu()
    signals = {
        "watch/score": float(scores.mean()),
        "watch/kl": kl,
        "watch/entropy": entropy,
        "watch/length": float(lengths.mean()),
        "watch/distinct_1": distinct(completion_ids, 1),
        "watch/distinct_2": distinct(completion_ids, 2),
        "watch/eos_rate": float(finished.double().mean()),
        "watch/score_length_correlation": correlation(scores, lengths),
    }
    if gold is not None:
        gold = gold.detach().double().cpu()
        signals |= {"watch/gold": float(gold.mean()), "watch/gold_std": float(gold.std(correction=0))}
    return signals


def distinct(sequences: list[list[int]], n: int) -> float:
    """Different n-grams over n-grams, of all sequences together (arXiv 1510.03055); 1 where there are none."""
    grams = [gram for ids in sequences for gram in zip(*(ids[i:] for i in range(n)))]
    return len(set(grams)) / len(grams) if grams else 1.0


def correlation(
    x: Tensor,  # (B,) float64
    y: Tensor,  # (B,) float64
) -> float:
    """Pearson's; 0 where either is constant or not finite."""
    x, y = x - x.mean(), y - y.mean()
    value = float((x / x.norm()) @ (y / y.norm()))
    return min(max(value, -1.0), 1.0) if math.isfinite(value) else 0.0


@dataclass(frozen=True)
class Rule:
    name: str  # of the field, after warn_
    signal: str
    side: Literal["above", "below"]  # of the bound, where it warns
    # plain; times the signal's first value; or of its exponential mean, as in one small batch anything may correlate
    bound: Literal["plain", "relative", "smooth"]
    reading: str  # what is measured, and its unit
    advice: str


RULES = (
    Rule(
        "kl", "watch/kl", "above", "plain", "the KL to the reference is {:.3g} nats a response",
        "the policy has left the texts that rewards can judge: raise kl_coef, set kl_target, or lower learning_rate",
    ),
    Rule(
        "distinct", "watch/distinct_2", "below", "relative", "different pairs of tokens are {:.3g} of all",
        "responses repeat themselves or each other: read samples.jsonl, raise kl_coef or entropy_coef",
    ),
    Rule(
        "length", "watch/length", "above", "relative", "responses have {:.4g} tokens",
        "length may be what the reward pays for: read samples.jsonl, set length_penalty",
    ),
    Rule(
        "length_correlation", "watch/score_length_correlation", "above", "smooth",
        "score and length correlate at {:.2f} over the last steps",
        "the policy can win by length alone: set length_penalty, or balance the lengths of the reward model's pairs",
    ),
    Rule(
        "entropy", "watch/entropy", "below", "relative", "the entropy is {:.3g} nats a token",
        "little is explored any more: raise entropy_coef or kl_coef, lower learning_rate",
    ),
    Rule(
        "eos_rate", "watch/eos_rate", "below", "plain", "{:.1%} of the responses end",
        "the others are cut off and scored as fragments: raise response_length or missing_eos_penalty",
    ),
)  # fmt: skip


class Watch:
    """Warnings from the signals of each step. Signals that are missing or not finite are passed over.

    All it remembers stands in `state["watch"]`, as JSON: first values, exponential means, the best gold reward, and
    which warnings were given when. A run that continues from a checkpoint of it warns as one that was never stopped.
    """

    def __init__(
        self,
        config: PPOConfig,
        state: dict,  # a run's, part of its checkpoints
    ):
        self.config = config
        self.memory = state.setdefault("watch", {"first": {}, "means": {}, "best": None, "given": {}, "count": 0})

    def check(self, step: int, metrics: dict[str, float]) -> list[str]:
        """A line for each warning of step 0, 1, ...; puts `watch/warnings`, the number given so far, into metrics."""
        watched = {name: value for name, value in metrics.items() if name.startswith("watch/") and value is not None}
        signals = {name: value for name, value in watched.items() if math.isfinite(value)}
        found = {rule.name: self._judge(rule, signals) for rule in RULES}
        found["gold_drop"] = self._judge_gold(step, signals)
        lines = []
        for name, text in found.items():
            if text and step - self.memory["given"].get(name, -PAUSE) >= PAUSE:
                self.memory["given"][name] = step
                lines.append(f"step {step + 1}: warning: {text}")
        self.memory["count"] += len(lines)
        metrics["watch/warnings"] = self.memory["count"]
        return lines

    def _judge(self, rule: Rule, signals: dict[str, float]) -> str | None:
        value, factor = signals.get(rule.signal), getattr(self.config, f"warn_{rule.name}")
        if rule.bound == "smooth":
            value = self._mean(rule.signal, value)
        first = self._first(rule.signal, value) if rule.bound == "relative" else 1.0
        if value is None or first is None or factor is None:
            return None
        bound = factor * first
        if not (value > bound if rule.side == "above" else value < bound):
            return None
        stated = f"warn_{rule.name} {factor:g}" + (f" times the first {first:.3g}" if rule.bound == "relative" else "")
        return f"{rule.reading.format(value)}, {rule.side} {stated}: {rule.advice}"

    def _judge_gold(self, step: int, signals: dict[str, float]) -> str | None:
        gold, score = (self._mean(name, signals.get(name)) for name in ("watch/gold", "watch/score"))
        # A reward that no response of a batch earns has no scale yet.
        deviation = self._first("watch/gold_std", signals.get("watch/gold_std") or None)
        factor, best = self.config.warn_gold_drop, self.memory["best"]
        if gold is None or score is None:
            return None
        if best is None or gold > best["gold"]:
            best = self.memory["best"] = {"gold": gold, "score": score, "step": step + 1}
        if deviation is None or factor is None:
            return None
        drop = (best["gold"] - gold) / deviation
        if not (drop > factor and score > best["score"]):
            return None
        return (
            f"gold_reward has fallen from {best['gold']:.3g} at step {best['step']} to {gold:.3g}, by {drop:.2g} times "
            f"its first deviation {deviation:.3g}, above warn_gold_drop {factor:g}, while the score rose from "
            f"{best['score']:.3g} to {score:.3g}: the policy games the reward: take a checkpoint from about step "
            f"{best['step']}, raise kl_coef, mend the reward"
        )

    def _first(self, name: str, value: float | None) -> float | None:
        """The mean of a signal's first values, once they are there; until then this value is one of them."""
        values = self.memory["first"].setdefault(name, [])
        if len(values) == FIRST_STEPS:
            return sum(values) / FIRST_STEPS
        if value is not None:
            values.append(value)
        return None

    def _mean(self, name: str, value: float | None) -> float | None:
        """The exponential mean of a signal, from its MEAN_STEPS-th value on; None at a step that has no value."""
        if value is None:
            return None
        total, count = self.memory["means"].get(name, (0.0, 0))
        total, count = DECAY * total + value, count + 1
        self.memory["means"][name] = [total, count]
        return total * (1 - DECAY) / (1 - DECAY**count) if count >= MEAN_STEPS else None
