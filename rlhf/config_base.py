"""What every command's configuration shares: errors, checks, the fields of a run and of a training run."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal


class UsageError(ValueError):
    """Something the user can put right: the command line prints its one line and exits with status 2."""


class TrainingDiverged(RuntimeError):
    """Loss or gradient was not finite in several optimizer steps in a row: status 1."""


class ConfigError(UsageError):
    """A field holds a value that makes no sense."""


def require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def require_each(config: object, expected: str, test, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        require(value is None or test(value), name, expected, value)


def is_given(config: object, name: str) -> bool:
    """Whether a field is other than its default."""
    entry = type(config).__dataclass_fields__[name]
    return getattr(config, name) != (entry.default if entry.default_factory is MISSING else entry.default_factory())


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    output_dir: str
    """Directory of everything that the run writes."""
    seed: int = 1
    """Seed of new weights, data order and sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models live; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type over float32 weights; auto is bfloat16 on GPUs and float32 on CPUs."""

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type.startswith("list") and isinstance(value, str):  # one string is a list of one
                object.__setattr__(self, entry.name, [value])
            require(value is not None or "None" in entry.type, entry.name, entry.type, value)
            require(not isinstance(value, float) or math.isfinite(value), entry.name, "a finite number", value)
        usable = bool(self.output_dir) and not Path(self.output_dir).is_file()
        require(usable, "output_dir", "a directory", self.output_dir)
        require_each(self, "an integer from 0 to 2**63 - 1", lambda v: 0 <= v < 2**63, "seed")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    model_name_or_path: str
    """Model to start from: a directory or a hub id."""
    dataset_name: list[str]
    """Files (.jsonl .json .csv .txt, each also .gz or .zst, and .parquet), directories of them, or hub ids, joined."""
    dataset_split: str = "train"
    """Split of a hub dataset."""
    dataset_weights: list[float] = field(default_factory=list)
    """How often the rows of each dataset stand in an epoch: 0.5 another half each time, 2 twice; by default once."""
    dataset_streaming: bool = False
    """Read rows as they are needed, shuffled in blocks of 1,024; weights are shares of the stream. Needs max_steps."""
    dataset_cache_dir: str | None = None
    """Where rows that became tokens are kept for the next run; by default nowhere."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that cannot be used does: end the run, or be left out and counted."""
    per_device_train_batch_size: int = 8
    """Sequences (or pairs) in one forward and backward pass."""
    gradient_accumulation_steps: int = 1
    """Passes summed into one optimizer step; the result equals one large batch."""
    micro_batch_tokens: int | None = None
    """Most tokens in one forward and backward pass, in place of per_device_train_batch_size sequences."""
    padding_free: bool = True
    """Pack sequences without padding where the model allows it."""
    max_steps: int = -1
    """Stop after this many steps; -1 goes by epochs or episodes."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    """Shape of the decay to zero after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear rise from zero to the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradient norm of a model above which its gradients are scaled down."""
    save_steps: int = 0
    """Steps between checkpoints; 0 writes none but the one on SIGTERM."""
    save_total_limit: int = 2
    """Checkpoints kept, newest first."""
    resume: str = "no"
    """no; auto: from the newest valid checkpoint in output_dir, from scratch when there is none; or a checkpoint."""
    report_to: Literal["auto", "none", "tensorboard", "wandb", "trackio"] = "auto"
    """Tracker beside metrics.jsonl, which is always written; auto is TensorBoard where it is installed."""

    @property
    def budget(self) -> tuple[int, int | None]:
        """(sequences, or tokens where there is a number) in one forward pass."""
        return self.per_device_train_batch_size, self.micro_batch_tokens

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.dataset_name), "dataset_name", "a file or hub id", self.dataset_name)
        count, weights = len(self.dataset_name), self.dataset_weights
        fits = len(weights) in (0, count) and all(0 < weight < math.inf for weight in weights)
        endless = self.dataset_streaming and self.max_steps < 1
        require(not endless, "max_steps", "a number >= 1 with dataset_streaming, which has no end", self.max_steps)
        if self.dataset_streaming and self.dataset_cache_dir is not None:
            raise ConfigError("dataset_cache_dir: expected null with dataset_streaming, which keeps no rows")
        twice = [name for name in self.dataset_name if self.dataset_name.count(name) > 1]
        require(not twice, "dataset_name", "each dataset once, with dataset_weights of 2 and more", twice[:1])
        require(fits, "dataset_weights", f"a number > 0 for each of the {count} datasets", weights)
        at_least_one = "per_device_train_batch_size gradient_accumulation_steps save_total_limit micro_batch_tokens"
        require_each(self, "a number >= 1", lambda v: v >= 1, at_least_one)
        require_each(self, "a number >= 0", lambda v: v >= 0, "save_steps warmup_steps weight_decay")
        require_each(self, "a number > 0", lambda v: v > 0, "learning_rate adam_epsilon max_grad_norm")
        require_each(self, "a number in [0, 1)", lambda v: 0 <= v < 1, "adam_beta1 adam_beta2")
        require(self.max_steps == -1 or self.max_steps >= 1, "max_steps", "-1 or a number >= 1", self.max_steps)


@dataclass(frozen=True, kw_only=True)
class LoraFields:
    """Of the configurations of runs that may train adapters over frozen weights (arXiv 2106.09685)."""

    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """Scale of the adapters, over their rank."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Names of the adapted modules; by default every linear layer below the head."""

    def check_lora(self, used: bool, by: str) -> None:
        """`by` is what asks for adapters."""
        require_each(self, "a number >= 1", lambda v: v >= 1, "lora_r lora_alpha")
        if used and getattr(self, "optim", "adamw") == "adamw_bf16":
            raise ConfigError(f"optim: expected adamw with {by}, whose adapters are float32")
        for entry in () if used else fields(LoraFields):
            if is_given(self, entry.name):
                raise ConfigError(f"{entry.name}: expected its default without {by}, got {getattr(self, entry.name)!r}")


