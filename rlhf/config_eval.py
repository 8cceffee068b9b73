"""The configuration of `rlhf eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.config_base import ConfigError, RewardFields, RunConfig, SupervisedFields, require, require_each

Metric = Literal["loss", "reward", "preference", "win_rate", "best_of_n"]
NEEDS: dict[Metric, tuple[str, ...]] = {  # the fields of each, in the order of the report
    "loss": ("model_name_or_path",),
    "reward": ("reward_model_path",),
    "preference": ("model_name_or_path",),
    "win_rate": ("model_name_or_path", "ref_model_name_or_path", "a reward"),
    "best_of_n": ("model_name_or_path", "a reward", "num_return_sequences > 1"),
}


@dataclass(frozen=True, kw_only=True)
class EvalConfig(RunConfig, SupervisedFields, RewardFields):
    dataset_name: list[str]
    """Files, directories or hub ids, joined: rows with completions (or messages, or text), pairs, or prompts."""
    dataset_split: str = "train"
    """Split of a hub dataset."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that cannot be used does: end the run, or be left out and counted."""
    model_name_or_path: str | None = None
    """Language model to measure: a directory or a hub id."""
    ref_model_name_or_path: str | None = None
    """Language model that it is held against: the reference in preference, the rival in win_rate."""
    metrics: list[Metric] = field(default_factory=list)
    """What to measure; by default all that models and columns allow. loss: nats a token, perplexity. reward: how often
    a reward model prefers `chosen`. preference: how often the language model does, as DPO sees it. win_rate: over
    ref_model_name_or_path, by reward. best_of_n: the reward of the best of n samples."""
    max_length: int = 1024
    """Tokens in a sequence of the dataset: a prompt loses its head, a completion its tail."""
    beta: float = 0.1
    """Reward per nat of DPO's implicit rewards."""
    num_prompts: int = 128
    """Prompts that are continued, from the start of the dataset."""
    num_return_sequences: int = 1
    """Samples a prompt."""
    max_prompt_length: int = 512
    """Tokens kept of a prompt that is continued, from its end."""
    max_new_tokens: int = 64
    """Most tokens in a sample."""
    temperature: float = 1.0
    """Sampling temperature, which divides the logits in the KL too."""
    per_device_eval_batch_size: int = 8
    """Sequences (or pairs) in one forward pass, and prompts that are continued at a time."""
    micro_batch_tokens: int | None = None
    """Most tokens in one forward pass, in place of per_device_eval_batch_size sequences."""
    padding_free: bool = True
    """Pack sequences without padding where the model allows it."""
    output_dir: str = "eval"
    """Directory of eval.json, and of best_of_n.png where matplotlib is installed."""

    @property
    def budget(self) -> tuple[int, int | None]:
        """(sequences, or tokens where there is a number) in one forward pass."""
        return self.per_device_eval_batch_size, self.micro_batch_tokens

    def lacks(self, metric: Metric) -> str | None:
        """The first thing that a metric needs and that is not given."""
        given = {
            "a reward": self.has_reward,
            "num_return_sequences > 1": self.num_return_sequences > 1,
        }
        return next((name for name in NEEDS[metric] if not given.get(name, getattr(self, name, None))), None)

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.dataset_name), "dataset_name", "a file or hub id", self.dataset_name)
        require_each(self, "a number >= 2", lambda v: v >= 2, "max_length")
        counts = """num_prompts num_return_sequences max_prompt_length max_new_tokens per_device_eval_batch_size
            micro_batch_tokens"""
        require_each(self, "a number >= 1", lambda v: v >= 1, counts)
        require_each(self, "a number > 0", lambda v: v > 0, "temperature beta")
        self.check_rewards()
        for metric in self.metrics:
            require(metric in NEEDS, "metrics", f"any of {', '.join(NEEDS)}", metric)
            if lacking := self.lacks(metric):
                raise ConfigError(f"metrics: {metric} needs {lacking}, which is not given")
