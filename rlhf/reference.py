"""What the reference says of preference data: log-probabilities of completions, summed over their tokens.

By default the reference is the policy as it starts. It scores the data once, before the first step, so that no second
model is held; what it said goes into a file named by a hash of all that it depends on. A continued run reads that file,
and where it is gone or damaged asks the initial weights again, before the checkpoint's are loaded over them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import rlhf_kernels
from rlhf.config import DPOConfig, UsageError
from rlhf.data import Dataset
from rlhf.files import bytes_of, keep, kept
from rlhf.forward import token_logprobs
from rlhf.layout import enable_checkpointing
from rlhf.log import make_folder, say
from rlhf.model import (
    LanguageModel,
    ModelError,
    check_context,
    frozen,
    frozen_copy,
    load_language_model,
    same_vocabulary,
    to_bfloat16,
    with_adapters,
)
from rlhf.read import DataError
from rlhf.store import Examples
from rlhf.tokens import TokenExample, fit
from rlhf.types import SequenceBatch, pad_sequences

VERSION = f"{rlhf_kernels.__version__} 1"  # of what stands in a file: a change of the scores is a new number
COLUMNS = {"preference": ("ref_chosen_logps", "ref_rejected_logps"), "unpaired": ("ref_logps",)}  # TRL's names


@dataclass(frozen=True)
class Reference:
    """The reference's log-probabilities stand in the examples' columns, or come from a model at every step."""

    config: DPOConfig
    identity: dict[str, str]  # what a continued run must agree with
    model: LanguageModel | None = None
    kl: Tensor | None = None  # (n,) of mismatched completions, by position in the stream of examples
    held_out_kl: Tensor | None = None

    def __call__(self, examples: list[TokenExample]) -> Tensor | None:  # (k, P) float32
        """None where the loss has no reference."""
        if not self.config.has_reference:
            return None
        if self.model is not None:
            return completion_logps(self.model, examples, self.config)
        return torch.tensor([[e.columns[name] for e in examples] for name in COLUMNS[self.config.form]])


def load_policy(config: DPOConfig) -> tuple[LanguageModel, LanguageModel]:
    """(policy, what it starts from): the same model, or with LoRA the frozen one below the adapters."""
    base = load_language_model(config.model_name_or_path, config)
    if config.optim == "adamw_bf16":
        to_bfloat16(base.module)
    policy = with_adapters(base, config) if config.use_peft else base
    if config.gradient_checkpointing:
        enable_checkpointing({"policy": policy.module})
    return policy, base


def prepare(
    config: DPOConfig,
    base: LanguageModel,  # what the policy starts from, before its first step
    data: Dataset,
    held_out: Dataset,
    windows: list[tuple[int, int]],
) -> tuple[Dataset, Dataset, Reference]:
    """The data with what is known of the reference in its columns, and the rest."""
    if not config.has_reference:
        return data, held_out, Reference(config, {})
    if config.precompute_ref_log_probs and _in_rows(config, data, held_out):
        return data, held_out, Reference(config, {"reference": "columns"})
    model = _load_reference(config, base)
    identity = {"reference": fingerprint_of(model.module)}
    if not config.precompute_ref_log_probs:
        model = frozen_copy(base) if model is base and not config.use_peft else model
        return data, held_out, Reference(config, identity, model)
    depends = [VERSION, identity, config.form, config.max_length, str(model.compute_dtype), model.packed]
    depends += [model.vocab_size, data.fingerprint(), held_out.fingerprint()]
    depends += [windows, config.seed, data.parts] if config.loss_type == "kto" else []  # who stands beside whom
    key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
    folder = Path(config.ref_logps_cache_dir or make_folder(config))
    found = remember(folder, key, lambda: _score(config, model, data, held_out, windows))
    parts = (_with_columns(part, found.get(name), config) for name, part in (("data", data), ("held_out", held_out)))
    return *parts, Reference(config, identity, None, found.get("kl"), found.get("held_out_kl"))


def mismatched(examples: list[TokenExample], max_length: int) -> list[TokenExample]:
    """Each prompt with the completion of the example before it, the first with the last one's."""
    found = []
    for example, before in zip(examples, [examples[-1], *examples[:-1]]):
        prompt, completions = fit(example.prompt, before.completions, max_length)
        found.append(replace(example, prompt=prompt, completions=completions))
    return found


def collate(examples: list[TokenExample], model: LanguageModel) -> SequenceBatch:
    """All completions in one batch: of P pairs row i is chosen and row P + i rejected."""
    sides = list(zip(*(e.completions for e in examples)))
    completions = [completion for side in sides for completion in side]
    return pad_sequences([e.prompt for e in examples] * len(sides), completions, model.pad_id).to(model.device)


