"""`python -m benchmarks.peers.rlhf_ppo_step FOLDER RESULT`: this trainer's steps, in a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

from benchmarks.peers.models import end
from rlhf import ppo, rollout
from rlhf.config import PPOConfig


def main(folder: Path, result: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    config = PPOConfig(
        output_dir=str(folder / "rlhf"),
        model_name_or_path=str(folder / "policy"),
        reward_model_path=str(folder / "reward"),
        dataset_name=str(folder / "prompts.jsonl"),
        per_device_train_batch_size=settings["prompts"],
        total_episodes=settings["prompts"] * settings["steps"],
        max_prompt_length=settings["prompt_length"],
        response_length=settings["response_length"],
        num_ppo_epochs=settings["epochs"],
        temperature=settings["temperature"],
        missing_eos_penalty=None,
        report_to="none",
        sample_steps=0,
        device="cpu",
        dtype="float32",
    )
    clocks = (time.perf_counter, time.process_time)
    times, entropy, responses, built = [], [], [], []
    load_models = ppo.load_models

    def load_and_weigh(config):
        models = load_models(config)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        built.append(pages * os.sysconf("SC_PAGESIZE"))
        times.append([clock() for clock in clocks])
        return models

    def on_step(step, policy, metrics):
        times.append([clock() for clock in clocks])
        entropy.append(metrics["objective/entropy"])
        responses.append(metrics["tokens"])

    read, steps = rollout.read, iter(settings["lengths"])
    eos = settings["vocab"] - 1
    rollout.read = lambda model, prompts, new_ids: read(model, prompts, end(new_ids, next(steps), eos))
    ppo.load_models = load_and_weigh
    ppo.train(config, on_step)
    seconds, cpu_seconds = ([b - a for a, b in itertools.pairwise(column)] for column in zip(*times))
    row = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "built_bytes": built[0],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "entropy": entropy,
        "response_tokens": responses,
    }
    result.write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
