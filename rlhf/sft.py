"""Supervised fine-tuning: the mean negative log-probability of completions, or of whole texts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhf.config import SFTConfig
from rlhf.data import load, plan
from rlhf.forward import token_logprobs
from rlhf.log import Run, say_how_logprobs_are_formed
from rlhf.losses import completion_loss
from rlhf.model import LanguageModel, check_context, load_language_model
from rlhf.optim import StepGuard, make_optimizer, set_learning_rate
from rlhf.read import Source
from rlhf.tokens import TokenExample
from rlhf.types import SequenceBatch, TrainResult, pad_sequences


def train(
    config: SFTConfig,
    on_step: Callable[[int, LanguageModel, dict[str, float]], None] | None = None,
) -> TrainResult:
    model = load_language_model(config.model_name_or_path, config)
    say_how_logprobs_are_formed(model)
    check_context(model, config.max_length, "max_length")
    data = load(Source.of(config), model, "completion", config.max_length)
    optimizer = make_optimizer([(model.module, config.learning_rate)], config)
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    windows = plan(len(data), batch_size, config.num_train_epochs, config.max_steps)

    with Run(config, {"model": model.module}, optimizer, data, len(windows)) as run:
        guard = StepGuard(optimizer, [model.module], config.max_grad_norm, run.state)
        for step in run.steps():
            batch = collate(data.window(*windows[step], config.seed), model, config.completion_only_loss)
            rate = set_learning_rate(optimizer, config, step, len(windows))
            tokens = int(batch.response_lengths.sum())
            sums = torch.zeros(2, device=model.device)  # loss and entropy
            for rows in batch.micro_batches(config.per_device_train_batch_size, None, model.packed):
                run.poll()
                logprobs, entropies = token_logprobs(model, batch.rows(rows), entropy=True)
                part = completion_loss(logprobs, tokens)
                part.backward()
                sums += torch.stack([part.detach(), entropies.detach().sum() / tokens])
            norm = guard.step(sums[0])
            loss, entropy, norm = torch.stack([*sums, norm]).tolist()
            metrics = {"loss": loss, "entropy": entropy, "grad_norm": norm, "lr": rate, "tokens": tokens}
            metrics |= {"epoch": windows[step][1] / len(data), "skipped_steps": guard.check()}
            metrics = run.finish(step, metrics)
            if on_step:
                on_step(step + 1, model, metrics)
        return run.result(model)


def collate(examples: list[TokenExample], model: LanguageModel, completion_only: bool) -> SequenceBatch:
    prompts = [e.prompt if completion_only else e.prompt[:1] for e in examples]
    answers = [e.completions[0] if completion_only else e.prompt[1:] + e.completions[0] for e in examples]
    return pad_sequences(prompts, answers, model.pad_id).to(model.device)