@torch.no_grad()
def completion_logps(
    model: LanguageModel,
    examples: list[TokenExample],
    config: DPOConfig,
) -> Tensor:  # (k, P) float32, of k completions an example
    parts = []
    for start in range(0, len(examples), config.batch_size):
        batch = collate(examples[start : start + config.batch_size], model)
        sums = torch.zeros(len(batch), device=model.device)
        for rows in batch.micro_batches(*config.budget, model.packed):
            part = batch.rows(rows)
            logprobs, _ = token_logprobs(model, part)
            found = rlhf_kernels.sequence_logprobs(logprobs, cu_seqlens=part.cu_seqlens)
            sums[rows.to(model.device, non_blocking=True)] = found
        parts.append(sums.view(-1, min(config.batch_size, len(examples) - start)))
    return torch.cat(parts, 1)


def _score(config: DPOConfig, model, data: Dataset, held_out: Dataset, windows) -> dict[str, Tensor]:
    say(f"{model.module.name_or_path}: scores {len(data) + len(held_out)} rows as the reference")
    found = {"data": completion_logps(model, data.examples, config)}
    if len(held_out):
        found["held_out"] = completion_logps(model, held_out.examples, config)
    if config.loss_type == "kto":
        steps = (data.window(*window, config.seed) for window in windows)  # made one at a time: all are many lists
        for name, groups in (("kl", steps), ("held_out_kl", [held_out.examples] if len(held_out) else [])):
            sums = [completion_logps(model, mismatched(group, config.max_length), config)[0] for group in groups]
            if sums:
                found[name] = torch.cat(sums)
    return {name: x.cpu() for name, x in found.items()}


def _load_reference(config: DPOConfig, base: LanguageModel) -> LanguageModel:
    path = config.ref_model_name_or_path
    if path is None:
        return base
    model = load_language_model(path, config)
    if not same_vocabulary(model, base):
        raise ModelError(f"ref_model_name_or_path: {path} has another vocabulary than {config.model_name_or_path}")
    check_context(model, config.max_length, "max_length")
    return frozen(model, config)


def _in_rows(config: DPOConfig, data: Dataset, held_out: Dataset) -> bool:
    """Whether every row brings what the reference says, of all its tokens; kto needs it of mismatched completions,
    too."""
    names = COLUMNS[config.form]
    rows = [e.columns for part in (data, held_out) for e in part.examples]
    if config.loss_type == "kto" or not all(row.keys() >= set(names) for row in rows):
        return False
    told, way_out = " and ".join(names), "or let a model be asked with precompute_ref_log_probs false"
    if config.ref_model_name_or_path is not None:
        raise DataError(f"ref_model_name_or_path: expected null, as every row has {told}, {way_out}")
    for value in (row[name] for row in rows for name in names):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DataError(f"{told}: expected log-probabilities, got {value!r:.80}")
    if cut := data.notes.get("cut_prompts", 0) + data.notes.get("cut_completions", 0):
        expected = f"no row longer than {config.max_length} tokens, as {told} are of whole rows"
        raise DataError(f"max_length: expected {expected}, got {cut} that were cut: raise it, {way_out}")
    return True


def _with_columns(data: Dataset, sums: Tensor | None, config: DPOConfig) -> Dataset:  # sums (k, N)
    if sums is None:
        return data
    columns = [dict(zip(COLUMNS[config.form], values)) for values in sums.t().tolist()]
    examples = (replace(e, columns=e.columns | known) for e, known in zip(data.examples, columns))
    return replace(data, examples=Examples(examples))


# Files


def fingerprint_of(module: nn.Module) -> str:
    """Of weights and configuration, wherever they were loaded from."""
    passing = ("_", "transformers_version")  # where it was loaded from and by what
    public = {name: value for name, value in module.config.to_dict().items() if not name.startswith(passing)}
    digest = hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode())
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(bytes_of(parameter))
    return digest.hexdigest()


def remember(folder: Path, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What was computed under this key, from the file that holds it; else computed now and written, whole or not."""
    path = folder / f"reference-{key[:16]}.safetensors"
    if path.exists():
        if (found := kept(path, key)) is not None:
            return found
        say(f"{path}: damaged; the reference scores the data again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"ref_logps_cache_dir: cannot be made: {error}") from error
    tensors = compute()
    try:
        keep(path, key, tensors)
    except OSError as error:
        raise UsageError(f"ref_logps_cache_dir: cannot be written: {error}") from error
    return tensors
