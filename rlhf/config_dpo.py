"""The configuration of preference optimisation. Each type of loss says which fields mean something to it; a field that
would be ignored is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.config_base import ConfigError, LoraFields, MemoryFields, TrainConfig, is_given, require, require_each

LossType = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "simpo", "cpo", "orpo", "kto", "apo_zero_unpaired",
]  # fmt: skip
UNPAIRED = ("kto", "apo_zero_unpaired")  # of single completions with a label
REFERENCE_FREE = ("simpo", "cpo", "orpo")
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "sigmoid_norm", "simpo", "cpo")
OVER_THE_BATCH = ("aot", "aot_unpaired")
WITH_NLL = ("cpo", "orpo")
ONLY_FOR = {  # fields that other types ignore
    "simpo_gamma": ("simpo",), "cpo_alpha": ("cpo",), "discopop_tau": ("discopop",), "desirable_weight": UNPAIRED,
    "undesirable_weight": UNPAIRED,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainConfig, LoraFields, MemoryFields):
    loss_type: LossType = "sigmoid"
    """The loss: DPO (sigmoid) and 16 others of pairs chosen, rejected; kto and apo_zero_unpaired of completions with a
    label."""
    beta: float = 0.1
    """How strongly the policy is held to the reference; orpo: weight of the odds ratio."""
    label_smoothing: float = 0.0
    """Probability that a pair's label is wrong, for sigmoid (cDPO), robust, exo_pair, aot, sigmoid_norm, simpo, cpo."""
    simpo_gamma: float = 0.5
    """Margin of simpo, outside beta."""
    cpo_alpha: float = 1.0
    """Weight of the NLL term of cpo."""
    discopop_tau: float = 0.05
    """Temperature of discopop."""
    rpo_alpha: float | None = None
    """Weight of the mean negative log-probability of the chosen tokens, beside any loss of pairs (RPO)."""
    desirable_weight: float = 1.0
    """Weight of completions labelled true, in kto and apo_zero_unpaired."""
    undesirable_weight: float = 1.0
    """Weight of completions labelled false; weight times rows of true should be 1 to 4/3 times that of false."""
    ref_model_name_or_path: str | None = None
    """Reference; by default the policy as it starts."""
    precompute_ref_log_probs: bool = True
    """Score the data with the reference once, before the first step, and keep no second model in memory."""
    ref_logps_cache_dir: str | None = None
    """Where those scores are kept for runs to share; by default in output_dir."""
    use_peft: bool = False
    """Train LoRA adapters; final/ holds them alone."""
    max_length: int = 1024
    """Tokens in a sequence: a prompt loses its head, a completion its tail."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    eval_fraction: float = 0.1
    """Part of the rows held out to measure loss and accuracy at the end, chosen by the seed."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""

    @property
    def form(self) -> Literal["preference", "unpaired"]:
        """What a row is read as."""
        return "unpaired" if self.loss_type in UNPAIRED else "preference"

    @property
    def has_reference(self) -> bool:
        return self.loss_type not in REFERENCE_FREE

    @property
    def batch_size(self) -> int:
        """Pairs, or completions with a label, of an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def __post_init__(self):
        super().__post_init__()
        require_each(self, "a number > 0", lambda v: v > 0, "beta discopop_tau num_train_epochs rpo_alpha")
        require_each(self, "a number >= 0", lambda v: v >= 0, "cpo_alpha desirable_weight undesirable_weight")
        require_each(self, "a number >= 2", lambda v: v >= 2, "max_length")
        require_each(self, "a number in [0, 1)", lambda v: 0 <= v < 1, "eval_fraction label_smoothing")
        self._check_loss()
        self._check_reference()
        self.check_lora(self.use_peft, "use_peft")

    def _check_loss(self) -> None:
        kind, smoothing = self.loss_type, self.label_smoothing
        for name, types in ONLY_FOR.items():
            if kind not in types and is_given(self, name):
                raise self._ignored(name, f"it means something for {' and '.join(types)} alone")
        if kind not in SMOOTHED and smoothing:
            raise self._ignored("label_smoothing", f"use one of {', '.join(SMOOTHED)}")
        if kind == "robust":
            require(smoothing < 0.5, "label_smoothing", "a number in [0, 0.5) with loss_type robust", smoothing)
        if kind == "exo_pair":
            require(smoothing > 0, "label_smoothing", "a number in (0, 1) with loss_type exo_pair", smoothing)
        if self.rpo_alpha is not None and kind in (*UNPAIRED, *WITH_NLL):
            has_one = "it has an NLL term of its own" if kind in WITH_NLL else "its rows have no chosen completion"
            raise self._ignored("rpo_alpha", has_one)
        if kind in OVER_THE_BATCH:
            for name in ("gradient_accumulation_steps", "micro_batch_tokens"):
                if is_given(self, name):
                    raise self._ignored(name, "it sorts the pairs of a whole step, which take one pass")
        if kind == "kto":
            expected = "a step of at least 2 completions with loss_type kto, whose KL term pairs them anew"
            require(self.batch_size >= 2, "per_device_train_batch_size", expected, self.batch_size)

    def _check_reference(self) -> None:
        for name in ("ref_model_name_or_path", "precompute_ref_log_probs", "ref_logps_cache_dir"):
            if not self.has_reference and is_given(self, name):
                raise self._ignored(name, "it has no reference")
        if self.has_reference and self.precompute_ref_log_probs and self.dataset_streaming:
            way_out = "a stream has no end to score before the first step"
            raise ConfigError(f"precompute_ref_log_probs: expected false with dataset_streaming: {way_out}")
        if not self.precompute_ref_log_probs and self.ref_logps_cache_dir is not None:
            raise ConfigError("ref_logps_cache_dir: expected null without precompute_ref_log_probs")

    def _ignored(self, name: str, why: str) -> ConfigError:
        value, kind = getattr(self, name), self.loss_type
        return ConfigError(f"{name}: expected its default with loss_type {kind}, got {value!r}: {why}")
