"""Preference optimisation without a reward model: DPO and its kin on pairs, KTO on completions with a label.

A step's loss is the mean over all its pairs (or completions), whatever the micro-batches: denominators, and KTO's KL
term, are those of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import rlhf_kernels
from rlhf.config import DPOConfig
from rlhf.config_dpo import OVER_THE_BATCH
from rlhf.data import Dataset, load, plan
from rlhf.forward import response_hidden, token_logprobs
from rlhf.layout import recomputing
from rlhf.log import Clock, Run, say_how_logprobs_are_formed
from rlhf.model import LanguageModel, check_context
from rlhf.optim import StepGuard, make_optimizer, set_learning_rate
from rlhf.read import Source
from rlhf.reference import Reference, collate, completion_logps, load_policy, mismatched, prepare
from rlhf.tokens import TokenExample
from rlhf.types import SequenceBatch, TrainResult, cumulated, micro_batches

Stats = rlhf_kernels.DPOStats | rlhf_kernels.KTOStats


def train(
    config: DPOConfig,
    on_step: Callable[[int, LanguageModel, dict[str, float]], None] | None = None,
) -> TrainResult:
    policy, base = load_policy(config)
    modules = {"policy": policy.module}
    say_how_logprobs_are_formed(policy)
    check_context(policy, config.max_length, "max_length")
    rows = load(Source.of(config), policy, config.form, config.max_length)
    data, held_out = rows.split(config.eval_fraction, config.seed)
    windows = plan(len(data), config.batch_size, config.num_train_epochs, config.max_steps)
    data, held_out, reference = prepare(config, base, data, held_out, windows)
    optimizer = make_optimizer([(policy.module, config.learning_rate)], config)

    with Run(config, modules, optimizer, rows, len(windows), reference.identity) as run:
        guard = StepGuard(optimizer, [policy.module], config.max_grad_norm, run.state)
        for step in run.steps():
            examples = data.window(*windows[step], config.seed)
            rate = set_learning_rate(optimizer, config, step, len(windows))
            batch, clock = collate(examples, policy), Clock()
            theirs = None if reference.kl is None else reference.kl[slice(*windows[step])]
            targets = Targets.of(examples, policy, reference, theirs)
            clock.lap("reference")
            losses, stats = [], []
            with recomputing(modules, config):
                for rows_of_part in whole_pairs(batch, config, policy.packed):
                    run.poll()
                    loss, found = loss_of_part(policy, batch.rows(rows_of_part), targets.rows(rows_of_part), config)
                    loss.backward()
                    losses.append(loss.detach())
                    stats.append(found)
            clock.lap("gradient")
            loss = torch.stack(losses).sum()
            norm = guard.step(loss)
            clock.lap("optimizer")
            metrics = dict(zip(("loss", "grad_norm"), torch.stack([loss, norm]).tolist()))
            metrics |= metrics_of(sum(stats[1:], stats[0]), targets) | clock.laps
            metrics |= {"lr": rate, "epoch": windows[step][1] / len(data), "tokens": int(batch.lengths.sum())}
            metrics["skipped_steps"] = guard.check()
            if step + 1 == len(windows):
                metrics |= evaluate(policy, reference, held_out, config)
            metrics = run.finish(step, metrics)
            if on_step:
                on_step(step + 1, policy, metrics)
        return run.result(policy)


@dataclass(frozen=True)
class Targets:
    """What a loss looks at beside the policy's log-probabilities. R rows: chosen then rejected, or completions."""

    whole: Tensor  # (2,) what the sums are divided by: pairs (or completions) and chosen tokens of the step
    lengths: Tensor  # (R,) completion tokens
    ref_logps: Tensor | None  # (R,) float32
    labels: Tensor | None = None  # (R,) bool, of completions with a label
    kl: Tensor | None = None  # () of the step, for kto

    @staticmethod
    def of(
        examples: list[TokenExample],
        policy: LanguageModel,
        reference: Reference,
        mismatched_logps: Tensor | None = None,  # (P,) the reference's, where they are known
    ) -> Targets:
        config, device, unpaired = reference.config, policy.device, reference.config.form == "unpaired"
        lengths = [[len(completion) for completion in side] for side in zip(*(e.completions for e in examples))]
        whole = [float(len(examples)), max(1.0, sum(lengths[0]))]
        known = [torch.tensor(whole), torch.tensor(lengths).flatten(), reference(examples)]
        known += [torch.tensor([e.columns["label"] for e in examples])] if unpaired else []
        whole, lengths, ref_logps, *labels = (x if x is None else x.to(device, non_blocking=True) for x in known)
        kl = step_kl(policy, reference, examples, mismatched_logps) if config.loss_type == "kto" else None
        return Targets(whole, lengths, None if ref_logps is None else ref_logps.flatten(), *labels, kl=kl)

    def rows(self, index: Tensor) -> Targets:
        """These rows (int64 on the host), of the same step."""
        there = index.to(self.lengths.device, non_blocking=True)
        of_rows = {name: getattr(self, name) for name in ("lengths", "ref_logps", "labels")}
        return replace(self, **{name: x[there] for name, x in of_rows.items() if x is not None})


