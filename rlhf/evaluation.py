"""Evaluation on held-out prompts: reward, KL, and how often the policy's response beats the reference's."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from rlhf.config import PPOConfig, UsageError
from rlhf.data import prompt_batch, tokenize
from rlhf.forward import token_logprobs
from rlhf.layout import Models
from rlhf.model import LanguageModel
from rlhf.read import DataError, Tally, read_rows
from rlhf.reward import Shaping, per_response, score_rollout
from rlhf.rollout import Sampling, generate
from rlhf.types import PromptBatch, Rollout

SEED = 7_919  # apart from those of training's rollouts, and the same at every evaluation


def load_prompts(config: PPOConfig, models: Models) -> list[PromptBatch]:
    """Held-out prompts in batches that training's memory holds."""
    if config.eval_dataset_name is None:
        return []
    tally = Tally(config.on_bad_row)
    rows = islice(read_rows(config.eval_dataset_name, config.dataset_split, tally.bad), config.eval_prompts)
    data = tokenize(rows, models.policy, "prompt", config.max_prompt_length, tally)
    if not len(data):
        raise DataError(f"{config.eval_dataset_name}: no usable row")
    _check_best_metric(config, models)
    models.check_context(data.longest_prompt + config.response_length, "longest held-out prompt + response_length")
    batches = []
    for start in range(0, len(data), config.batch_size):
        batches.append(prompt_batch(data.examples[start : start + config.batch_size]))
    return batches


@torch.no_grad()
def evaluate(models: Models, config: PPOConfig, prompts: list[PromptBatch], state: dict) -> dict[str, float]:
    """eval/score, eval/kl (nats a response), eval/length, eval/eos_rate, eval/win_rate over the reference by the score
    (ties count half), the mean of each reward, and eval/gold. Rewards are weighted and not normalised. The same random
    numbers every time: what changes is the policy. `state` keeps the reference's scores, a part of checkpoints."""
    sampling = Sampling(config.response_length, config.temperature)
    scores, parts, kls, lengths, finished, gold = [], [], [], [], [], []
    with models.on_device():
        for number, batch in enumerate(prompts):
            rollout = generate(models.policy, batch, sampling, seed=(config.seed, SEED, number))
            found = score_rollout(models.rewards, rollout, Shaping.of(config))
            scores.append(found.scores)
            parts.append(found.parts)
            kls.append(response_kl(models.policy, models.reference, rollout, config).cpu())
            lengths.append(rollout.sequences.response_lengths.float())
            finished.append(rollout.finished.float())
            gold += [per_response(models.gold.score(rollout))] if models.gold else []
        if "reference_scores" not in state:
            rollouts = (
                generate(models.reference, batch, sampling, seed=(config.seed, SEED, number))
                for number, batch in enumerate(prompts)
            )
            of_reference = [score_rollout(models.rewards, rollout, Shaping.of(config)).scores for rollout in rollouts]
            state["reference_scores"] = torch.cat(of_reference).tolist()
    ours, theirs = torch.cat(scores), torch.tensor(state["reference_scores"])
    columns = {"score": scores, "kl": kls, "length": lengths, "eos_rate": finished, "gold": gold}
    means = {f"eval/{name}": float(torch.cat(values).mean()) for name, values in columns.items() if values}
    weights = [len(part) for part in scores]
    for name in parts[0]:
        mean = sum(part[name] * weight for part, weight in zip(parts, weights)) / sum(weights)
        means[f"eval/{name}"] = mean
    return means | {"eval/win_rate": float(((ours > theirs).float() + 0.5 * (ours == theirs).float()).mean())}


def response_kl(policy: LanguageModel, reference: LanguageModel, rollout: Rollout, config: PPOConfig) -> Tensor:  # (B,)
    """log p - log ref of each response."""
    batch = rollout.sequences
    kl = torch.zeros(len(batch), device=batch.ids.device)
    for rows in batch.micro_batches(config.per_device_train_batch_size, config.micro_batch_tokens, policy.packed):
        part = batch.rows(rows)
        ours, theirs = (token_logprobs(model, part, config.temperature)[0] for model in (policy, reference))
        kl[rows.to(kl.device)] = part.unpack(ours - theirs).sum(1)
    return kl


def _check_best_metric(config: PPOConfig, models: Models) -> None:
    names = ["score", "kl", "length", "eos_rate", "win_rate", *["gold"] * (models.gold is not None)]
    names = [f"eval/{name}" for name in (*names, *(f"rewards/{reward.name}" for reward in models.rewards))]
    if config.metric_for_best_model not in (None, *names):
        expected = f"a metric of the evaluations, {', '.join(names)}"
        raise UsageError(f"metric_for_best_model: expected {expected}; got {config.metric_for_best_model!r}")
