"""What fields of `rlhf ppo` must agree on: each contradiction is one line with field, expectation and what came."""

from __future__ import annotations

import pytest

from rlhf.config import ConfigError, PPOConfig

PPO = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "reward": ["a:b"]}
GRPO = {"advantage": "grpo", "num_generations": 2}


def message(**changes) -> str:
    with pytest.raises(ConfigError) as error:
        PPOConfig(**PPO | changes)
    assert "\n" not in str(error.value)
    return str(error.value)


AT_LEAST_ONE = """total_episodes num_mini_batches num_ppo_epochs max_prompt_length response_length kl_horizon lora_r
    lora_alpha micro_batch_tokens num_generations ptx_batch_size eval_prompts"""
POSITIVE = """temperature score_clip kl_target target_kl cliprange_value value_learning_rate warn_kl warn_gold_drop
    warn_distinct warn_length warn_length_correlation warn_entropy warn_eos_rate"""
NOT_NEGATIVE = """missing_eos_penalty kl_coef vf_coef entropy_coef sample_steps cliprange_high ptx_coef length_penalty
    length_penalty_after value_warmup_steps eval_steps"""


@pytest.mark.parametrize(
    ("names", "bad", "expected"),
    [
        (AT_LEAST_ONE, 0, "a number >= 1"),
        ("ptx_max_length", 1, "a number >= 2"),
        (POSITIVE, 0.0, "a number > 0"),
        (NOT_NEGATIVE, -1, "a number >= 0"),
        ("gamma lam", 1.01, "a number in [0, 1]"),
        ("gamma lam", -0.01, "a number in [0, 1]"),
        ("cliprange", 1.0, "a number in [0, 1)"),
        ("dual_clip", 1.0, "a number > 1"),
    ],
)
def test_bounds_of_single_fields(names, bad, expected):
    for name in names.split():
        assert message(**{name: bad}) == f"{name}: expected {expected}, got {bad!r}"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reward": []}, "reward_model_path: expected a reward model, or --reward module:function, got neither"),
        ({"reward": ["a:"]}, "reward: expected module:function, got 'a:'"),
        ({"gold_reward": "a"}, "gold_reward: expected module:function, got 'a'"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights: expected 1 numbers, one a reward, got [1.0, 2.0]"),
        ({"step_separator": ""}, "step_separator: expected a text, got ''"),
        ({"memory_layout": []}, "memory_layout: expected one of separate, shared_value and lora, and any of "
                                "frozen_bf16 and offload, got []"),
        ({"kl_estimator": "k3+"}, "kl_estimator: expected one without + where the penalty is in the reward, got 'k3+': "
                                  "use --kl_in loss"),
        ({"advantage": "rloo"}, "num_generations: expected at least 2 for rloo, got 1"),
        (GRPO | {"value_warmup_steps": 1}, "value_warmup_steps: expected 0 without a value, got 1"),
        (GRPO | {"memory_layout": ["shared_value"]},
         "memory_layout: expected no shared_value without gae, got ['shared_value']"),
        (GRPO | {"num_generations": 3}, "num_generations: expected a divisor of the batch of 8, got 3"),
        ({"ptx_coef": 0.5}, "ptx_dataset_name: expected together with ptx_coef > 0, got one of them"),
        ({"ptx_dataset_name": "x"}, "ptx_dataset_name: expected together with ptx_coef > 0, got one of them"),
        ({"eval_steps": 2}, "eval_dataset_name: expected together with eval_steps > 0, got one of them"),
        ({"eval_dataset_name": "x"}, "eval_dataset_name: expected together with eval_steps > 0, got one of them"),
        ({"kl_target": 6.0, "kl_horizon": 1}, "kl_horizon: expected a number > 1.6 (batch / 5), got 1"),
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other(changes, expected):
    assert message(**changes) == expected


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"memory_layout": ["shared_value"], "value_model_path": "v"}, "value_model_path", "with memory_layout shared"),
        ({"memory_layout": ["lora"], "optim": "adamw_bf16"}, "optim", "expected adamw with memory_layout lora"),
        ({"kl_in": "loss", "kl_estimator": "full", "memory_layout": ["offload"]}, "kl_estimator", "drop offload"),
        ({"metric_for_best_model": "eval/score"}, "metric_for_best_model", "give eval_dataset_name and eval_steps"),
    ],
)
def test_options_that_exclude_each_other(changes, field, words):
    found = message(**changes)
    assert found.startswith(f"{field}: ") and words in found


@pytest.mark.parametrize(
    "layout", [["separate", "lora"], ["shared_value", "separate"], ["offload", "offload"], ["lora", "zero3"], ["zero3"]]
)
def test_layouts_that_are_none(layout):
    assert message(memory_layout=layout).endswith(f"got {layout!r}")


def test_what_just_fits_is_taken():
    """Each bound from its good side, and the neighbours of every contradiction."""
    ones, zeros = dict.fromkeys(AT_LEAST_ONE.split(), 1), dict.fromkeys(NOT_NEGATIVE.split(), 0)
    small = dict.fromkeys(POSITIVE.split(), 1e-9) | {"kl_horizon": 2, "gamma": 0, "lam": 1}
    PPOConfig(**PPO | ones | zeros | small | {"memory_layout": ["lora"]})
    for changes in (
        {"cliprange": None, "dual_clip": 1.001, "kl_in": "loss", "kl_estimator": "k3+"},
        GRPO | {"num_generations": 8, "memory_layout": ["lora", "frozen_bf16", "offload"]},
        {
            "ptx_coef": 0.5,
            "ptx_dataset_name": "x",
            "eval_steps": 1,
            "eval_dataset_name": "x",
            "metric_for_best_model": "m",
        },
        {"reward_model_path": ["x", "y"], "process_reward_model_path": "z", "reward_weights": [1.0, 2.0, 3.0, 0.0]},
        {"kl_in": "loss", "kl_estimator": "full", "memory_layout": ["shared_value", "frozen_bf16"]},
        {"kl_estimator": "full", "memory_layout": ["offload"], "optim": "adamw_bf16"},
    ):
        PPOConfig(**PPO | changes)


def test_one_text_is_a_list_of_one():
    config = PPOConfig(**PPO | {"reward": "a:b", "memory_layout": "lora", "reward_model_path": "x"})
    assert (config.reward, config.memory_layout, config.reward_model_path) == (["a:b"], ["lora"], ["x"])
