"""The configuration of `rlhf ppo`: PPO, A2C, GRPO and RLOO are settings of one loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from rlhf.config_base import ConfigError, LoraFields, MemoryFields, RewardFields, TrainConfig, require, require_each

Layout = Literal["separate", "shared_value", "lora", "frozen_bf16", "offload"]
KLEstimator = Literal["k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+", "full"]


@dataclass(frozen=True, kw_only=True)
class PPOConfig(TrainConfig, RewardFields, LoraFields, MemoryFields):
    reward_normalization: Literal["none", "batch", "running"] = "none"
    """Each reward to mean 0 and deviation 1 before it is weighted: over the batch, or over all episodes so far."""
    gold_reward: str | None = None
    """Held-out reward as module:function: measured and logged, never trained on."""
    missing_eos_penalty: float | None = 1.0
    """Taken off the score of a response that did not end; null leaves scores as they are."""
    missing_eos: Literal["subtract", "replace"] = "subtract"
    """replace: minus missing_eos_penalty is the whole score of a response that did not end (arXiv 2403.17031)."""
    length_penalty: float = 0.0
    """Taken off the score for each response token beyond length_penalty_after."""
    length_penalty_after: int = 0
    """Response tokens that cost nothing."""
    score_clip: float | None = None
    """Bound on the absolute score of a response, and of each token that is rewarded, before penalties are taken off."""

    memory_layout: list[Layout] = field(default_factory=lambda: ["separate"])
    """separate, shared_value (value head on the policy's trunk) or lora (adapters; policy and reference share weights,
    so do value and reward model), and beside it frozen_bf16 (reference and rewards in bfloat16), offload (they leave
    the device between phases)."""
    dry_run: bool = False
    """Print the memory that the run will take, by part, and load nothing."""

    value_model_path: str | None = None
    """Start of the value model; by default the first reward model if its tokenizer agrees, else the policy, head 0."""
    value_warmup_steps: int = 0
    """First steps that train the value model alone."""
    total_episodes: int = 10_000
    """Responses to sample in the whole run."""
    num_mini_batches: int = 1
    """Optimizer steps in one pass over a batch; a batch is size * accumulation * this many episodes."""
    num_ppo_epochs: int = 4
    """Passes over each batch of episodes; 1, and cliprange null, is A2C."""
    max_prompt_length: int = 512
    """Tokens kept of a prompt, from its end."""
    response_length: int = 53
    """Most tokens in a response."""
    temperature: float = 0.7
    """Sampling temperature, which divides the logits in every log-probability too."""

    kl_coef: float = 0.05
    """Weight of the per-token KL penalty to the reference; the first value of the adaptive controller."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty stands: in the reward of each token, or as a term of the loss, differentiated."""
    kl_target: float | None = None
    """KL in nats per response that an adaptive controller steers to; null keeps kl_coef fixed."""
    kl_horizon: int = 10_000
    """Episodes over which the adaptive controller acts; more than a fifth of a batch."""
    kl_estimator: KLEstimator = "k1"
    """Per-token KL: an estimate from the sampled token (k1, abs, k2, k3; with + it has the gradient of k2 in the loss),
    or full, exact over the vocabulary."""
    target_kl: float | None = None
    """End the updates on a batch once a minibatch is this far from the sampling policy, in nats a token."""
    advantage: Literal["gae", "grpo", "grpo_no_std", "rloo"] = "gae"
    """gae is PPO's, with a value model; grpo and rloo compare num_generations samples of a prompt and need none."""
    num_generations: int = 1
    """Responses to each prompt."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_rewards: bool = False
    """Scale rewards to deviation 1, mean kept."""
    whiten_advantages: bool | None = None
    """Scale advantages to mean 0 and deviation 1 over the batch; by default with gae alone."""

    cliprange: float | None = 0.2
    """Policy ratio clip below 1, and above unless cliprange_high is given; null leaves the ratio free."""
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
    loss_reduction: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"] = "token_mean"
    """Mean over the tokens of an optimizer step, or over sequences of their token means or sums."""
    ptx_coef: float = 0.0
    """Weight of the supervised loss on ptx_dataset_name in every update (PPO-ptx, arXiv 2203.02155)."""
    ptx_dataset_name: str | None = None
    """Rows for the supervised loss, as `rlhf sft` takes them."""
    ptx_batch_size: int | None = None
    """Supervised sequences in an optimizer step; by default as many as episodes."""
    ptx_max_length: int = 512
    """Tokens in a supervised sequence."""
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
    eval_steps: int = 0
    """Steps between evaluations on held-out prompts; 0 for none."""
    eval_dataset_name: str | None = None
    """Held-out prompts."""
    eval_prompts: int = 128
    """Prompts in an evaluation, from the start of eval_dataset_name."""
    metric_for_best_model: str | None = None
    """Metric of the evaluations whose highest value keeps the policy in best/, such as eval/score."""
    warn_kl: float | None = 20.0
    """Warn when the KL of a response exceeds this many nats."""
    warn_gold_drop: float | None = 0.5
    """Warn when gold_reward has fallen by this many of its first deviations below its best while the score rises."""
    warn_distinct: float | None = 0.5
    """Warn when the share of different word pairs falls below this part of its first value."""
    warn_length: float | None = 2.0
    """Warn when responses are this many times as long as at first."""
    warn_length_correlation: float | None = 0.8
    """Warn when the correlation of score and length exceeds this."""
    warn_entropy: float | None = 0.2
    """Warn when the entropy falls below this part of its first value."""
    warn_eos_rate: float | None = 0.5
    """Warn when less than this part of the responses ends."""

    @property
    def batch_size(self) -> int:
        """Episodes sampled at each step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def whitens_advantages(self) -> bool:
        return self.advantage == "gae" if self.whiten_advantages is None else self.whiten_advantages

    def has(self, layout: Layout) -> bool:
        return layout in self.memory_layout

    def __post_init__(self):
        super().__post_init__()
        at_least_one = """total_episodes num_mini_batches num_ppo_epochs max_prompt_length response_length kl_horizon
            num_generations ptx_batch_size eval_prompts"""
        require_each(self, "a number >= 1", lambda v: v >= 1, at_least_one)
        require_each(self, "a number >= 2", lambda v: v >= 2, "ptx_max_length")
        positive = """temperature score_clip kl_target target_kl cliprange_value value_learning_rate warn_kl
            warn_gold_drop warn_distinct warn_length warn_length_correlation warn_entropy warn_eos_rate"""
        require_each(self, "a number > 0", lambda v: v > 0, positive)
        non_negative = """missing_eos_penalty kl_coef vf_coef entropy_coef sample_steps cliprange_high ptx_coef
            length_penalty length_penalty_after value_warmup_steps eval_steps"""
        require_each(self, "a number >= 0", lambda v: v >= 0, non_negative)
        require_each(self, "a number in [0, 1]", lambda v: 0 <= v <= 1, "gamma lam")
        require_each(self, "a number in [0, 1)", lambda v: 0 <= v < 1, "cliprange")
        require_each(self, "a number > 1", lambda v: v > 1, "dual_clip")
        if not self.has_reward:
            raise ConfigError("reward_model_path: expected a reward model, or --reward module:function, got neither")
        self.check_rewards()
        of_gold = self.gold_reward or "none:none"
        require(all(of_gold.partition(":")), "gold_reward", "module:function", self.gold_reward)
        self._check_memory()
        self._check_algorithm()

    def _check_memory(self) -> None:
        layout, known = self.memory_layout, get_args(Layout)
        ok = bool(layout) and set(layout) <= set(known) and len(set(layout)) == len(layout)
        ok &= len({"separate", "shared_value", "lora"} & set(layout)) <= 1
        expected = "one of separate, shared_value and lora, and any of frozen_bf16 and offload"
        require(ok, "memory_layout", expected, layout)
        if self.has("shared_value") and self.value_model_path:
            raise ConfigError(
                "value_model_path: expected null with memory_layout shared_value, which has no value model"
            )
        self.check_lora(self.has("lora"), "memory_layout lora")

    def _check_algorithm(self) -> None:
        if self.kl_target is not None:  # one update changes the coefficient by up to a fifth of batch_size / kl_horizon
            least = self.batch_size / 5
            require(self.kl_horizon > least, "kl_horizon", f"a number > {least:g} (batch / 5)", self.kl_horizon)
        if self.kl_in == "reward" and self.kl_estimator.endswith("+"):
            raise ConfigError(
                f"kl_estimator: expected one without + where the penalty is in the reward, got {self.kl_estimator!r}: "
                "use --kl_in loss"
            )
        if self.kl_in == "loss" and self.kl_estimator == "full" and self.has("offload"):
            raise ConfigError("kl_estimator: full in the loss reads the reference in every update: drop offload")
        if self.advantage != "gae":
            require(
                self.num_generations > 1, "num_generations", f"at least 2 for {self.advantage}", self.num_generations
            )
            require(self.value_warmup_steps == 0, "value_warmup_steps", "0 without a value", self.value_warmup_steps)
            require(not self.has("shared_value"), "memory_layout", "no shared_value without gae", self.memory_layout)
        divides = self.batch_size % self.num_generations == 0
        require(divides, "num_generations", f"a divisor of the batch of {self.batch_size}", self.num_generations)
        if (self.ptx_coef > 0) != (self.ptx_dataset_name is not None):
            raise ConfigError("ptx_dataset_name: expected together with ptx_coef > 0, got one of them")
        if (self.eval_steps > 0) != (self.eval_dataset_name is not None):
            raise ConfigError("eval_dataset_name: expected together with eval_steps > 0, got one of them")
        if self.metric_for_best_model is not None and not self.eval_steps:
            raise ConfigError(
                "metric_for_best_model: expected evaluations to take it from: give eval_dataset_name and eval_steps"
            )
