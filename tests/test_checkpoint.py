"""Checkpoints are whole or ignored, and a continued run ends with the same bytes as one that was never stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from tiny_models import sentence, write_jsonl
from torch import nn

from rlhf import dpo, ppo, reward_model, sft
from rlhf.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, problem_with, replacing, save_checkpoint
from rlhf.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, TrainingDiverged
from rlhf.log import write_samples
from rlhf.losses import completion_loss

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ("reward-ranking", "reward-objectives", "reward-process", "reward-lora")
TRAINERS = {"sft": sft, "sft_lora": sft, "reward": reward_model, "dpo": dpo, "kto": dpo, "ppo": ppo}
TRAINERS |= dict.fromkeys(MODES, reward_model)


@pytest.fixture
def configs(tiny_model, tiny_reward_model, chat_model, corpus, dialogues, pairs, labelled, tmp_path) -> dict:
    """Six steps each, with every kind of state: several epochs, warm-up, adaptive KL, accumulation."""
    common = {"model_name_or_path": tiny_model, "device": "cpu", "max_steps": 6, "save_steps": 2, "warmup_steps": 2}
    common |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "run")}
    rates = {"learning_rate": 3e-3, "weight_decay": 0.01}
    adapters = {"use_peft": True, "gradient_checkpointing": True, "eval_fraction": 0.25, "eval_steps": 2}
    adapters |= {"dataset_name": dialogues, "assistant_only_loss": True, "micro_batch_tokens": 20}
    rollouts = {"response_length": 6, "max_prompt_length": 8, "num_mini_batches": 2, "num_ppo_epochs": 2}
    rewards = {"reward_model_path": tiny_reward_model, "reward": ["rewards_for_tests:noisy"], "kl_target": 1.0}
    judged = {name: judged_rows(tmp_path / f"{name}.jsonl", name) for name in ("ranking", "objectives", "process")}
    held = {"max_length": 24, "eval_fraction": 0.25, "eval_steps": 3}
    steps = {"reward_type": "process", "step_separator": "and"}
    return {
        "sft": SFTConfig(**common, **rates, dataset_name=corpus, max_length=16),
        "sft_lora": SFTConfig(**common | {"model_name_or_path": chat_model}, **rates, **adapters, max_length=16),
        "reward": RewardConfig(**common, **rates, dataset_name=pairs, max_length=16),
        "dpo": DPOConfig(**common, **rates, dataset_name=pairs, max_length=16),
        "kto": DPOConfig(**common, **rates, dataset_name=labelled, max_length=16, loss_type="kto"),
        "reward-ranking": RewardConfig(
            **common, **rates, **held, dataset_name=judged["ranking"], micro_batch_tokens=40, label_smoothing=0.1
        ),
        "reward-objectives": RewardConfig(
            **common, **rates, **held, dataset_name=judged["objectives"], objectives=["kind", "long"]
        ),
        "reward-process": RewardConfig(**common, **rates, **held, **steps, dataset_name=judged["process"]),
        "reward-lora": RewardConfig(**common, **rates, **held, dataset_name=pairs, use_peft=True, lora_r=4),
        "ppo": PPOConfig(**common, **rates, **rollouts, **rewards, dataset_name=corpus, sample_steps=2),
    }


def judged_rows(path: Path, kind: str) -> str:
    def row(i: int) -> dict:
        words = [f" was {word}" for word in ("great", "fine", "dull")[: 2 + i % 2]]
        return {
            "ranking": {"ranking": words},
            "objectives": {"chosen": words[0], "rejected": words[1], "objective": {"kind": 1, "long": (-1) ** i}},
            "process": {"completions": words, "labels": [True, i % 3 > 0, False][: len(words)]},
        }[kind]

    return write_jsonl(path, [{"prompt": sentence(i), **row(i)} for i in range(24)])


def outcome(folder: Path) -> tuple[list[bytes], list[dict]]:
    """The final weights or adapters, their configuration, a report, and every metric that measures neither time nor
    memory."""
    measured = ("timing/", "memory/", "tokens_per_second")
    rows = [{name: row[name] for name in row if not name.startswith(measured)} for row in metrics_of(folder)]
    names = {"model.safetensors", "config.json", "adapter_model.safetensors", "adapter_config.json"}
    final = [path for path in sorted((folder / "final").iterdir()) if path.name in names]
    assert len(final) >= 2
    return [path.read_bytes() for path in [*final, *folder.glob("report.json")]], rows


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt_at(step: int, action):
    return lambda at, model, metrics: action() if at == step else None


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_stopped_run_continues_to_the_same_bytes(configs, tmp_path, kind):
    if kind == "sft_lora":
        pytest.importorskip("peft")
    train, config = TRAINERS[kind].train, configs[kind]
    train(replace(config, output_dir=str(tmp_path / "whole"), save_steps=0))
    with pytest.raises(SystemExit) as stop:
        train(replace(config, save_steps=0), on_step=interrupt_at(3, terminate))
    assert stop.value.code == 143
    assert names(tmp_path / "run") == ["checkpoint-000003"]
    result = train(replace(config, resume="auto"))
    assert result.steps == 6 and outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    again = train(replace(config, resume="auto"))  # from its last step: as after a kill before final/ is there
    assert again.metrics == result.metrics and outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("step", range(1, 6))
def test_dialogues_adapters_and_evaluations_go_on_from_any_step(configs, tmp_path, step):
    pytest.importorskip("peft")
    config = configs["sft_lora"]
    sft.train(replace(config, output_dir=str(tmp_path / "whole")))
    with pytest.raises(SystemExit):
        sft.train(replace(config, save_steps=0), on_step=interrupt_at(step, terminate))
    sft.train(replace(config, resume="auto"))
    whole = outcome(tmp_path / "whole")
    assert outcome(tmp_path / "run") == whole and ["eval/loss" in row for row in whole[1]] == [False, True] * 3


def test_killed_runs_continue_to_the_same_bytes(configs, tmp_path):
    """SIGKILL in the middle of the fifth step's reporting: metrics of step 5 are there, the checkpoint is of step 4."""
    code = """
        import os, pickle, signal, sys
        import matplotlib.figure, peft, torch
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # once, before the forks
        from rlhf import dpo, ppo, reward_model, sft
        torch.set_num_threads(1)
        configs = pickle.load(sys.stdin.buffer)
        for kind, config in configs.items():
            if os.fork() == 0:
                kill = lambda step, *_: os.kill(os.getpid(), signal.SIGKILL) if step == 5 else None
                trainers = {"sft": sft, "sft_lora": sft, "reward": reward_model, "dpo": dpo, "kto": dpo, "ppo": ppo}
                trainers[kind if kind in trainers else "reward"].train(config, on_step=kill)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL, kind
    """
    import pickle

    if not importlib.util.find_spec("peft"):
        del configs["sft_lora"]
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
    (older / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole: remove them"):
        sft.train(replace(config, resume="auto"))
    with pytest.raises(CheckpointError, match="final: no checkpoint but a model"):
        sft.train(replace(config, resume=str(tmp_path / "run" / "final")))


def test_going_back_leaves_no_checkpoint_of_the_abandoned_steps(configs, tmp_path):
    config = replace(configs["sft"], save_total_limit=3)
    sft.train(config)
    assert names(tmp_path / "run") == ["checkpoint-000006", "checkpoint-000004", "checkpoint-000002"]
    back = replace(config, save_steps=0, save_total_limit=1, resume=str(list_checkpoints(tmp_path / "run")[-1]))
    with pytest.raises(SystemExit):
        sft.train(back, on_step=interrupt_at(3, terminate))
    assert names(tmp_path / "run") == ["checkpoint-000003"]
    elsewhere = shutil.copytree(tmp_path / "run", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="elsewhere: holds an earlier run"):
        sft.train(replace(back, output_dir=str(elsewhere), resume=str(tmp_path / "run" / "checkpoint-000003")))


def test_a_run_does_not_overwrite_or_continue_another(configs):
    config = configs["sft"]
    sft.train(replace(config, max_steps=2))
    with pytest.raises(CheckpointError, match="holds an earlier run: use --resume auto to continue it"):
        sft.train(config)
    with pytest.raises(CheckpointError, match="max_steps was 2 and is now 6"):
        sft.train(replace(config, resume="auto"))
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.003 and is now 0\.1"):
        sft.train(replace(config, max_steps=2, learning_rate=0.1, resume="auto"))


def test_the_metrics_and_model_of_a_run_without_checkpoints_are_kept(configs, tmp_path):
    config = replace(configs["sft"], max_steps=1, save_steps=0)
    sft.train(config)
    (tmp_path / "model").mkdir()
    (tmp_path / "run" / "final").rename(tmp_path / "model" / "final")
    for folder in ("run", "model"):
        with pytest.raises(CheckpointError, match="holds an earlier run: use --resume auto to write over it"):
            sft.train(replace(config, output_dir=str(tmp_path / folder)))
    sft.train(replace(config, resume="auto"))
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]


