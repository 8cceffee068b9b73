"""DPOConfig: a field that the type of loss would ignore is refused, never ignored."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest

from rlhf import config_dpo
from rlhf.config import ConfigError, DPOConfig
from rlhf.config_dpo import ONLY_FOR, LossType
from rlhf_kernels import DPOOptions
from rlhf_kernels.ops import dpo_loss, kto_loss

TRAIN = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
OTHER = {"simpo_gamma": 0.1, "cpo_alpha": 0.2, "discopop_tau": 0.3, "desirable_weight": 1.1, "undesirable_weight": 1.2}


def test_the_types_are_those_of_the_ops():
    assert get_args(LossType) == (*dpo_loss.TYPES, *kto_loss.TYPES) and config_dpo.UNPAIRED == kto_loss.TYPES
    for name in ("REFERENCE_FREE", "SMOOTHED", "OVER_THE_BATCH"):
        assert getattr(config_dpo, name) == getattr(dpo_loss, name), name
    smoothing = {"exo_pair": 0.1}
    options = [DPOOptions(loss_type=kind, label_smoothing=smoothing.get(kind, 0.0)) for kind in dpo_loss.TYPES]
    with_nll = [option.loss_type for option in options if option.nll_coef]
    assert tuple(with_nll) == config_dpo.WITH_NLL
    defaults = {entry.name: entry.default for entry in fields(DPOOptions)}
    ours = {entry.name: entry.default for entry in fields(DPOConfig)}
    assert {name: ours[name] for name in defaults if name in ours} == {n: d for n, d in defaults.items() if n in ours}


@pytest.mark.parametrize("name", ONLY_FOR)
def test_a_field_of_another_type_is_refused(name):
    for kind in get_args(LossType):
        settings = {"loss_type": kind, "label_smoothing": 0.1 if kind == "exo_pair" else 0.0, name: OTHER[name]}
        if kind in ONLY_FOR[name]:
            assert getattr(DPOConfig(**TRAIN, **settings), name) == OTHER[name]
        else:
            words = f"{name}: expected its default with loss_type {kind}, got {OTHER[name]}: it means something for"
            with pytest.raises(ConfigError, match=words):
                DPOConfig(**TRAIN, **settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.0}, "beta: expected a number > 0, got 0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected a number in [0, 1), got 1.0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: expected its default with loss_type hing"),
        ({"loss_type": "kto", "label_smoothing": 0.1}, "label_smoothing: expected its default with loss_type kto"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing: expected a number in [0, 0.5) with loss"),
        ({"loss_type": "exo_pair"}, "label_smoothing: expected a number in (0, 1) with loss_type exo_pair, got 0.0"),
        ({"loss_type": "cpo", "rpo_alpha": 1.0}, "rpo_alpha: expected its default with loss_type cpo, got 1.0: it h"),
        ({"loss_type": "kto", "rpo_alpha": 1.0}, "rpo_alpha: expected its default with loss_type kto, got 1.0: its"),
        ({"rpo_alpha": 0.0}, "rpo_alpha: expected a number > 0, got 0.0"),
        ({"loss_type": "aot", "gradient_accumulation_steps": 2}, "gradient_accumulation_steps: expected its default"),
        ({"loss_type": "aot_unpaired", "micro_batch_tokens": 99}, "micro_batch_tokens: expected its default with lo"),
        ({"loss_type": "kto", "per_device_train_batch_size": 1}, "per_device_train_batch_size: expected a step of a"),
        ({"loss_type": "simpo", "ref_model_name_or_path": "r"}, "ref_model_name_or_path: expected its default with"),
        ({"loss_type": "orpo", "precompute_ref_log_probs": False}, "precompute_ref_log_probs: expected its default"),
        ({"loss_type": "cpo", "ref_logps_cache_dir": "c"}, "ref_logps_cache_dir: expected its default with loss_typ"),
        ({"precompute_ref_log_probs": False, "ref_logps_cache_dir": "c"}, "ref_logps_cache_dir: expected null witho"),
        ({"lora_r": 4}, "lora_r: expected its default without use_peft, got 4"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules: expected its default without use_peft, got ['q_pr"),
        ({"use_peft": True, "optim": "adamw_bf16"}, "optim: expected adamw with use_peft, whose adapters are float32"),
        ({"eval_fraction": 1.0}, "eval_fraction: expected a number in [0, 1), got 1.0"),
        ({"max_length": 1}, "max_length: expected a number >= 2, got 1"),
        ({"undesirable_weight": -1.0, "loss_type": "kto"}, "undesirable_weight: expected a number >= 0, got -1.0"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_the_reason(changes, words):
    with pytest.raises(ConfigError) as error:
        DPOConfig(**TRAIN | changes)
    assert str(error.value).startswith(words)


def test_what_means_something_is_taken():
    for changes in (
        {"loss_type": "aot", "rpo_alpha": 0.5, "label_smoothing": 0.2},
        {"use_peft": True, "lora_r": 4, "lora_target_modules": "q_proj", "precompute_ref_log_probs": False},
        {"loss_type": "kto", "desirable_weight": 1.33},
        {"loss_type": "kto", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    ):
        DPOConfig(**TRAIN | changes)
    assert DPOConfig(**TRAIN).form == "preference" and DPOConfig(**TRAIN, loss_type="kto").form == "unpaired"
