"""`rlhf eval`: what models are worth on data they were not trained on, as a table and as eval.json.

    loss        of a language model on texts: nats a token, perplexity, accuracy of single tokens
    reward      of a reward model on pairs: how often it prefers `chosen`, and by how much
    preference  of a language model on pairs: DPO's implicit rewards, summed over a response and by its tokens
    win_rate    of a policy's responses over another's by a reward, and the KL between the two
    best_of_n   the reward of the best of n samples

Means have a standard error, name_se: over rows, or over prompts where one has several samples; null where there is one.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rlhf.best_of_n import curve, draw
from rlhf.config import EvalConfig, UsageError
from rlhf.config_eval import NEEDS, Metric
from rlhf.data import Dataset, load
from rlhf.evaluation import in_batches, mean_parts, read_prompts, respond, response_kl, standard_error, wins
from rlhf.forward import score_sequences
from rlhf.log import refuse_training_run, save_config, say, show_table
from rlhf.model import (
    LanguageModel,
    ModelError,
    check_context,
    choose_device,
    frozen,
    load_language_model,
    load_scorer,
    same_vocabulary,
)
from rlhf.read import DataError, Source, Tally, read_rows
from rlhf.reward import Reward, Shaping, load_rewards
from rlhf.rollout import Sampling
from rlhf.rows import Form
from rlhf.sft import collate, measure
from rlhf.tokens import TokenExample

Figures = dict[str, float]
COLUMNS: dict[Metric, tuple[set[str], ...]] = {  # sets of columns, any of which a row must have
    "loss": ({"completion"}, {"messages"}, {"text"}),
    "reward": ({"chosen", "rejected"},),
    "preference": ({"chosen", "rejected"},),
    "win_rate": ({"prompt"}, {"messages"}, {"chosen", "rejected"}),
    "best_of_n": ({"prompt"}, {"messages"}, {"chosen", "rejected"}),
}


def main(config: EvalConfig) -> dict[str, Figures]:
    """The figures of each metric."""
    folder = Path(config.output_dir)
    refuse_training_run(folder, "figures")
    metrics = chosen_metrics(config)
    device, dtype = choose_device(config)
    say(f"{folder}: {device.type}, {dtype} compute; {', '.join(metrics)}")
    subject = Subject(config)
    with torch.no_grad():
        found = {name: MEASURES[name](subject) for name in metrics}
    save_config(config)
    if "best_of_n" in found and importlib.util.find_spec("matplotlib"):
        draw(folder / "best_of_n.png", found["best_of_n"]["curve"])
    report = {"config": asdict(config), **found}
    (folder / "eval.json").write_text(json.dumps(without_nan(report), indent=2) + "\n", encoding="utf-8")
    show_table(str(folder), rows_of(found), ruled=False)
    return found


def source_of(config: EvalConfig) -> Source:
    return Source(tuple(config.dataset_name), config.dataset_split, on_bad_row=config.on_bad_row)


def chosen_metrics(config: EvalConfig) -> list[Metric]:
    """Those that are asked for, or all that the fields and the first row's columns allow."""
    if config.metrics:
        return [name for name in NEEDS if name in config.metrics]
    rows = read_rows(config.dataset_name[0], config.dataset_split, Tally(config.on_bad_row).bad)
    _, row = next(rows, ("", {}))
    fitting = [name for name in NEEDS if any(columns <= row.keys() for columns in COLUMNS[name])]
    if able := [name for name in fitting if not config.lacks(name)]:
        return able
    missing = "; ".join(f"{name} needs {config.lacks(name)}" for name in fitting) or "no metric reads these"
    columns = ", ".join(row) or "no columns"
    raise UsageError(f"metrics: nothing to measure on rows with {columns}: {missing}")


@dataclass(frozen=True)
class Subject:
    """Models and data, each loaded when it is first asked for."""

    config: EvalConfig

    @cached_property
    def policy(self) -> LanguageModel:
        return frozen(load_language_model(self.config.model_name_or_path, self.config), self.config)

    @cached_property
    def reference(self) -> LanguageModel | None:
        path = self.config.ref_model_name_or_path
        return None if path is None else frozen(load_language_model(path, self.config), self.config)

    @cached_property
    def rewards(self) -> list[Reward]:
        return load_rewards(self.config, self.policy)

    @cached_property
    def samples(self) -> Samples:
        """Of the policy, which win_rate and best_of_n share."""
        return sample(self.config, self.policy, self.rewards, self.reference)

    def rows(self, model, form: Form) -> Dataset:
        check_context(model, self.config.max_length, "max_length")
        data = load(source_of(self.config), model, form, self.config.max_length)
        tell_of_rows(form, data)
        return data


