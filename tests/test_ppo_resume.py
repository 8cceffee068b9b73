"""A stopped PPO run continues to the same bytes in every memory layout, and with every state that a step carries on."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf import ppo
from rlhf.config import PPOConfig, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
MEASURED = ("timing/", "memory/", "tokens_per_second")
CASES = {
    "separate": {"memory_layout": ["separate"]},
    "shared_value": {"memory_layout": ["shared_value"]},
    "lora": {"memory_layout": ["lora"]},
    "lora without a reward model": {"memory_layout": ["lora"], "reward_model_path": []},
    "frozen_bf16, offload": {"memory_layout": ["separate", "frozen_bf16", "offload"]},
    "lora, frozen_bf16": {"memory_layout": ["lora", "frozen_bf16"]},
    "adaptive KL": {"kl_target": 0.5, "kl_horizon": 50},
    "running normalisation": {"reward_normalization": "running"},
    "grpo": {"advantage": "grpo", "num_generations": 4, "kl_in": "loss", "kl_estimator": "k3"},
    "checkpointing, token budget": {"gradient_checkpointing": True, "micro_batch_tokens": 40},
    "value warm-up, early stop": {"value_warmup_steps": 2, "target_kl": 1e-3},
    "padded": {"padding_free": False},
    "adamw_bf16": {"optim": "adamw_bf16"},
    "adamw_bf16, one trunk": {"optim": "adamw_bf16", "memory_layout": ["shared_value"]},
}


@pytest.fixture
def config(tiny_model, tiny_reward_model, corpus, tmp_path) -> PPOConfig:
    return PPOConfig(
        model_name_or_path=tiny_model,
        dataset_name=corpus,
        output_dir=str(tmp_path / "run"),
        reward=["rewards_for_tests:noisy"],
        reward_model_path=tiny_reward_model,
        gold_reward="rewards_for_tests:count_good",
        device="cpu",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        num_ppo_epochs=2,
        response_length=6,
        max_prompt_length=8,
        learning_rate=3e-3,
        weight_decay=0.01,
        max_steps=4,
        sample_steps=0,
        report_to="none",
    )


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Weights of final/, best/ and the last checkpoint (the value model and the optimizer stand in that one alone), and
    every metric that is not a measurement of time or memory."""
    files = sorted(p for p in folder.rglob("*.safetensors") if p.parts[-2] in ("final", "best", "checkpoint-000004"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}, kept


def stop_at_2(step: int, *_) -> None:
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def assert_continues(config: PPOConfig, tmp_path: Path) -> dict[str, bytes]:
    config = replace(config, save_steps=4)
    ppo.train(replace(config, output_dir=str(tmp_path / "whole")))
    with pytest.raises(SystemExit):
        ppo.train(config, on_step=stop_at_2)
    ppo.train(replace(config, resume="auto"))
    (files, rows), (expected, expected_rows) = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert files.keys() == expected.keys() and [name for name in files if files[name] != expected[name]] == []
    assert rows == expected_rows and len(rows) == 4
    return files


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_continues_to_the_same_bytes(config, tmp_path, case):
    files = assert_continues(replace(config, **CASES[case]), tmp_path)
    assert {"checkpoint-000004/policy.safetensors", "checkpoint-000004/optimizer.safetensors"} <= files.keys()
    has_value = case != "grpo"
    assert ("checkpoint-000004/value.safetensors" in files) == has_value
    if case.startswith("lora"):  # adapters alone
        assert "final/adapter_model.safetensors" in files and "final/model.safetensors" not in files


def test_evaluations_and_supervised_rows_continue_too(config, corpus, tmp_path):
    extras = {"eval_steps": 1, "eval_dataset_name": corpus, "eval_prompts": 8, "metric_for_best_model": "eval/score"}
    extras |= {"ptx_coef": 0.5, "ptx_dataset_name": corpus, "ptx_max_length": 16}
    assert "best/model.safetensors" in assert_continues(replace(config, **extras), tmp_path)


@pytest.mark.parametrize("changed", ["ptx_dataset", "eval_dataset"])
def test_a_run_does_not_continue_with_other_supervised_rows_or_held_out_prompts(config, corpus, tmp_path, changed):
    rows = Path(corpus).read_text().splitlines(keepends=True)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("ptx_dataset", "eval_dataset")}
    for file in files.values():
        file.write_text("".join(rows))
    extras = {"eval_steps": 4, "eval_dataset_name": str(files["eval_dataset"]), "eval_prompts": 4, "ptx_max_length": 16}
    config = replace(config, ptx_coef=0.5, ptx_dataset_name=str(files["ptx_dataset"]), **extras)
    with pytest.raises(SystemExit):
        ppo.train(config, on_step=stop_at_2)
    files[changed].write_text("".join(reversed(rows)))
    with pytest.raises(UsageError, match=rf"{changed} was .* and is now"):
        ppo.train(replace(config, resume="auto"))
