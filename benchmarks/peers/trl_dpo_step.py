"""`.venv-peers/bin/python trl_dpo_step.py FOLDER RESULT`: the same steps by TRL's DPOTrainer.

Imports nothing of this project. TRL's defaults but for what makes the work equal: float32, no gradient checkpointing
(off in this trainer unless asked for), the order of the pairs, a constant learning rate, no saving.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Watch(TrainerCallback):
    def __init__(self):
        self.times, self.losses = [], []

    def on_train_begin(self, args, state, control, **_):
        self.times.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, args, state, control, **_):
        self.times.append((time.perf_counter(), time.process_time()))

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main(folder, result):
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    args = DPOConfig(
        output_dir=str(folder / "trl"),
        beta=settings["beta"],
        per_device_train_batch_size=settings["pairs"],
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        max_length=settings["longest"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    model, watch = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32), Watch()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    trainer = DPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([rows[i] for i in settings["order"]]),
        callbacks=[watch],
    )
    trainer.train()
    seconds, cpu_seconds = ([b - a for a, b in itertools.pairwise(column)] for column in zip(*watch.times))
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    row = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "built_bytes": pages * os.sysconf("SC_PAGESIZE"),
        "peak_bytes": next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024,
        "losses": watch.losses,
    }
    result.write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
