"""Evaluation on held-out prompts: reward, KL, and how often a policy's response beats another's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, islice

import torch
from torch import Tensor

from rlhf.config import PPOConfig, UsageError
from rlhf.data import Dataset, prompt_batch, tokenize
from rlhf.forward import token_logprobs
from rlhf.layout import Models
from rlhf.model import LanguageModel
from rlhf.read import DataError, Source, Tally, read_rows
from rlhf.reward import Reward, Scores, Shaping, per_response, score_rollout
from rlhf.rollout import Sampling, generate
from rlhf.tokens import TokenExample
from rlhf.types import PromptBatch, Rollout

SEED = 7_919  # apart from those of training's rollouts, and the same at every evaluation


# Prompts


def read_prompts(source: Source, count: int, policy: LanguageModel, max_prompt_length: int) -> Dataset:
    """The first `count` rows."""
    tally = Tally(source.on_bad_row)
    rows = chain.from_iterable(read_rows(name, source.split, tally.bad) for name in source.names)
    data = tokenize(islice(rows, count), policy, "prompt", max_prompt_length, tally)
    if not len(data):
        raise DataError(f"{', '.join(source.names)}: no usable row")
    return data


def in_batches(examples: list[TokenExample], size: int) -> list[PromptBatch]:
    return [prompt_batch(examples[start : start + size]) for start in range(0, len(examples), size)]


def load_prompts(config: PPOConfig, models: Models) -> list[PromptBatch]:
    """Held-out prompts in batches that training's memory holds."""
    if config.eval_dataset_name is None:
        return []
    source = Source((config.eval_dataset_name,), config.dataset_split, on_bad_row=config.on_bad_row)
    data = read_prompts(source, config.eval_prompts, models.policy, config.max_prompt_length)
    _check_best_metric(config, models)
    models.check_context(data.longest_prompt + config.response_length, "longest held-out prompt + response_length")
    return in_batches(data.examples, config.batch_size)


# What is measured


def respond(
    policy: LanguageModel,
    rewards: list[Reward],
    prompts: list[PromptBatch],
    sampling: Sampling,
    seed: int,
    shaping: Shaping,
) -> Iterator[tuple[Rollout, Scores]]:
    """A batch at a time. The same random numbers for every policy: what differs is the policy."""
    for number, batch in enumerate(prompts):
        rollout = generate(policy, batch, sampling, seed=(seed, SEED, number))
        yield rollout, score_rollout(rewards, rollout, shaping)


@torch.no_grad()
def response_kl(
    policy: LanguageModel,
    reference: LanguageModel,
    rollout: Rollout,
    budget: tuple[int, int | None],  # sequences, or tokens where there is a number, in one forward pass
    temperature: float,
) -> Tensor:  # (B,) on the host
    """log p - log ref of each response."""
    batch = rollout.sequences
    kl = torch.zeros(len(batch), device=batch.ids.device)
    for rows in batch.micro_batches(*budget, policy.packed):
        part = batch.rows(rows)
        ours, theirs = (token_logprobs(model, part, temperature)[0] for model in (policy, reference))
        kl[rows.to(kl.device)] = part.unpack(ours - theirs).sum(1)
    return kl.cpu()


def wins(ours: Tensor, theirs: Tensor) -> Tensor:  # (...) of the same shape
    """1 where ours is higher, and half where they are equal."""
    return (ours > theirs).float() + 0.5 * (ours == theirs).float()


def mean_parts(found: list[Scores]) -> dict[str, float]:
    """The mean of each reward over batches."""
    total = sum(len(scores.scores) for scores in found)
    return {name: sum(s.parts[name] * len(s.scores) for s in found) / total for name in found[0].parts}


def standard_error(values: Tensor) -> float:  # (P,), or (P, K) of which the K of a row depend on each other
    """Of the mean; NaN where there is one row."""
    of_rows = values.double().flatten(1).mean(1) if values.dim() > 1 else values.double()
    return float(of_rows.std()) / math.sqrt(len(of_rows)) if len(of_rows) > 1 else math.nan


# During PPO


@torch.no_grad()
def evaluate(models: Models, config: PPOConfig, prompts: list[PromptBatch], state: dict) -> dict[str, float]:
    """eval/score, eval/kl (nats a response), eval/length, eval/eos_rate, eval/win_rate over the reference by the score
    (ties count half), the mean of each reward, and eval/gold. Rewards are weighted and not normalised. The same random
    numbers every time: what changes is the policy. `state` keeps the reference's scores, a part of checkpoints."""
    sampling = Sampling(config.response_length, config.temperature)
    fixed = models.rewards, prompts, sampling, config.seed, Shaping.of(config)
    scored, kls, lengths, finished, gold = [], [], [], [], []
    with models.on_device():
        for rollout, found in respond(models.policy, *fixed):
            scored.append(found)
            kls.append(response_kl(models.policy, models.reference, rollout, config.budget, config.temperature))
            lengths.append(rollout.sequences.response_lengths.float())
            finished.append(rollout.finished.float())
            gold += [per_response(models.gold.score(rollout))] if models.gold else []
        if "reference_scores" not in state:
            of_reference = [found.scores for _, found in respond(models.reference, *fixed)]
            state["reference_scores"] = torch.cat(of_reference).tolist()
    scores = [found.scores for found in scored]
    columns = {"score": scores, "kl": kls, "length": lengths, "eos_rate": finished, "gold": gold}
    columns["win_rate"] = [wins(torch.cat(scores), torch.tensor(state["reference_scores"]))]
    means = {f"eval/{name}": float(torch.cat(values).mean()) for name, values in columns.items() if values}
    return means | {f"eval/{name}": mean for name, mean in mean_parts(scored).items()}


def _check_best_metric(config: PPOConfig, models: Models) -> None:
    names = ["score", "kl", "length", "eos_rate", "win_rate", *["gold"] * (models.gold is not None)]
    names = [f"eval/{name}" for name in (*names, *(f"rewards/{reward.name}" for reward in models.rewards))]
    if config.metric_for_best_model not in (None, *names):
        expected = f"a metric of the evaluations, {', '.join(names)}"
        raise UsageError(f"metric_for_best_model: expected {expected}; got {config.metric_for_best_model!r}")
