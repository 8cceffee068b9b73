"""`python -m benchmarks.peers.rlhf_step FOLDER RESULT`: this trainer's steps, in a process of its own.

Its phases are the `timing/` metrics that every run logs.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.peers.meter import Meter, end
from rlhf import dpo, log, ppo, rollout
from rlhf.config import DPOConfig, PPOConfig

PHASES = {
    "ppo": {"rollout": "generation", "score": "scoring", "advantages": "advantages", "update": "update"},
    "dpo": {"reference": "reference", "gradient": "gradient", "optimizer": "optimizer"},
}


def main(folder: Path, result: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    run = {"ppo": run_ppo, "dpo": run_dpo}[settings["trainer"]]
    meter = Meter(settings["device"])
    found = run(folder, settings, meter)
    result.write_text(json.dumps(meter.row() | found), encoding="utf-8")


def common(folder: Path, settings: dict) -> dict:
    return {
        "output_dir": str(folder / "rlhf"),
        "model_name_or_path": str(folder / "policy"),
        "report_to": "none",
        "device": settings["device"],
        "dtype": "float32" if settings["device"] == "cpu" else "bfloat16",
    }


def clock_of(meter: Meter) -> type[log.Clock]:
    class Waiting(log.Clock):
        def lap(self, name: str) -> None:
            meter.wait()
            super().lap(name)

    return Waiting


def phases(trainer: str, metrics: dict[str, float]) -> dict[str, float]:
    return {phase: metrics[f"timing/{name}"] for name, phase in PHASES[trainer].items()}


def run_ppo(folder: Path, settings: dict, meter: Meter) -> dict:
    config = PPOConfig(
        **common(folder, settings),
        reward_model_path=str(folder / "reward"),
        dataset_name=str(folder / "prompts.jsonl"),
        per_device_train_batch_size=settings["prompts"],
        total_episodes=settings["prompts"] * settings["steps"],
        max_prompt_length=settings["prompt_length"],
        response_length=settings["response_length"],
        num_ppo_epochs=settings["epochs"],
        temperature=settings["temperature"],
        missing_eos_penalty=None,
        sample_steps=0,
    )
    found, load_models, read = {"entropy": [], "response_tokens": []}, ppo.load_models, rollout.read
    lengths, eos = iter(settings["lengths"]), settings["vocab"] - 1

    def load_and_weigh(config):
        models = load_models(config)
        meter.weigh()
        meter.start()
        return models

    def on_step(step, policy, metrics):
        meter.step(phases("ppo", metrics))
        found["entropy"].append(metrics["objective/entropy"])
        found["response_tokens"].append(metrics["tokens"])

    with ExitStack() as stack:
        for place, name, ours in (
            (ppo, "load_models", load_and_weigh),
            (ppo, "Clock", clock_of(meter)),
            (rollout, "read", lambda model, prompts, ids: read(model, prompts, end(ids, next(lengths), eos))),
        ):
            stack.enter_context(patch.object(place, name, ours))
        ppo.train(config, on_step)
    return found


def run_dpo(folder: Path, settings: dict, meter: Meter) -> dict:
    config = DPOConfig(
        **common(folder, settings),
        dataset_name=str(folder / "pairs.jsonl"),
        beta=settings["beta"],
        per_device_train_batch_size=settings["pairs"],
        max_length=settings["longest"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        precompute_ref_log_probs=settings["precompute"],
        eval_fraction=0.0,
        seed=settings["seed"],
    )
    losses, load_policy, steps = [], dpo.load_policy, log.Run.steps

    def load_and_weigh(config):
        models = load_policy(config)
        meter.weigh()
        return models

    def timed_steps(run):
        meter.start()
        return steps(run)

    def on_step(step, policy, metrics):
        meter.step(phases("dpo", metrics))
        losses.append(metrics["loss"])

    with ExitStack() as stack:
        for place, name, ours in (
            (dpo, "load_policy", load_and_weigh),
            (dpo, "Clock", clock_of(meter)),
            (log.Run, "steps", timed_steps),
        ):
            stack.enter_context(patch.object(place, name, ours))
        dpo.train(config, on_step)
    return {"losses": losses}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
