"""Reward models from comparisons, by the Bradley-Terry likelihood."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhf.config import RewardConfig
from rlhf.data import Dataset, load, plan
from rlhf.forward import sequence_scores
from rlhf.log import Run
from rlhf.losses import preference_loss
from rlhf.model import Scorer, check_context, load_scorer
from rlhf.optim import StepGuard, make_optimizer, set_learning_rate
from rlhf.read import Source
from rlhf.tokens import TokenExample
from rlhf.types import SequenceBatch, TrainResult, pad_sequences

NORMALIZATION_PAIRS = 512  # 1,024 scores: their mean is within 0.03 deviations of that of all pairs


def train(
    config: RewardConfig,
    on_step: Callable[[int, Scorer, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Starts from a language model, whose head gives way to a scalar one, or from a reward model."""
    model = load_scorer(config.model_name_or_path, config, head="random")
    check_context(model, config.max_length, "max_length")
    data = load(Source.of(config), model, "preference", config.max_length)
    data, held_out = data.split(config.eval_fraction, config.seed)
    _normalize(model, {})
    optimizer = make_optimizer([(model.module, config.learning_rate)], config)
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    windows = plan(len(data), batch_size, config.num_train_epochs, config.max_steps)

    with Run(config, {"model": model.module}, optimizer, data, len(windows)) as run:
        guard = StepGuard(optimizer, [model.module], config.max_grad_norm, run.state)
        for step in run.steps():
            batch = data.window(*windows[step], config.seed)
            rate = set_learning_rate(optimizer, config, step, len(windows))
            loss, tokens, sums = 0.0, 0, torch.zeros(4, device=model.device)
            for start in range(0, len(batch), config.per_device_train_batch_size):
                run.poll()
                micro = collate(batch[start : start + config.per_device_train_batch_size], model)
                scores = sequence_scores(model, micro)
                part, stats = preference_loss(scores, len(batch), config.center_rewards_coefficient)
                part.backward()
                loss += part.item()
                tokens += int(micro.lengths.sum())
                sums += torch.stack(list(stats.values()))
            norm = float(guard.step(torch.tensor(loss)))
            metrics = {f"rewards/{name}": value / len(batch) for name, value in zip(stats, sums.tolist())}
            metrics |= {"loss": loss, "grad_norm": norm, "lr": rate, "epoch": windows[step][1] / len(data)}
            metrics |= {"tokens": tokens, "skipped_steps": guard.check()}
            if step + 1 == len(windows):
                metrics |= evaluate(model, held_out, config) | statistics(model, data, config)
            metrics = run.finish(step, metrics)
            if on_step:
                on_step(step + 1, model, metrics)
        _normalize(model, run.state["metrics"])
        return run.result(model)


def collate(examples: list[TokenExample], model: Scorer) -> SequenceBatch:
    """Both sides of a pair in one batch, so that one forward pass sees them: rows i (chosen) and N+i (rejected)."""
    prompts = [e.prompt for e in examples]
    chosen, rejected = zip(*(e.completions for e in examples))
    return pad_sequences(prompts * 2, [*chosen, *rejected], model.pad_id).to(model.device)


@torch.no_grad()
def score_pairs(
    model: Scorer,
    data: Dataset,
    batch_size: int,
) -> torch.Tensor:  # (2, N) float32, chosen and rejected
    parts = []
    for start in range(0, len(data), batch_size):
        batch = collate(data.examples[start : start + batch_size], model)
        parts.append(sequence_scores(model, batch).view(2, -1).cpu())
    return torch.cat(parts, 1)


def evaluate(model: Scorer, data: Dataset, config: RewardConfig) -> dict[str, float]:
    """Accuracy and margin on pairs that were held out; nothing when none were."""
    if not len(data):
        return {}
    chosen, rejected = score_pairs(model, data, config.per_device_train_batch_size)
    margins = chosen - rejected
    loss, _ = preference_loss(torch.cat([chosen, rejected]), len(data))
    return {
        "eval/loss": float(loss),
        "eval/accuracy": float((margins > 0).float().mean()),
        "eval/margin": float(margins.mean()),
        "eval/pairs": len(data),
    }


def statistics(model: Scorer, data: Dataset, config: RewardConfig) -> dict[str, float]:
    """Of scores on the training data."""
    if not config.normalize_rewards:
        return {}
    sample = Dataset(data.window(0, min(len(data), NORMALIZATION_PAIRS), config.seed), {})
    scores = score_pairs(model, sample, config.per_device_train_batch_size)
    return {"reward_mean": float(scores.mean()), "reward_std": float(scores.std()) or 1.0}


def _normalize(model: Scorer, metrics: dict[str, float]) -> None:
    """By the statistics among the metrics, or not at all."""
    model.module.config.reward_mean = metrics.get("reward_mean", 0.0)
    model.module.config.reward_std = metrics.get("reward_std", 1.0)
