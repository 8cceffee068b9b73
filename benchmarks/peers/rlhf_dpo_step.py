"""`python -m benchmarks.peers.rlhf_dpo_step FOLDER RESULT`: this trainer's steps, in a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch

from rlhf import dpo
from rlhf.config import DPOConfig
from rlhf.log import Run, peak_of_process


def main(folder: Path, result: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    config = DPOConfig(
        output_dir=str(folder / "rlhf"),
        model_name_or_path=str(folder / "policy"),
        dataset_name=str(folder / "pairs.jsonl"),
        beta=settings["beta"],
        per_device_train_batch_size=settings["pairs"],
        max_length=settings["longest"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        eval_fraction=0.0,
        seed=settings["seed"],
        report_to="none",
        device="cpu",
        dtype="float32",
    )
    clocks = (time.perf_counter, time.process_time)
    times, losses, built = [], [], []
    load_policy, steps = dpo.load_policy, Run.steps

    def load_and_weigh(config):
        models = load_policy(config)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        built.append(pages * os.sysconf("SC_PAGESIZE"))
        return models

    def timed_steps(run):
        times.append([clock() for clock in clocks])
        return steps(run)

    def on_step(step, policy, metrics):
        times.append([clock() for clock in clocks])
        losses.append(metrics["loss"])

    dpo.load_policy, Run.steps = load_and_weigh, timed_steps
    dpo.train(config, on_step)
    seconds, cpu_seconds = ([b - a for a, b in itertools.pairwise(column)] for column in zip(*times))
    row = {"seconds": seconds, "cpu_seconds": cpu_seconds, "built_bytes": built[0], "peak_bytes": peak_of_process()}
    result.write_text(json.dumps(row | {"losses": losses}), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
