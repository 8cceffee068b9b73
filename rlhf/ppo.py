"""PPO from human feedback: a per-token KL penalty to the reference, advantages, clipped losses.

Follows the details of arXiv 2403.17031 where they decide correctness. The reference is the initial policy. A2C, GRPO
and RLOO are settings of the same loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import reduce
from operator import add

import torch
from torch import Tensor

import rlhf_kernels
from rlhf.advantages import score, with_advantages
from rlhf.config import ConfigError, PPOConfig
from rlhf.data import Dataset, fingerprint, load, prompt_batch
from rlhf.evaluation import evaluate, load_prompts
from rlhf.layout import Models, load_models, recomputing
from rlhf.log import Clock, Run
from rlhf.losses import ppo_losses, supervised_loss
from rlhf.model import LanguageModel, check_context
from rlhf.optim import StepGuard, make_optimizer, set_learning_rate
from rlhf.read import Source
from rlhf.reward import KLController, per_response
from rlhf.rollout import Sampling, generate, mix
from rlhf.sft import collate
from rlhf.tokens import TokenExample
from rlhf.types import Experience, Rollout, SequenceBatch, TrainResult, micro_batches
from rlhf.watch import Watch, health

Update = tuple[rlhf_kernels.PPOStats, Tensor]  # of an optimizer step: statistics, and () its gradient norm


def train(
    config: PPOConfig,
    on_step: Callable[[int, LanguageModel, dict[str, float]], None] | None = None,
) -> TrainResult:
    if config.dry_run:
        raise ConfigError("dry_run: expected false where a run trains: rlhf.memory.estimate(config) answers it")
    models = load_models(config)
    policy, size = models.policy, config.batch_size
    data = load(Source.of(config), policy, "prompt", config.max_prompt_length)
    models.check_context(data.longest_prompt + config.response_length, "longest prompt + response_length")
    held_out, supervised = load_prompts(config, models), load_supervised(config, models)
    rates = {"policy": config.learning_rate, "value": config.value_learning_rate or config.learning_rate}
    optimizer = make_optimizer([(module, rates[name]) for name, module in models.modules.items()], config)
    sampling = Sampling(config.response_length, config.temperature)
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.total_episodes / size)

    others = {} if supervised is None else {"ptx_dataset": supervised.fingerprint()}
    if held_out:
        others["eval_dataset"] = fingerprint(map(astuple, held_out))
    with Run(config, models.modules, optimizer, data, total, others) as run:
        kl = KLController(run.state.get("kl_coef", config.kl_coef), config.kl_target, config.kl_horizon)
        guard = StepGuard(optimizer, list(models.modules.values()), config.max_grad_norm, run.state)
        watch, moments = Watch(config, run.state), run.state.setdefault("reward_moments", {})
        for step in run.steps():
            run.poll()
            clock = Clock()
            prompts = prompt_batch(prompts_of(data, step, config))
            rollout = generate(policy, prompts, sampling, seed=(config.seed, step), should_stop=run.stopping)
            clock.lap("rollout")
            batches = list(minibatches(config, step))
            first_epoch = batches[: config.num_mini_batches]
            parts = [part for rows in first_epoch for part in passes(rows, rollout.sequences, models, config)]
            with models.on_device():
                experience, metrics = score(rollout, models, config, parts, moments, run.poll)
                gold = per_response(models.gold.score(rollout)) if models.gold else None
            clock.lap("score")
            experience = with_advantages(experience, config, kl.coef)
            clock.lap("advantages")
            rate = set_learning_rate(optimizer, config, step, total)
            updates: list[Update] = []
            with recomputing(models.modules, config):
                for number, rows in enumerate(batches, start=step * len(batches)):
                    extra = supervised_batch(supervised, number, models, config)
                    warming = step < config.value_warmup_steps
                    updates.append(update(models, experience, rows, guard, config, kl.coef, extra, warming))
                    if config.target_kl and float(updates[-1][0].approx_kl) > config.target_kl:
                        break
            clock.lap("update")
            metrics |= summarize(rollout, experience, updates, config, kl.coef) | clock.laps
            metrics |= {"lr": rate, "episode": (step + 1) * size, "skipped_steps": guard.check()}
            if step < config.value_warmup_steps:  # nothing formed it: 0 would be the first value to warn below
                metrics["policy/entropy_avg"] = math.nan
            watched = metrics["policy/entropy_avg"], metrics["objective/kl"]
            metrics |= health(rollout.completion_ids, rollout.finished, experience.scores.cpu(), *watched, gold)
            if config.reward_normalization != "none":  # whose scores say nothing from step to step
                metrics["watch/score"] = sum(r.weight * metrics[f"rewards/{r.name}"] for r in models.rewards)
            kl = kl.update(metrics["objective/kl"], size)
            run.state["kl_coef"] = kl.coef
            if config.eval_steps and ((step + 1) % config.eval_steps == 0 or step + 1 == total):
                metrics |= evaluate(models, config, held_out, run.state.setdefault("eval", {}))
                run.keep_best(policy, config.metric_for_best_model, metrics)
            run.warn(step, watch.check(step, metrics))
            if config.sample_steps and step % config.sample_steps == 0:
                run.samples(step, samples(rollout, experience))
            metrics = run.finish(step, metrics)
            if on_step:
                on_step(step + 1, policy, metrics)
        return run.result(policy)


def prompts_of(data: Dataset, step: int, config: PPOConfig) -> list[TokenExample]:
    """The prompts of a step, num_generations copies of each side by side."""
    size = config.batch_size // config.num_generations
    window = data.window(step * size, (step + 1) * size, config.seed)
    return [example for example in window for _ in range(config.num_generations)]


def load_supervised(config: PPOConfig, models: Models) -> Dataset | None:
    if config.ptx_dataset_name is None:
        return None
    check_context(models.policy, config.ptx_max_length, "ptx_max_length")
    source = Source((config.ptx_dataset_name,), config.dataset_split, on_bad_row=config.on_bad_row)
    return load(source, models.policy, "completion", config.ptx_max_length)


def supervised_batch(data: Dataset | None, number: int, models: Models, config: PPOConfig) -> SequenceBatch | None:
    """The rows for optimizer step `number` of the run, counted as if none were left out."""
    if data is None:
        return None
    size = config.ptx_batch_size or config.batch_size // config.num_mini_batches
    rows = data.window(number * size, (number + 1) * size, config.seed)
    return collate(rows, models.policy, completion_only=True)


def minibatches(config: PPOConfig, step: int) -> Iterator[Tensor]:  # of rows, int64 on the host
    """The first epoch goes through the rows in order, in the micro-batches that scored them; later ones shuffle."""
    count = config.batch_size
    for epoch in range(config.num_ppo_epochs):
        generator = torch.Generator().manual_seed(mix(config.seed, step, epoch))
        order = torch.randperm(count, generator=generator) if epoch else torch.arange(count)
        yield from order.chunk(config.num_mini_batches)


def passes(rows: Tensor, batch: SequenceBatch, models: Models, config: PPOConfig) -> list[Tensor]:
    """The rows of each forward and backward pass of a minibatch."""
    size, tokens = config.per_device_train_batch_size, config.micro_batch_tokens
    return micro_batches(rows, batch.lengths, size, tokens, models.policy.packed)


def update(
    models: Models,
    experience: Experience,
    minibatch: Tensor,  # rows, int64 on the host
    guard: StepGuard,
    config: PPOConfig,
    kl_coef: float,
    supervised: SequenceBatch | None = None,
    value_only: bool = False,
) -> Update:
    """One optimizer step: a micro-batch at a time, each divided by the tokens (or sequences) of the whole minibatch."""
    in_loss = kl_coef if config.kl_in == "loss" else 0.0
    tokens = int(experience.sequences.counted_lengths[minibatch].sum())
    counted = tokens if config.loss_reduction == "token_mean" else len(minibatch)
    denominator = torch.tensor(float(counted)).to(experience.scores.device, non_blocking=True)
    losses, stats = [], []
    for rows in passes(minibatch, experience.sequences, models, config):
        loss, part = ppo_losses(models, experience.rows(rows), config, denominator, in_loss, value_only)
        loss.backward()
        losses.append(loss.detach())
        stats.append(part)
    if supervised is not None and not value_only:
        for rows in supervised.micro_batches(
            config.per_device_train_batch_size, config.micro_batch_tokens, models.policy.packed
        ):
            loss = config.ptx_coef * supervised_loss(models.policy, supervised, rows)
            loss.backward()
            losses.append(loss.detach())
    return reduce(add, stats), guard.step(torch.stack(losses).sum())


def summarize(
    rollout: Rollout,
    experience: Experience,
    updates: list[Update],
    config: PPOConfig,
    kl_coef: float,
) -> dict[str, float]:
    """TRL's metric names. Objectives are sums over a response, averaged over the responses; objective/kl is the k1
    estimate. Two host syncs."""
    stats = reduce(add, (stats for stats, _ in updates)).as_dict()
    of_response = [x.sum(1).mean() for x in (experience.logprobs, experience.ref_logprobs, experience.kl)]
    norms = torch.stack([norm for _, norm in updates]).mean()
    numbers = [*of_response, experience.scores.mean(), updates[0][0].ratio_mean, norms]
    logprob, ref_logprob, kl, scores, ratio_first, norm = torch.stack([x.double() for x in numbers]).tolist()
    penalty = 0.0 - kl_coef * kl if config.kl_in == "reward" else 0.0
    lengths = rollout.sequences.response_lengths
    return {
        "objective/kl": logprob - ref_logprob,
        "objective/entropy": -logprob,
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": penalty + scores,
        "objective/scores": scores,
        "objective/kl_coef": kl_coef,
        "policy/approxkl_avg": stats["approx_kl"],
        "policy/clipfrac_avg": stats["clip_fraction"],
        "policy/entropy_avg": stats["entropy"],
        "loss/policy_avg": stats["policy_loss"],
        "loss/value_avg": stats["value_loss"],
        "val/clipfrac_avg": stats["value_clip_fraction"],
        "val/ratio": stats["ratio_mean"],
        "val/ratio_first": ratio_first,
        "tokens": int(lengths.sum()),
        "val/num_eos_tokens": int(rollout.finished.sum()),
        "val/response_length": float(lengths.float().mean()),
        "val/updates": len(updates),
        "grad_norm": norm,
    }


def samples(rollout: Rollout, experience: Experience) -> list[dict]:
    columns = rollout.prompts.texts, rollout.completions, experience.scores.tolist()
    return [{"prompt": p, "completion": c, "score": s} for p, c, s in zip(*columns)]
