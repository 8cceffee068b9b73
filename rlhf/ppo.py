"""PPO from human feedback: four models, a per-token KL penalty to the reference, GAE, clipped losses.

Follows the details of arXiv 2403.17031 where they decide correctness. The reference is the initial policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import reduce
from operator import add

import torch
from torch import Tensor

import rlhf_kernels
from rlhf.advantages import Models, score, with_advantages
from rlhf.config import PPOConfig
from rlhf.data import TokenExample, load
from rlhf.log import Clock, Run, say, say_how_logprobs_are_formed
from rlhf.losses import ppo_losses
from rlhf.model import (
    LanguageModel,
    ModelError,
    Scorer,
    frozen_copy,
    load_language_model,
    load_scorer,
    same_vocabulary,
)
from rlhf.optim import StepGuard, make_optimizer, set_learning_rate
from rlhf.reward import KLController, load_rewards
from rlhf.rollout import Sampling, generate, mix
from rlhf.types import Experience, PromptBatch, Rollout, TrainResult


def train(
    config: PPOConfig,
    on_step: Callable[[int, LanguageModel, dict[str, float]], None] | None = None,
) -> TrainResult:
    models = load_models(config)
    policy, size, source = models.policy, config.batch_size, (config.dataset_name, config.dataset_split)
    data = load(*source, policy.tokenizer, (), config.max_prompt_length, policy.eos_ids, policy.vocab_size)
    models.check_context(data.longest_prompt + config.response_length, "longest prompt + response_length")
    value_rate = config.value_learning_rate or config.learning_rate
    trained = [(policy.module, config.learning_rate), (models.value.module, value_rate)]
    optimizer = make_optimizer(trained, config)
    sampling = Sampling(config.response_length, config.temperature)
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.total_episodes / size)

    with Run(config, {"policy": policy.module, "value": models.value.module}, optimizer, data, total) as run:
        kl = KLController(run.state.get("kl_coef", config.kl_coef), config.kl_target, config.kl_horizon)
        guard = StepGuard(optimizer, [module for module, _ in trained], config.max_grad_norm, run.state)
        for step in run.steps():
            run.poll()
            clock = Clock()
            prompts = prompt_batch(data.window(step * size, (step + 1) * size, config.seed))
            rollout = generate(policy, prompts, sampling, seed=(config.seed, step), should_stop=run.stopping)
            clock.lap("rollout")
            experience, metrics = score(rollout, models, config, run.poll)
            experience = with_advantages(experience, config, kl.coef)
            clock.lap("score")
            rate = set_learning_rate(optimizer, config, step, total)
            stats = [
                update(models, experience, minibatch, guard, config)
                for minibatch in minibatches(experience, config, step)
            ]
            clock.lap("update")
            metrics |= summarize(rollout, experience, stats, kl.coef) | clock.laps
            metrics |= {"lr": rate, "episode": (step + 1) * size, "skipped_steps": guard.skipped}
            kl = kl.update(metrics["objective/kl"], size)
            run.state["kl_coef"] = kl.coef
            if config.sample_steps and step % config.sample_steps == 0:
                run.samples(step, samples(rollout, experience))
            metrics = run.finish(step, metrics)
            if on_step:
                on_step(step + 1, policy, metrics)
        return run.result(policy)


def load_models(config: PPOConfig) -> Models:
    policy = load_language_model(config.model_name_or_path, config)
    say_how_logprobs_are_formed(policy)
    value = load_value_model(config, policy)
    return Models(policy, value, frozen_copy(policy), load_rewards(config, policy))


def load_value_model(config: PPOConfig, policy: LanguageModel) -> Scorer:
    """From value_model_path; else the reward model where it reads the policy's tokens; else the policy, zero head."""
    start = config.value_model_path or config.reward_model_path
    if start:
        value = load_scorer(start, config, head="zero" if config.value_model_path else "keep")
        if same_vocabulary(value, policy):
            return value
        if config.value_model_path:
            raise ModelError(f"value_model_path: {start} has another vocabulary than the policy")
        say("the reward model has another tokenizer: the value model starts from the policy")
    return load_scorer(config.model_name_or_path, config, head="zero")


def prompt_batch(examples: list[TokenExample]) -> PromptBatch:
    names = {name for e in examples for name in e.columns}
    columns = {name: [e.columns.get(name) for e in examples] for name in sorted(names)}
    return PromptBatch([e.prompt for e in examples], [e.text for e in examples], columns)


def minibatches(experience: Experience, config: PPOConfig, step: int) -> Iterator[Tensor]:  # of rows
    """The first epoch goes through the rows in order, in the micro-batches that scored them; later ones shuffle."""
    count = len(experience.scores)
    for epoch in range(config.num_ppo_epochs):
        generator = torch.Generator().manual_seed(mix(config.seed, step, epoch))
        order = torch.randperm(count, generator=generator) if epoch else torch.arange(count)
        yield from order.to(experience.scores.device).chunk(config.num_mini_batches)


def update(
    models: Models,
    experience: Experience,
    minibatch: Tensor,  # rows
    guard: StepGuard,
    config: PPOConfig,
) -> tuple[rlhf_kernels.PPOStats, float]:  # and the gradient norm
    """One optimizer step: a micro-batch at a time, each divided by the tokens of the whole minibatch."""
    tokens = experience.sequences.response_lengths[minibatch].sum()
    parts = []
    for rows in minibatch.split(config.per_device_train_batch_size):
        loss, stats = ppo_losses(models, experience.rows(rows), config, tokens)
        loss.backward()
        parts.append((loss.detach(), stats))
    norm = guard.step(float(sum(loss for loss, _ in parts)))
    return reduce(add, (stats for _, stats in parts)), norm


def summarize(
    rollout: Rollout,
    experience: Experience,
    updates: list[tuple[rlhf_kernels.PPOStats, float]],
    kl_coef: float,
) -> dict[str, float]:
    """TRL's metric names. Objectives are sums over a response, averaged over the responses; KL is the k1 estimate."""
    stats = reduce(add, (stats for stats, _ in updates)).as_dict()
    scores = float(experience.scores.mean())
    penalty = 0.0 - kl_coef * float(experience.kl.sum(1).mean())
    return {
        "objective/kl": float((experience.logprobs - experience.ref_logprobs).sum(1).mean()),
        "objective/entropy": -float(experience.logprobs.sum(1).mean()),
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
        "val/ratio_first": float(updates[0][0].ratio_mean),
        "tokens": int(rollout.sequences.response_lengths.sum()),
        "val/num_eos_tokens": int(rollout.finished.sum()),
        "val/response_length": float(rollout.sequences.response_lengths.float().mean()),
        "grad_norm": sum(norm for _, norm in updates) / len(updates),
    }


def samples(rollout: Rollout, experience: Experience) -> list[dict]:
    columns = rollout.prompts.texts, rollout.completions, experience.scores.tolist()
    return [{"prompt": p, "completion": c, "score": s} for p, c, s in zip(*columns)]
