"""Checkpoints are whole or ignored, and a continued run ends with the same bytes as one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from rlhf import ppo, reward_model, sft
from rlhf.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, problem_with, save_checkpoint
from rlhf.config import PPOConfig, RewardConfig, SFTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINERS = {"sft": sft, "reward": reward_model, "ppo": ppo}


@pytest.fixture
def configs(tiny_model, tiny_reward_model, corpus, pairs, tmp_path) -> dict:
    """Six steps each, with every kind of state: several epochs, warm-up, adaptive KL, accumulation."""
    common = {"model_name_or_path": tiny_model, "device": "cpu", "max_steps": 6, "save_steps": 2, "warmup_steps": 2}
    common |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "run")}
    rates = {"learning_rate": 3e-3, "weight_decay": 0.01}
    rollouts = {"response_length": 6, "max_prompt_length": 8, "num_mini_batches": 2, "num_ppo_epochs": 2}
    rewards = {"reward_model_path": tiny_reward_model, "reward": ["rewards_for_tests:noisy"], "kl_target": 1.0}
    return {
        "sft": SFTConfig(**common, **rates, dataset_name=corpus, max_length=16),
        "reward": RewardConfig(**common, **rates, dataset_name=pairs, max_length=16),
        "ppo": PPOConfig(**common, **rates, **rollouts, **rewards, dataset_name=corpus, sample_steps=2),
    }


def outcome(folder: Path) -> tuple[bytes, list[dict]]:
    """The final weights, and every metric that is not a measurement of time or memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("timing/", "memory/", "tokens_per_second")
    rows = [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows]
    return (folder / "final" / "model.safetensors").read_bytes(), rows


def interrupt_at(step: int, action):
    return lambda at, model, metrics: action() if at == step else None


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_stopped_run_continues_to_the_same_bytes(configs, tmp_path, kind):
    train, config = TRAINERS[kind].train, configs[kind]
    train(replace(config, output_dir=str(tmp_path / "whole"), save_steps=0))
    terminate = interrupt_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train(replace(config, save_steps=0), on_step=terminate)
    assert stop.value.code == 143
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-000003"]
    result = train(replace(config, resume="auto"))
    assert result.steps == 6 and outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert [row["step"] for row in outcome(tmp_path / "run")[1]] == [1, 2, 3, 4, 5, 6]


def test_killed_runs_continue_to_the_same_bytes(configs, tmp_path):
    """SIGKILL in the middle of the fifth step's reporting: metrics of step 5 are there, the checkpoint is of step 4."""
    code = """
        import os, pickle, signal, sys
        import torch
        from rlhf import ppo, reward_model, sft
        torch.set_num_threads(1)
        configs = pickle.load(sys.stdin.buffer)
        for kind, config in configs.items():
            if os.fork() == 0:
                kill = lambda step, *_: os.kill(os.getpid(), signal.SIGKILL) if step == 5 else None
                {"sft": sft, "reward": reward_model, "ppo": ppo}[kind].train(config, on_step=kill)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL, kind
    """
    import pickle

    killed = {kind: replace(config, output_dir=str(tmp_path / kind)) for kind, config in configs.items()}
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], input=pickle.dumps(killed), env=environment, capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    for kind, config in killed.items():
        folder = tmp_path / kind
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 5 and not (folder / "final").exists()
        TRAINERS[kind].train(replace(config, resume="auto"))
        TRAINERS[kind].train(replace(config, output_dir=str(tmp_path / f"{kind}-whole")))
        assert outcome(folder) == outcome(tmp_path / f"{kind}-whole"), kind


def test_the_newest_checkpoint_that_is_whole_is_taken(configs, tmp_path, capsys):
    config = configs["sft"]
    sft.train(config)
    expected = outcome(tmp_path / "run")
    newest, older = list_checkpoints(tmp_path / "run")
    assert (newest.name, older.name) == ("checkpoint-000006", "checkpoint-000004")  # save_total_limit
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    sft.train(replace(config, resume="auto"))
    told = capsys.readouterr().err
    assert "checkpoint-000006: model.safetensors is missing or damaged; trying an older one" in told
    assert "continuing from" in told and "checkpoint-000004" in told
    assert outcome(tmp_path / "run") == expected
    weights.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        sft.train(replace(config, resume=str(newest)))


def test_a_run_does_not_overwrite_or_continue_another(configs):
    config = configs["sft"]
    sft.train(replace(config, max_steps=2))
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run: use --resume auto"):
        sft.train(config)
    with pytest.raises(CheckpointError, match="max_steps was 2 and is now 6"):
        sft.train(replace(config, resume="auto"))
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.003 and is now 0\.1"):
        sft.train(replace(config, max_steps=2, learning_rate=0.1, resume="auto"))


def test_other_data_are_noticed(configs, tmp_path, corpus):
    copy = shutil.copy(corpus, tmp_path / "copy.jsonl")
    config = replace(configs["sft"], dataset_name=str(copy), max_steps=2)
    sft.train(config)
    with open(copy, "a") as file:
        file.write('{"prompt": "the", "completion": "film"}\n')
    with pytest.raises(CheckpointError, match="dataset was"):
        sft.train(replace(config, resume="auto"))


def test_resume_auto_without_a_checkpoint_starts_from_scratch(configs, tmp_path):
    assert sft.train(replace(configs["sft"], resume="auto", max_steps=1)).steps == 1


@pytest.fixture
def module_and_optimizer():
    torch.manual_seed(1)
    module = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_generators_and_optimizer_come_back(module_and_optimizer, tmp_path):
    module, optimizer = module_and_optimizer
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    path = save_checkpoint(tmp_path, 7, {"model": module}, optimizer, {"kl_coef": 0.1}, {"a": 1}, keep=1)
    drawn = random.random(), float(numpy.random.rand()), float(torch.rand(()))
    fresh = nn.Linear(3, 3)
    other = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    assert load_checkpoint(path, {"model": fresh}, other, {"a": 1}) == (7, {"kl_coef": 0.1})
    assert (random.random(), float(numpy.random.rand()), float(torch.rand(()))) == drawn
    assert torch.equal(fresh.weight, module.weight)
    for mine, theirs in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values()):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(module_and_optimizer, tmp_path):
    module, optimizer = module_and_optimizer
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="the weights of model are not finite: no checkpoint is written"):
        save_checkpoint(tmp_path, 1, {"model": module}, optimizer, {}, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_no_checkpoint(module_and_optimizer, tmp_path, monkeypatch):
    module, optimizer = module_and_optimizer

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("rlhf.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, 1, {"model": module}, optimizer, {}, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    assert "no readable manifest" in problem_with(tmp_path)
