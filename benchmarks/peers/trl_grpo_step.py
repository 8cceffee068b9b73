"""`.venv-peers/bin/python -m benchmarks.peers.trl_grpo_step trl|patched FOLDER RESULT`: the steps by TRL's GRPOTrainer.

TRL's defaults but for what a CPU needs and what keeps a constant learning rate and writes nothing.
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import rlhf_kernels
from benchmarks.peers.grpo_step import COMPARED
from benchmarks.peers.models import tokenizer


def status(field: str) -> int:
    """Bytes, as /proc/self/status has them."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def model(settings: dict) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings["vocab"], hidden_size=settings["width"], intermediate_size=4 * settings["width"],
        num_hidden_layers=settings["layers"], num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=settings["prompt_length"] + settings["completion_length"], tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=settings["vocab"] - 1, pad_token_id=settings["vocab"] - 2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def few_large_ids(completion_ids, **_) -> list[float]:
    """A reward that differs between completions."""
    return [sum(i % 3 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Watch(TrainerCallback):
    """When steps begin and end, and what they log."""

    def __init__(self) -> None:
        self.ticks, self.logged = [], []

    def on_train_begin(self, args, state, control, **_):
        self.ticks.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, args, state, control, **_):
        self.ticks.append((time.perf_counter(), time.process_time()))

    def on_log(self, args, state, control, logs=None, **_):
        self.logged.extend([logs] if "loss" in logs else [])


def time_sampling(trainer: GRPOTrainer) -> list[float]:
    """A list that fills with the seconds of each call that samples and scores."""
    sample, seconds = trainer._generate_and_score_completions, []

    def timed(inputs):
        start = time.perf_counter()
        output = sample(inputs)
        seconds.append(time.perf_counter() - start)
        return output

    trainer._generate_and_score_completions = timed
    return seconds


def main(which: str, folder: Path, result: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    if which == "patched":
        rlhf_kernels.patch("trl")
    args = GRPOConfig(
        output_dir=str(folder / which), max_steps=settings["steps"], steps_per_generation=1,
        per_device_train_batch_size=settings["completions"], num_generations=settings["completions"],
        max_completion_length=settings["completion_length"], learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    policy, watch = model(settings), Watch()
    built = status("VmRSS:")
    words = torch.randint(settings["vocab"] - 2, (settings["steps"], settings["prompt_length"])).tolist()
    prompts = [{"prompt": " ".join(f"w{i}" for i in row)} for row in words]
    trainer = GRPOTrainer(
        model=policy, args=args, reward_funcs=few_large_ids, train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer(settings["vocab"], f"w{settings['vocab'] - 2}"), callbacks=[watch],
    )  # fmt: skip
    generation = time_sampling(trainer)
    trainer.train()
    seconds, cpu_seconds = ([b - a for a, b in itertools.pairwise(column)] for column in zip(*watch.ticks))
    generation_s = statistics.median(generation[1:])
    row = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "generation_s": generation_s,
        "training_s": statistics.median(seconds[1:]) - generation_s,
        "built_bytes": built,
        "peak_bytes": status("VmHWM:"),
        **{name: [float(entry[name]) for entry in watch.logged] for name in COMPARED},
    }
    result.write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:4]))
