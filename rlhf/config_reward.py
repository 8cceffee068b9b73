"""The configuration of `rlhf reward`: one score or several, of whole responses or of their steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.config_base import ConfigError, LoraFields, TrainConfig, require, require_each


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig, LoraFields):
    reward_type: Literal["outcome", "process"] = "outcome"
    """outcome: responses are ranked (columns chosen and rejected, or ranking); process: steps of a response are right
    or wrong (columns completions and labels)."""
    max_length: int = 1024
    """Tokens in a sequence: a prompt loses its head, a completion its tail, a response its last steps."""
    num_train_epochs: float = 1.0
    """Passes over the rows."""
    center_rewards_coefficient: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them near zero; 0.01 is usual."""
    label_smoothing: float = 0.0
    """Probability that a judgement is wrong: this part of the loss is that of the opposite one."""
    objectives: list[str] = field(default_factory=list)
    """Names of several objectives, a head each; a row's column `objective` names one, or gives each a number: above 0
    where the first completion is the better one, below 0 where it is the worse."""
    objective_weights: list[float] = field(default_factory=list)
    """Weights of the objectives' normalised scores in the one reward that the model gives; by default 1 each."""
    step_separator: str = "\n"
    """Text between the steps of a response, as `rlhf ppo` has it."""
    normalize_rewards: bool = True
    """Keep mean and deviation of scores on the training data in config.json: scoring makes them 0 and 1."""
    eval_fraction: float = 0.1
    """Part of the rows held out for the report, chosen by the seed."""
    eval_steps: int = 0
    """Steps between evaluations on the held-out rows; 0 for one at the end."""
    use_peft: bool = False
    """Train LoRA adapters and the head over frozen weights; final/ holds the adapters alone."""

    def __post_init__(self):
        super().__post_init__()
        self.check_lora(self.use_peft, "use_peft")
        require_each(self, "a number >= 2", lambda v: v >= 2, "max_length")
        require_each(self, "a number > 0", lambda v: v > 0, "num_train_epochs")
        require_each(self, "a number >= 0", lambda v: v >= 0, "center_rewards_coefficient eval_steps")
        require_each(self, "a number in [0, 1)", lambda v: 0 <= v < 1, "eval_fraction")
        require_each(self, "a number in [0, 0.5)", lambda v: 0 <= v < 0.5, "label_smoothing")
        require(bool(self.step_separator), "step_separator", "a text", self.step_separator)
        distinct = len(set(self.objectives)) == len(self.objectives) and all(self.objectives)
        require(distinct, "objectives", "names that differ", self.objectives)
        fits = len(self.objective_weights) in (0, len(self.objectives))
        require(fits, "objective_weights", f"{len(self.objectives)} numbers, one an objective", self.objective_weights)
        if self.reward_type == "process":
            for name in ("objectives", "center_rewards_coefficient"):
                if getattr(self, name):
                    raise ConfigError(f"{name}: belongs to reward_type outcome, whose responses are compared")
        if self.eval_steps and not self.eval_fraction:
            raise ConfigError("eval_steps: expected held-out rows to evaluate on: give eval_fraction")
