"""One flat dataclass a command. The sentence under a field is its help text on the command line.

Field names follow TRL's where it has one. This file imports neither torch nor transformers, so that `--help` is quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal


class UsageError(ValueError):
    """Something the user can put right: the command line prints its one line and exits with status 2."""


class TrainingDiverged(RuntimeError):
    """Loss or gradient was not finite in several optimizer steps in a row: status 1."""


class ConfigError(UsageError):
    """A field holds a value that makes no sense."""


def _require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def _require_each(config: object, expected: str, test, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        _require(value is None or test(value), name, expected, value)


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
            _require(value is not None or "None" in entry.type, entry.name, entry.type, value)
            _require(not isinstance(value, float) or math.isfinite(value), entry.name, "a finite number", value)
        usable = bool(self.output_dir) and not Path(self.output_dir).is_file()
        _require(usable, "output_dir", "a directory", self.output_dir)
        _require_each(self, "an integer from 0 to 2**63 - 1", lambda v: 0 <= v < 2**63, "seed")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    model_name_or_path: str
    """Model to start from: a directory or a hub id."""
    dataset_name: str
    """Local .jsonl, .json, .csv, .parquet or .txt file (also .jsonl.gz, .txt.gz), or a hub id."""
    dataset_split: str = "train"
    """Split of a hub dataset."""
    per_device_train_batch_size: int = 8
    """Sequences (or pairs) in one forward and backward pass."""
    gradient_accumulation_steps: int = 1
    """Passes summed into one optimizer step; the result equals one large batch."""
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
    report_to: Literal["none", "tensorboard"] = "none"
    """Tracker beside metrics.jsonl, which is always written."""

    def __post_init__(self):
        super().__post_init__()
        at_least_one = "per_device_train_batch_size gradient_accumulation_steps save_total_limit"
        _require_each(self, "a number >= 1", lambda v: v >= 1, at_least_one)
        _require_each(self, "a number >= 0", lambda v: v >= 0, "save_steps warmup_steps weight_decay")
        _require_each(self, "a number > 0", lambda v: v > 0, "learning_rate adam_epsilon max_grad_norm")
        _require_each(self, "a number in [0, 1)", lambda v: 0 <= v < 1, "adam_beta1 adam_beta2")
        _require(self.max_steps == -1 or self.max_steps >= 1, "max_steps", "-1 or a number >= 1", self.max_steps)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    max_length: int = 1024
    """Tokens in a sequence; a plain text is cut into blocks of this length."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    completion_only_loss: bool = True
    """Score the completion alone where a row has a prompt; otherwise the whole text."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""

    def __post_init__(self):
        super().__post_init__()
        _require_each(self, "a number >= 2", lambda v: v >= 2, "max_length")
        _require_each(self, "a number > 0", lambda v: v > 0, "num_train_epochs")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    max_length: int = 1024
    """Tokens in a sequence: a prompt loses its head, a completion its tail."""
    num_train_epochs: float = 1.0
    """Passes over the pairs."""
    center_rewards_coefficient: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them near zero; 0.01 is usual."""
    eval_fraction: float = 0.1
    """Part of the pairs held out to measure accuracy, chosen by the seed."""
    normalize_rewards: bool = True
    """Keep mean and deviation of scores on the training data in config.json: scoring makes them 0 and 1."""

    def __post_init__(self):
        super().__post_init__()
        _require_each(self, "a number >= 2", lambda v: v >= 2, "max_length")
        _require_each(self, "a number > 0", lambda v: v > 0, "num_train_epochs")
        _require_each(self, "a number >= 0", lambda v: v >= 0, "center_rewards_coefficient")
        _require_each(self, "a number in [0, 1)", lambda v: 0 <= v < 1, "eval_fraction")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(TrainConfig):
    reward_model_path: str | None = None
    """Reward model: a directory or hub id of a sequence classifier with one label."""
    reward: list[str] = field(default_factory=list)
    """Reward functions as module:function, called as f(prompts, completions, **columns); all rewards are summed."""
    value_model_path: str | None = None
    """Start of the value model; by default the reward model if its tokenizer agrees, else the policy, head zero."""
    total_episodes: int = 10_000
    """Responses to sample in the whole run."""
    num_mini_batches: int = 1
    """Optimizer steps in one pass over a batch; a batch is size * accumulation * this many episodes."""
    num_ppo_epochs: int = 4
    """Passes over each batch of episodes."""
    max_prompt_length: int = 512
    """Tokens kept of a prompt, from its end."""
    response_length: int = 53
    """Most tokens in a response."""
    temperature: float = 0.7
    """Sampling temperature, which divides the logits in every log-probability too."""
    missing_eos_penalty: float | None = 1.0
    """Taken off the score of a response that did not end; null leaves scores as they are."""
    score_clip: float | None = None
    """Bound on the absolute score of a response, before missing_eos_penalty is taken off."""
    kl_coef: float = 0.05
    """Weight of the per-token KL penalty to the reference; the first value of the adaptive controller."""
    kl_target: float | None = None
    """KL in nats per response that an adaptive controller steers to; null keeps kl_coef fixed."""
    kl_horizon: int = 10_000
    """Episodes over which the adaptive controller acts; more than a fifth of a batch."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """Per-token estimate of the KL in the reward."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_rewards: bool = False
    """Scale rewards to deviation 1, mean kept."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and deviation 1 over the batch."""
    cliprange: float = 0.2
    """Policy ratio clip below 1, and above unless cliprange_high is given."""
    cliprange_high: float | None = None
    """Policy ratio clip above 1."""
    cliprange_value: float | None = 0.2
    """Clip of the value's change; null leaves it free."""
    dual_clip: float | None = None
    """Bound, > 1, on the ratio's weight where the advantage is negative."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    learning_rate: float = 3e-6
    """Peak learning rate of AdamW."""
    value_learning_rate: float | None = None
    """Peak learning rate of the value model; by default that of the policy."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay to zero after the warm-up."""
    adam_epsilon: float = 1e-5
    """AdamW's epsilon."""
    sample_steps: int = 10
    """Steps between tables of samples; 0 for none."""

    @property
    def batch_size(self) -> int:
        """Episodes sampled at each step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    def __post_init__(self):
        super().__post_init__()
        at_least_one = "total_episodes num_mini_batches num_ppo_epochs max_prompt_length response_length kl_horizon"
        _require_each(self, "a number >= 1", lambda v: v >= 1, at_least_one)
        positive = "temperature score_clip kl_target cliprange_value value_learning_rate"
        _require_each(self, "a number > 0", lambda v: v > 0, positive)
        non_negative = "missing_eos_penalty kl_coef vf_coef entropy_coef sample_steps cliprange_high"
        _require_each(self, "a number >= 0", lambda v: v >= 0, non_negative)
        _require_each(self, "a number in [0, 1]", lambda v: 0 <= v <= 1, "gamma lam")
        _require_each(self, "a number in [0, 1)", lambda v: 0 <= v < 1, "cliprange")
        _require_each(self, "a number > 1", lambda v: v > 1, "dual_clip")
        if self.kl_target is not None:  # one update changes the coefficient by up to a fifth of batch_size / kl_horizon
            least = self.batch_size / 5
            _require(self.kl_horizon > least, "kl_horizon", f"a number > {least:g} (batch / 5)", self.kl_horizon)
        if not self.reward_model_path and not self.reward:
            raise ConfigError("reward_model_path: expected a reward model, or --reward module:function, got neither")
        for name in self.reward:
            _require(all(name.partition(":")), "reward", "module:function", name)


@dataclass(frozen=True, kw_only=True)
class InitConfig(RunConfig):
    dataset_name: str
    """Corpus that the tokenizer is trained on: any file that `rlhf sft` takes."""
    dataset_split: str = "train"
    """Split of a hub dataset."""
    tokenizer: Literal["bpe", "word"] = "bpe"
    """bpe: byte-level pairs, any text comes back exactly; word: whitespace-separated words, for toy languages."""
    vocab_size: int = 2048
    """Most entries of the vocabulary, the special tokens included."""
    model_type: str = "llama"
    """Architecture, as transformers names it."""
    hidden_size: int = 128
    """Width of the model."""
    num_hidden_layers: int = 4
    """Layers."""
    num_attention_heads: int = 4
    """Attention heads; must divide hidden_size."""
    intermediate_size: int | None = None
    """Width of the MLP; by default four times hidden_size."""
    max_position_embeddings: int = 2048
    """Longest sequence."""
    tie_word_embeddings: bool = True
    """Use one matrix for input and output embeddings."""

    def __post_init__(self):
        super().__post_init__()
        sizes = "hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
        _require_each(self, "a number >= 1", lambda v: v >= 1, sizes)
        _require_each(self, "a number >= 8", lambda v: v >= 8, "vocab_size")
        heads, width = self.num_attention_heads, self.hidden_size
        _require(width % heads == 0, "num_attention_heads", f"a divisor of hidden_size {width}", heads)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RunConfig):
    model_name_or_path: str
    """Model to sample from: a directory or a hub id."""
    prompt: list[str] = field(default_factory=list)
    """Prompts to continue."""
    dataset_name: str | None = None
    """File or hub id whose prompts are continued."""
    dataset_split: str = "train"
    """Split of a hub dataset."""
    num_prompts: int = 8
    """Prompts taken from the start of the dataset."""
    num_return_sequences: int = 1
    """Samples a prompt."""
    max_prompt_length: int = 512
    """Tokens kept of a prompt, from its end."""
    max_new_tokens: int = 64
    """Most tokens in a sample."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    output_dir: str = "generated"
    """Directory of samples.jsonl."""

    def __post_init__(self):
        super().__post_init__()
        counts = "num_prompts num_return_sequences max_prompt_length max_new_tokens"
        _require_each(self, "a number >= 1", lambda v: v >= 1, counts)
        _require_each(self, "a number >= 0", lambda v: v >= 0, "temperature")
        if not self.prompt and not self.dataset_name:
            raise ConfigError("prompt: expected --prompt TEXT or --dataset_name FILE, got neither")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(RunConfig):
    output_dir: str = "demo"
    """Directory of the run's data, models, metrics and curve.png."""


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    pass
