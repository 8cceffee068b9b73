"""Reward models from comparisons: pairs, rankings, several objectives, steps of a response."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhf import reward_report
from rlhf.comparisons import Judged, collate, load_judged, passes, place_scores, score_rows
from rlhf.config import RewardConfig
from rlhf.data import Dataset, plan
from rlhf.log import Run
from rlhf.losses import COMPARISON_STATS, comparison_loss
from rlhf.model import Scorer, check_context, load_scorer, with_adapters
from rlhf.optim import StepGuard, make_optimizer, set_learning_rate
from rlhf.types import TrainResult

NORMALIZATION_ROWS = 512  # 1,024 scores of pairs: their mean is within 0.03 deviations of that of all
LOGGED = {"outcome": COMPARISON_STATS, "process": ("margins", "accuracies")}  # a step is compared with 0


def train(
    config: RewardConfig,
    on_step: Callable[[int, Scorer, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Starts from a language model, whose head gives way to one of scores, or from a reward model."""
    model = load_scorer(config.model_name_or_path, config, head="random", objectives=config.objectives)
    check_context(model, config.max_length, "max_length")
    data = load_judged(config, model)
    data, held_out = data.split(config.eval_fraction, config.seed)
    model = with_adapters(model, config, trained=("score",)) if config.use_peft else model
    _describe(model, config, {})
    optimizer = make_optimizer([(model.module, config.learning_rate)], config)
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    windows = plan(len(data), batch_size, config.num_train_epochs, config.max_steps)
    options = {"center": config.center_rewards_coefficient, "smoothing": config.label_smoothing}

    with Run(config, {"model": model.module}, optimizer, data, len(windows)) as run:
        guard = StepGuard(optimizer, [model.module], config.max_grad_norm, run.state)
        for step in run.steps():
            rows = data.window(*windows[step], config.seed)
            rate = set_learning_rate(optimizer, config, step, len(windows))
            total, sums = sum(row.weight for row in rows), torch.zeros(5, device=model.device)
            for part in passes(rows, config, model.packed):
                run.poll()
                batch = collate(part, model)
                loss, stats = comparison_loss(place_scores(model, batch), batch, total, **options)
                loss.backward()
                sums += torch.cat([loss.detach()[None], stats / total])
            norm = guard.step(sums[0])
            loss, *stats, norm = torch.cat([sums, norm[None]]).tolist()
            known = dict(zip(COMPARISON_STATS, stats))
            metrics = {f"rewards/{name}": known[name] for name in LOGGED[config.reward_type]}
            metrics |= {"loss": loss, "grad_norm": norm, "lr": rate, "epoch": windows[step][1] / len(data)}
            metrics |= {"tokens": sum(sum(row.lengths) for row in rows), "skipped_steps": guard.check()}
            if step + 1 == len(windows):
                metrics |= statistics(model, data, config)
                metrics |= reward_report.measure(model, data, held_out, config, metrics, run.state)
            elif config.eval_steps and (step + 1) % config.eval_steps == 0:
                scores = score_rows(model, held_out.examples, config)
                metrics |= reward_report.evaluate(held_out.examples, scores, config)
            metrics = run.finish(step, metrics)
            if on_step:
                on_step(step + 1, model, metrics)
        _describe(model, config, run.state["metrics"])
        reward_report.write(run.folder, run.state)
        return run.result(model)


def statistics(model: Scorer, data: Dataset, config: RewardConfig) -> dict[str, float]:
    """reward_mean and reward_std of scores on the training data, of each objective by its name."""
    if not config.normalize_rewards:
        return {}
    rows: list[Judged] = data.window(0, min(len(data), NORMALIZATION_ROWS), config.seed)
    of_rows = score_rows(model, rows, config)
    in_order = [scores[i] for i in range(max(map(len, of_rows))) for scores in of_rows if i < len(scores)]
    scores = torch.stack(in_order).unbind(1)  # of each head, in the order of collate, which decides how sums round
    known = {"reward_mean": [x.mean() for x in scores], "reward_std": [x.std().nan_to_num() for x in scores]}
    return {
        key: value or float(name == "reward_std")  # one score, or scores that are all the same, keep their scale
        for name, values in known.items()
        for key, value in zip(_keys(name, config), map(float, values))
    }


def _describe(model: Scorer, config: RewardConfig, metrics: dict[str, float]) -> None:
    """In the model's configuration: the normalisation among the metrics, or none, and the weights of objectives."""
    for name, default in (("reward_mean", 0.0), ("reward_std", 1.0)):
        values = [metrics.get(key, default) for key in _keys(name, config)]
        setattr(model.module.config, name, values if config.objectives else values[0])
    if config.objectives:
        model.module.config.objective_weights = config.objective_weights or [1.0] * len(config.objectives)


def _keys(name: str, config: RewardConfig) -> list[str]:
    return [f"{name}/{objective}" for objective in config.objectives] or [name]