def test_samples_may_hold_every_kind_of_line_break(configs, tmp_path):
    config = replace(configs["sft"], max_steps=2, save_steps=2)
    sft.train(config)
    for step in (1, 3):
        write_samples(tmp_path / "run", [{"step": step, "completion": "a\u2028b\u2029c\u0085d\re\nf"}])
    sft.train(replace(config, resume="auto"))
    lines = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert [json.loads(line) for line in lines] == [{"step": 1, "completion": "a\u2028b\u2029c\u0085d\re\nf"}]


def test_skipped_steps_are_counted_across_a_restart(configs, tmp_path, monkeypatch):
    """Two before it and one after are three in a row."""

    def broken(logprobs, tokens):
        return completion_loss(logprobs, tokens) * float("nan")

    monkeypatch.setattr(sft, "completion_loss", broken)
    with pytest.raises(SystemExit):
        sft.train(configs["sft"], on_step=interrupt_at(2, terminate))
    with pytest.raises(TrainingDiverged, match="3 optimizer steps in a row"):
        sft.train(replace(configs["sft"], resume="auto"))
    monkeypatch.undo()
    sft.train(replace(configs["sft"], resume="auto"))
    assert [row["skipped_steps"] for row in metrics_of(tmp_path / "run")] == [1, 2, 2, 2, 2, 2]


