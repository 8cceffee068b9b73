"""Configurations refuse nonsense and document themselves."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

from rlhf import config as configs
from rlhf.cli import COMMANDS, field_help
from rlhf.config import ConfigError, GenerateConfig, InitConfig, PPOConfig, RewardConfig, SFTConfig

PPO = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "reward": ["a:b"]}
TRAIN = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("cls", "base", "field", "value"),
    [
        (SFTConfig, TRAIN, "max_length", 1),
        (SFTConfig, TRAIN, "dataset_weights", [1.0, 1.0]),
        (SFTConfig, TRAIN, "dataset_weights", [-0.5]),
        (SFTConfig, TRAIN, "dataset_weights", [float("nan")]),
        (SFTConfig, TRAIN, "learning_rate", -1e-3),
        (SFTConfig, TRAIN, "learning_rate", float("nan")),
        (SFTConfig, TRAIN, "per_device_train_batch_size", 0),
        (SFTConfig, TRAIN, "max_steps", 0),
        (SFTConfig, TRAIN, "output_dir", ""),
        (SFTConfig, TRAIN, "output_dir", __file__),
        (SFTConfig, TRAIN, "seed", 2**63),
        (SFTConfig, TRAIN, "num_train_epochs", float("inf")),
        (SFTConfig, TRAIN, "learning_rate", None),
        (SFTConfig, TRAIN, "max_steps", None),
        (SFTConfig, TRAIN, "gradient_accumulation_steps", None),
        (SFTConfig, TRAIN, "device", None),
        (RewardConfig, TRAIN, "eval_fraction", 1.0),
        (PPOConfig, PPO, "temperature", 0.0),
        (PPOConfig, PPO, "temperature", float("inf")),
        (PPOConfig, PPO, "kl_coef", float("inf")),
        (PPOConfig, PPO, "score_clip", float("inf")),
        (PPOConfig, PPO, "cliprange_value", 0.0),
        (PPOConfig, PPO | {"kl_target": 6.0, "num_mini_batches": 10}, "kl_horizon", 16),
        (PPOConfig, PPO, "gamma", 1.5),
        (PPOConfig, PPO, "dual_clip", 1.0),
        (PPOConfig, PPO, "reward", ["no_colon"]),
        (PPOConfig, PPO, "num_ppo_epochs", 0),
        (InitConfig, {"dataset_name": "d", "output_dir": "o"}, "num_attention_heads", 3),
        (GenerateConfig, {"model_name_or_path": "m", "prompt": ["x"]}, "temperature", -1.0),
    ],
)
def test_nonsense_is_refused_with_field_and_value(cls, base, field, value):
    with pytest.raises(ConfigError) as error:
        cls(**base | {field: value})
    shown = value[0] if isinstance(value, list) else value
    assert str(error.value).startswith(f"{field}: expected ") and repr(shown) in str(error.value)


@pytest.mark.parametrize(
    ("cls", "base", "way"), [(SFTConfig, TRAIN, "use_peft"), (PPOConfig, PPO, "memory_layout lora")]
)
def test_fields_of_adapters_are_refused_where_there_are_none(cls, base, way):
    for name, value in (("lora_r", 4), ("lora_alpha", 8), ("lora_target_modules", ["q_proj"])):
        with pytest.raises(ConfigError, match=f"^{name}: expected its default without {way}, got "):
            cls(**base | {name: value})


def test_a_stream_keeps_no_rows():
    with pytest.raises(ConfigError, match=r"^dataset_cache_dir: expected null with dataset_streaming"):
        SFTConfig(**TRAIN, dataset_streaming=True, max_steps=1, dataset_cache_dir="c")


def test_a_dataset_stands_once():
    with pytest.raises(ConfigError, match=r"^dataset_name: expected each dataset once, with dataset_weights of 2 "):
        SFTConfig(**TRAIN | {"dataset_name": ["d", "e", "d"]})


def test_ppo_needs_a_reward():
    with pytest.raises(ConfigError, match="reward_model_path: expected a reward model, or --reward"):
        PPOConfig(**PPO | {"reward": []})


def test_null_switches_off_what_is_optional():
    options = ("missing_eos_penalty", "cliprange_value", "cliprange_high", "dual_clip", "kl_target", "score_clip")
    config = PPOConfig(**PPO, **dict.fromkeys(options), kl_horizon=1)
    assert config.cliprange_value is None


def test_batch_size_is_the_product():
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_mini_batches": 2}
    assert PPOConfig(**PPO, **sizes).batch_size == 24


def test_configurations_are_frozen():
    with pytest.raises(FrozenInstanceError):
        PPOConfig(**PPO).kl_coef = 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_has_a_help_sentence(command):
    cls = getattr(configs, COMMANDS[command][1])
    texts = field_help(cls)
    assert all(texts[field.name].endswith(".") for field in fields(cls))


def test_a_subclass_sentence_replaces_its_base():
    assert field_help(PPOConfig)["lr_scheduler_type"] == field_help(SFTConfig)["lr_scheduler_type"]
    assert PPOConfig(**PPO).lr_scheduler_type == "linear" and SFTConfig(**TRAIN).lr_scheduler_type == "cosine"


def test_configurations_import_no_torch():
    code = "import sys, rlhf.config, rlhf.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
