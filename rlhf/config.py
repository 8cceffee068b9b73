"""One flat dataclass a command. The sentence under a field is its help text on the command line.

Field names follow TRL's where it has one. No configuration imports torch or transformers, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.config_base import (
    ConfigError,
    LoraFields,
    MemoryFields,
    RewardFields,
    RunConfig,
    SupervisedFields,
    TrainConfig,
    TrainingDiverged,
    UsageError,
    require,
    require_each,
)
from rlhf.config_dpo import DPOConfig
from rlhf.config_eval import EvalConfig
from rlhf.config_ppo import PPOConfig
from rlhf.config_reward import RewardConfig

__all__ = [
    "ConfigError", "DPOConfig", "DemoConfig", "EnvConfig", "EvalConfig", "GenerateConfig", "InitConfig", "LoraFields",
    "MemoryFields", "PPOConfig", "RewardConfig", "RewardFields", "RunConfig", "SFTConfig", "SupervisedFields",
    "TrainConfig", "TrainingDiverged", "UsageError",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig, SupervisedFields, LoraFields, MemoryFields):
    max_length: int = 1024
    """Tokens in a sequence; a plain text is cut into blocks of this length."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    use_peft: bool = False
    """Train LoRA adapters over frozen weights; final/ holds the adapters."""
    eval_fraction: float = 0.0
    """Part of the rows held out to measure the loss, chosen by the seed."""
    eval_steps: int = 0
    """Steps between evaluations on the held-out rows, beside the one after the last step; 0 for that one alone."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""

    def __post_init__(self):
        super().__post_init__()
        require_each(self, "a number >= 2", lambda v: v >= 2, "max_length")
        require_each(self, "a number > 0", lambda v: v > 0, "num_train_epochs")
        require_each(self, "a number >= 0", lambda v: v >= 0, "eval_steps")
        require_each(self, "a number in [0, 1)", lambda v: 0 <= v < 1, "eval_fraction")
        self.check_lora(self.use_peft, "use_peft")
        if self.eval_steps and not self.eval_fraction:
            raise ConfigError("eval_steps: expected eval_fraction > 0 beside it, which holds out the rows")


@dataclass(frozen=True, kw_only=True)
class InitConfig(RunConfig):
    dataset_name: list[str]
    """Corpus that the tokenizer is trained on: what `rlhf sft` takes."""
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
        require_each(self, "a number >= 1", lambda v: v >= 1, sizes)
        require_each(self, "a number >= 8", lambda v: v >= 8, "vocab_size")
        heads, width = self.num_attention_heads, self.hidden_size
        require(width % heads == 0, "num_attention_heads", f"a divisor of hidden_size {width}", heads)


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
        require_each(self, "a number >= 1", lambda v: v >= 1, counts)
        require_each(self, "a number >= 0", lambda v: v >= 0, "temperature")
        if not self.prompt and not self.dataset_name:
            raise ConfigError("prompt: expected --prompt TEXT or --dataset_name FILE, got neither")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(RunConfig):
    output_dir: str = "demo"
    """Directory of the run's data, models, metrics and curve.png."""
    study: bool = False
    """Instead: over-optimisation at four KL penalties, best-of-n and DPO in a picture, variants of PPO in a table."""


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    pass