def test_weights_that_are_not_finite_are_no_result(configs, tmp_path):
    def spoil(step, model, metrics):
        torch.nn.init.constant_(model.module.lm_head.weight, float("inf"))

    with pytest.raises(TrainingDiverged, match="step 1: the weights of model are not finite and were not written"):
        sft.train(replace(configs["sft"], max_steps=1, save_steps=0), on_step=spoil)
    assert not (tmp_path / "run" / "final").exists()


def test_a_step_is_timed_without_what_follows_it(configs, tmp_path, monkeypatch):
    late = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0])
    monkeypatch.setattr("rlhf.log.time", clock)
    sft.train(replace(configs["sft"], max_steps=2), on_step=lambda *_: late.append(late.pop() + 1000))
    assert all(row["timing/step"] < 1000 for row in metrics_of(tmp_path / "run"))


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
    with pytest.raises(TrainingDiverged, match="step 1: the weights of model are not finite and were not written"):
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


def test_a_whole_checkpoint_is_neither_written_again_nor_dropped_for_a_damaged_one(module_and_optimizer, tmp_path):
    module, optimizer = module_and_optimizer
    (tmp_path / "checkpoint-000002").mkdir()

    def save() -> Path:
        return save_checkpoint(tmp_path, 1, {"model": module}, optimizer, {}, {}, keep=1)

    path = save()
    before = (path / "manifest.json").stat().st_ino
    assert save() == path and (path / "manifest.json").stat().st_ino == before
    (path / "model.safetensors").write_bytes(b"")
    assert problem_with(save()) is None


def test_a_folder_that_is_replaced_goes_when_the_new_one_is_there(tmp_path, monkeypatch):
    target = tmp_path / "final"
    for text in ("old", "new"):
        with replacing(target) as folder:
            (folder / "text").write_text(text)
        assert (target / "text").read_text() == text and list(tmp_path.iterdir()) == [target]

    def killed(path, to):
        if to == target:
            raise KeyboardInterrupt
        os.rename(path, to)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt), replacing(target) as folder:
        (folder / "text").write_text("newest")
    assert {path.read_text() for path in tmp_path.glob(".final.*/text")} == {"new", "newest"}


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    assert "no readable manifest" in problem_with(tmp_path)