# Rows


def tell_of_rows(form: Form, data: Dataset) -> None:
    say(f"read as {form}: {', '.join(f'{count} {name}' for name, count in data.notes.items() if count)}")
    for reason in data.reasons:
        say(f"skipped {reason}")


def of_loss(subject: Subject) -> Figures:
    config, model = subject.config, subject.policy
    data = subject.rows(model, config.form)
    found = measure(model, data.examples, config.budget, config.scores_completions)
    error = of_ratio(found.losses, found.tokens)
    return {
        "loss": found.loss,
        "loss_se": error,
        "perplexity": found.perplexity,
        "perplexity_se": found.perplexity * error,
        "mean_token_accuracy": found.accuracy,
        "mean_token_accuracy_se": of_ratio(found.hits, found.tokens),
        "tokens": int(found.tokens.sum()),
        "rows": len(data),
    }


def of_reward(subject: Subject) -> Figures:
    """Of each reward model, those after the first as model_2/..."""
    config, found = subject.config, {}
    for number, path in enumerate(config.reward_model_path, start=1):
        scorer = frozen(load_scorer(path, config), config)
        data = subject.rows(scorer, "preference")
        batch = collate(sides_of(data), scorer, completion_only=True)
        margins = torch.sub(*score_sequences(scorer, batch, *config.budget).cpu().view(-1, 2).unbind(1))
        name = "" if number == 1 else f"model_{number}/"
        right = wins(margins, torch.zeros_like(margins))
        found |= with_error(f"{name}accuracy", right) | with_error(f"{name}margin", margins)
        found |= {f"{name}ties": int((margins == 0).sum()), f"{name}pairs": len(data)}
    return found


def sides_of(data: Dataset) -> list[TokenExample]:
    """chosen, rejected of the first pair, then of the next."""
    return [replace(e, completions=[side]) for e in data.examples for side in e.completions]


def of_preference(subject: Subject) -> Figures:
    """TRL's names. A response's implicit reward is beta * (log p - log ref), or beta * log p without a reference;
    per_token is that over its tokens."""
    config, policy, reference = subject.config, subject.policy, subject.reference
    if reference and not same_vocabulary(policy, reference):
        path = config.ref_model_name_or_path
        raise ModelError(f"ref_model_name_or_path: {path} has another vocabulary than the model: leave it out")
    data = subject.rows(policy, "preference")
    sides = sides_of(data)
    ours = measure(policy, sides, config.budget, completion_only=True, hits=False)
    ratios = -ours.losses
    if reference:
        ratios = ratios + measure(reference, sides, config.budget, completion_only=True, hits=False).losses
    found = {}
    for name, of_side in (("rewards", config.beta * ratios), ("per_token", config.beta * ratios / ours.tokens)):
        chosen, rejected = of_side.view(-1, 2).unbind(1)
        found |= with_error(f"{name}/accuracies", (chosen > rejected).float())
        found |= with_error(f"{name}/margins", chosen - rejected)
        found |= with_error(f"{name}/chosen", chosen) | with_error(f"{name}/rejected", rejected)
    chosen, rejected = (-ours.losses).view(-1, 2).unbind(1)
    found |= with_error("logps/chosen", chosen) | with_error("logps/rejected", rejected)
    return found | {"pairs": len(data)}


# Prompts


@dataclass(frozen=True)
class Samples:
    """Of P prompts, K responses each; on the host."""

    scores: Tensor  # (P, K) float32, weighted sums of the rewards
    lengths: Tensor  # (P, K) float32, tokens
    finished: Tensor  # (P, K) float32, 1 where the response ends with an EOS token
    kl: Tensor | None  # (P, K) float32, log p - log ref; None without a reference that reads the same tokens
    parts: Figures  # the mean of each reward
    skipped: int  # rows that gave no prompt

    def figures(self, prefix: str = "") -> Figures:
        columns = {"score": self.scores, "length": self.lengths, "eos_rate": self.finished}
        found = {name: value for key, x in columns.items() for name, value in with_error(f"{prefix}{key}", x).items()}
        return found | ({f"{prefix}{name}": mean for name, mean in self.parts.items()} if len(self.parts) > 1 else {})


