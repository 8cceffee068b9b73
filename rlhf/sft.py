"""Supervised fine-tuning: the mean negative log-probability of completions, the assistant's turns, or whole texts.

The accuracy of single tokens needs the order of all logits, a matrix product beside those of the loss: it is measured
on held-out rows, not in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config import ConfigError, SFTConfig
from rlhf.data import Dataset, load, plan
from rlhf.forward import likeliest_tokens, response_hidden, token_logprobs
from rlhf.layout import enable_checkpointing, recomputing
from rlhf.log import Run, say_how_logprobs_are_formed
from rlhf.losses import completion_loss
from rlhf.model import LanguageModel, check_context, load_language_model, to_bfloat16, with_adapters
from rlhf.optim import StepGuard, make_optimizer, set_learning_rate
from rlhf.read import Source
from rlhf.tokens import TokenExample
from rlhf.types import SequenceBatch, TrainResult, pad_sequences

GROUP = 256  # held-out rows that are sorted into forward passes together


def train(
    config: SFTConfig,
    on_step: Callable[[int, LanguageModel, dict[str, float]], None] | None = None,
) -> TrainResult:
    model = load_trained(config)
    modules = {"model": model.module}
    data, held_out = load_rows(config, model)
    optimizer = make_optimizer([(model.module, config.learning_rate)], config)
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    windows = plan(len(data), batch_size, config.num_train_epochs, config.max_steps)

    with Run(config, modules, optimizer, data, len(windows), {"eval_dataset": held_out.fingerprint()}) as run:
        guard = StepGuard(optimizer, [model.module], config.max_grad_norm, run.state)
        for step in run.steps():
            batch = collate(data.window(*windows[step], config.seed), model, config.scores_completions)
            rate = set_learning_rate(optimizer, config, step, len(windows))
            tokens = int(batch.counted_lengths.sum())
            sums = torch.zeros(2, device=model.device)  # loss and entropy
            with recomputing(modules, config):
                for rows in batch.micro_batches(*config.budget, model.packed):
                    run.poll()
                    logprobs, entropies = token_logprobs(model, batch.rows(rows), entropy=True)
                    part = completion_loss(logprobs, tokens)
                    part.backward()
                    sums += torch.stack([part.detach(), entropies.detach().sum() / tokens])
            norm = guard.step(sums[0])
            loss, entropy, norm = torch.stack([*sums, norm]).tolist()
            metrics = {"loss": loss, "entropy": entropy, "grad_norm": norm, "lr": rate, "tokens": tokens}
            metrics |= {"epoch": windows[step][1] / len(data), "skipped_steps": guard.check()}
            if (config.eval_steps and (step + 1) % config.eval_steps == 0) or step + 1 == len(windows):
                metrics |= evaluate(model, held_out, config)
            metrics = run.finish(step, metrics)
            if on_step:
                on_step(step + 1, model, metrics)
        return run.result(model)


def load_trained(config: SFTConfig) -> LanguageModel:
    model = load_language_model(config.model_name_or_path, config)
    check_context(model, config.max_length, "max_length")
    if config.optim == "adamw_bf16":
        to_bfloat16(model.module)
    if config.use_peft:
        model = with_adapters(model, config)
    if config.gradient_checkpointing:
        enable_checkpointing({"model": model.module})
    say_how_logprobs_are_formed(model)
    return model


# Rows


def load_rows(config: SFTConfig, model: LanguageModel) -> tuple[Dataset, Dataset]:
    """(training, held out)"""
    data = load(Source.of(config), model, config.form, config.max_length)
    data, held_out = data.split(config.eval_fraction, config.seed)
    if config.eval_fraction and not len(held_out):
        raise ConfigError(f"eval_fraction: {config.eval_fraction} of {len(data)} rows is none: raise it, or leave it 0")
    return data, held_out


def collate(examples: list[TokenExample], model: LanguageModel, completion_only: bool) -> SequenceBatch:
    """With completion_only, what counts of each completion; else every token after a row's first."""
    if not completion_only:
        texts = [e.prompt + e.completions[0] for e in examples]
        return pad_sequences([t[:1] for t in texts], [t[1:] for t in texts], model.pad_id).to(model.device)
    answers = [e.completions[0] for e in examples]
    counted = None
    if any(e.counted is not None for e in examples):
        counted = [[True] * len(a) if e.counted is None else e.counted for e, a in zip(examples, answers)]
    return pad_sequences([e.prompt for e in examples], answers, model.pad_id, counted).to(model.device)


# Held-out rows


@dataclass(frozen=True)
class Fit:
    """Of a model to rows, (N,) float64 on the host."""

    losses: Tensor  # sum of -log p of the tokens that count
    hits: Tensor  # how many of these the model holds likeliest; NaN where nobody asked
    tokens: Tensor  # how many they are

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.losses.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())  # inf where math.exp raises

    @property
    def accuracy(self) -> float:
        return float(self.hits.sum() / self.tokens.sum())


@torch.no_grad()
def measure(
    model: LanguageModel,
    examples: list[TokenExample],
    budget: tuple[int, int | None],  # sequences, or tokens where there is a number, in one forward pass
    completion_only: bool,
    hits: bool = True,
) -> Fit:
    losses, right = torch.full((2, len(examples)), torch.nan, dtype=torch.float64)
    tokens = []
    for start in range(0, len(examples), GROUP):
        batch = collate(examples[start : start + GROUP], model, completion_only)
        tokens.append(batch.counted_lengths)
        for rows in batch.micro_batches(*budget, model.packed):
            part = batch.rows(rows)
            hidden = response_hidden(model, part) if model.head.fused else None
            logprobs, _ = token_logprobs(model, part, hidden=hidden)
            losses[start + rows] = -part.unpack(logprobs).double().sum(1).cpu()
            if hits:
                same = likeliest_tokens(model, part, hidden) == part.response_ids
                right[start + rows] = part.unpack(same).double().sum(1).cpu()
    return Fit(losses, right, torch.cat(tokens).double())


def evaluate(model: LanguageModel, data: Dataset, config: SFTConfig) -> dict[str, float]:
    """On rows that were held out; nothing when none were."""
    if not len(data):
        return {}
    found = measure(model, data.examples, config.budget, config.scores_completions)
    return {
        "eval/loss": found.loss,
        "eval/perplexity": found.perplexity,
        "eval/mean_token_accuracy": found.accuracy,
        "eval/tokens": int(found.tokens.sum()),
    }