@dataclass(frozen=True, kw_only=True)
class MemoryFields:
    """Of the configurations of runs that can train in less memory."""

    gradient_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them."""
    optim: Literal["adamw", "adamw_bf16"] = "adamw"
    """adamw_bf16: weights, gradients and moments in bfloat16 with stochastic rounding, 8 bytes a parameter."""


@dataclass(frozen=True, kw_only=True)
class SupervisedFields:
    """Of what scores texts: which of their tokens count."""

    completion_only_loss: bool = True
    """Score the completion alone where a row has a prompt; otherwise the whole text."""
    assistant_only_loss: bool = False
    """Score every turn of the assistant in a conversation; by default the last turn alone is the completion, and
    with completion_only_loss false all turns count."""

    @property
    def form(self) -> Literal["completion", "dialogue"]:
        """What rows are read as."""
        return "dialogue" if self.assistant_only_loss else "completion"

    @property
    def scores_completions(self) -> bool:
        """The assistant's turns are completions, whatever completion_only_loss says."""
        return self.completion_only_loss or self.assistant_only_loss


@dataclass(frozen=True, kw_only=True)
class RewardFields:
    """Of what scores responses."""

    reward_model_path: list[str] = field(default_factory=list)
    """Reward models: directories or hub ids of sequence classifiers with one label."""
    reward: list[str] = field(default_factory=list)
    """Reward functions as module:function, f(prompts, completions, **columns) -> numbers, one a completion or token."""
    process_reward_model_path: list[str] = field(default_factory=list)
    """Scorers read at the last token of every step of a response, where their score is paid out."""
    step_separator: str = "\n"
    """Text that ends a step of a response, for process_reward_model_path."""
    reward_weights: list[float] = field(default_factory=list)
    """Weights of the rewards: functions, reward models, process reward models in this order; by default 1 each."""

    @property
    def has_reward(self) -> bool:
        return bool(self.reward_model_path or self.reward or self.process_reward_model_path)

    def check_rewards(self) -> None:
        for function in self.reward:
            require(all(function.partition(":")), "reward", "module:function", function)
        count = len(self.reward_model_path) + len(self.process_reward_model_path) + len(self.reward)
        fits = len(self.reward_weights) in (0, count)
        require(fits, "reward_weights", f"{count} numbers, one a reward", self.reward_weights)
        require(bool(self.step_separator), "step_separator", "a text", self.step_separator)