def sample(
    config: EvalConfig, policy: LanguageModel, rewards: list[Reward], reference: LanguageModel | None = None
) -> Samples:
    data = read_prompts(source_of(config), config.num_prompts, policy, config.max_prompt_length)
    tell_of_rows("prompt", data)
    readers = [reward.reader for reward in rewards if reward.reader]
    for model in (policy, *readers):
        check_context(model, data.longest_prompt + config.max_new_tokens, "longest prompt + max_new_tokens")
    copies = [example for example in data.examples for _ in range(config.num_return_sequences)]
    prompts = in_batches(copies, config.per_device_eval_batch_size)
    sampling = Sampling(config.max_new_tokens, config.temperature)
    comparable = reference is not None and same_vocabulary(policy, reference)
    scored, columns = [], []
    for rollout, found in respond(policy, rewards, prompts, sampling, config.seed, Shaping()):
        kl = response_kl(policy, reference, rollout, config.budget, config.temperature) if comparable else found.scores
        scored.append(found)
        columns.append((found.scores, rollout.sequences.response_lengths.float(), rollout.finished.float(), kl))
    scores, lengths, finished, kl = (torch.cat(column).view(len(data), -1) for column in zip(*columns))
    skipped = data.notes.get("skipped_rows", 0)
    return Samples(scores, lengths, finished, kl if comparable else None, mean_parts(scored), skipped)


def of_win_rate(subject: Subject) -> Figures:
    """The policy over the reference: the same prompts and random numbers, ties count half."""
    config, ours, reference = subject.config, subject.samples, subject.reference
    shared = same_vocabulary(subject.policy, reference)
    rewards = subject.rewards if shared else load_rewards(config, reference)
    theirs = sample(config, reference, rewards)
    if not shared and ours.skipped + theirs.skipped:
        raise DataError("on_bad_row: win_rate compares answers to the same prompts, and the two models may skip others")
    found = with_error("win_rate", wins(ours.scores, theirs.scores))
    if ours.kl is None:
        say(f"no KL: {config.ref_model_name_or_path} has another vocabulary than {config.model_name_or_path}")
    else:
        found |= with_error("kl", ours.kl)
    prompts, samples = ours.scores.shape
    return found | ours.figures() | theirs.figures("ref_") | {"prompts": prompts, "samples": prompts * samples}


def of_best_of_n(subject: Subject) -> Figures:
    scores = subject.samples.scores
    return {"curve": curve(scores), "prompts": scores.shape[0], "samples": scores.numel()}


MEASURES = {
    "loss": of_loss,
    "reward": of_reward,
    "preference": of_preference,
    "win_rate": of_win_rate,
    "best_of_n": of_best_of_n,
}


# Figures


def with_error(name: str, values: Tensor) -> Figures:
    """The mean and its standard error."""
    return {name: float(values.double().mean()), f"{name}_se": standard_error(values)}


def of_ratio(sums: Tensor, counts: Tensor) -> float:
    """Standard error of sums / counts over rows, whose tokens depend on each other."""
    rest, rows = sums - counts * (sums.sum() / counts.sum()), len(sums)
    return float(rest.square().sum() * rows / max(1, rows - 1)) ** 0.5 / float(counts.sum()) if rows > 1 else math.nan


def rows_of(found: dict[str, Figures]) -> list[dict]:
    """Of the table."""
    rows = []
    for metric, figures in found.items():
        for point in figures.get("curve", []):
            figures = figures | {f"n = {point['n']}": point["score"], f"n = {point['n']}_se": point["score_se"]}
        for name, value in figures.items():
            if name != "curve" and not name.endswith("_se"):
                error = figures.get(f"{name}_se", "")
                rows.append({"metric": metric, "figure": name, "value": value, "± standard error": error})
    return rows


def without_nan(value):
    """JSON has none."""
    if isinstance(value, dict):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