def whole_pairs(batch: SequenceBatch, config: DPOConfig, packed: bool) -> list[Tensor]:
    """Rows, int64 on the host, of each forward and backward pass: both of a pair, or completions with a label."""
    if config.form == "unpaired":
        return batch.micro_batches(*config.budget, packed)
    chosen, rejected = batch.lengths.chunk(2)
    tokens = chosen + rejected if packed else 2 * torch.maximum(chosen, rejected)
    parts = micro_batches(torch.arange(len(tokens)), tokens, *config.budget, packed)
    return [torch.cat([part, part + len(tokens)]) for part in parts]


# Losses


def loss_of_part(
    policy: LanguageModel,
    batch: SequenceBatch,
    targets: Targets,  # of its rows
    config: DPOConfig,
) -> tuple[Tensor, Stats]:
    """This part of the step's loss. Of pairs it goes from hidden states to the head's gradients at once, where the head
    allows it."""
    if config.form == "unpaired" or not policy.head.fused:
        logprobs, _ = token_logprobs(policy, batch)
        sums = rlhf_kernels.sequence_logprobs(logprobs, cu_seqlens=batch.cu_seqlens)
        return loss_of_logps(sums, targets, config)
    hidden = response_hidden(policy, batch)
    bounds = cumulated(batch.response_lengths).int()  # on the host: pairs are planned there
    with policy.autocast():
        loss, stats, _ = rlhf_kernels.linear_dpo_loss(
            hidden,
            token_ids=batch.response_ids,
            ref_logps=targets.ref_logps,
            cu_seqlens=bounds,
            options=loss_options(config),
            denominators=_denominators(targets, config),
            **policy.head_options(),
        )
    return loss, stats


def loss_of_logps(
    logps: Tensor,  # (R,)
    targets: Targets,
    config: DPOConfig,
) -> tuple[Tensor, Stats]:
    if config.form == "unpaired":
        names = ("beta", "desirable_weight", "undesirable_weight", "loss_type")
        options = {name: getattr(config, name) for name in names}
        known = (targets.ref_logps, targets.labels, targets.kl)
        return rlhf_kernels.kto_loss(logps, *known, **options, denominator=targets.whole[0])
    refs = () if targets.ref_logps is None else targets.ref_logps.chunk(2)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), targets.lengths.chunk(2)))
    how = {"options": loss_options(config), "denominators": _denominators(targets, config)}
    return rlhf_kernels.dpo_loss(*logps.chunk(2), *refs, **lengths, **how)


def loss_options(config: DPOConfig) -> rlhf_kernels.DPOOptions:
    names = ("beta", "loss_type", "label_smoothing", "simpo_gamma", "cpo_alpha", "discopop_tau")
    return rlhf_kernels.DPOOptions(*(getattr(config, name) for name in names), sft_coef=config.rpo_alpha or 0.0)


def _denominators(targets: Targets, config: DPOConfig) -> Tensor | None:
    return None if config.loss_type in OVER_THE_BATCH else targets.whole


def step_kl(
    policy: LanguageModel,
    reference: Reference,
    examples: list[TokenExample],
    theirs: Tensor | None,  # (P,) the reference's log-probabilities, where they are known
) -> Tensor:  # ()
    """KTO's estimate: the mean log-ratio of each prompt with the completion of another example. One example has no
    other: 0."""
    if len(examples) < 2:
        return torch.zeros((), device=policy.device)
    others = mismatched(examples, reference.config.max_length)
    theirs = completion_logps(reference.model, others, reference.config)[0] if theirs is None else theirs
    ours = completion_logps(policy, others, reference.config)[0]
    return (ours - theirs.to(ours.device, non_blocking=True)).mean()


# Metrics


def metrics_of(stats: Stats, targets: Targets) -> dict[str, float]:
    """TRL's names. What has no sequence in a step is left out."""
    found, metrics = stats.as_dict(), {}
    sides = [side for side in ("chosen", "rejected") if found.get(side, 1)]
    for side in sides:
        metrics |= {f"rewards/{side}": found[f"{side}_rewards"], f"logps/{side}": found[f"logps_{side}"]}
    if len(sides) == 2:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if "accuracy" in found:
        metrics["rewards/accuracies"] = found["accuracy"]
    return metrics if targets.kl is None else metrics | {"kl": max(float(targets.kl), 0.0)}


@torch.no_grad()
def evaluate(policy: LanguageModel, reference: Reference, held_out: Dataset, config: DPOConfig) -> dict[str, float]:
    """Loss and rewards on rows that were held out, as one batch; nothing when none were."""
    if not len(held_out):
        return {}
    targets = Targets.of(held_out.examples, policy, reference, reference.held_out_kl)
    logps = completion_logps(policy, held_out.examples, config).flatten().to(policy.device)
    loss, stats = loss_of_logps(logps, targets, config)
    metrics = {"loss": float(loss), "rows": len(held_out)} | metrics_of(stats, targets)
    return {f"eval/{name}": value for name, value in metrics.items()}
