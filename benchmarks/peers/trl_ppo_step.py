"""`.venv-trl/bin/python trl_ppo_step.py FOLDER RESULT`: the same steps by TRL's PPOTrainer.

Imports nothing of this project. TRL's defaults but for what makes the work equal: float32, no gradient checkpointing
(this trainer has none either), no saving, no tables of samples, no stop token.
"""

import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Watch(TrainerCallback):
    def __init__(self):
        self.times, self.entropy = [], []

    def on_train_begin(self, args, state, control, **_):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        self.built = pages * os.sysconf("SC_PAGESIZE")
        self.times.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, args, state, control, **_):
        self.times.append((time.perf_counter(), time.process_time()))

    def on_log(self, args, state, control, logs=None, **_):
        if "objective/entropy" in logs:
            self.entropy.append(logs["objective/entropy"])


def end(rows, lengths, eos):
    """benchmarks/peers/models.py has the same."""
    return [[*(min(i, eos - 1) for i in row[: n - 1]), eos, *row[n:]] for row, n in zip(rows, lengths)]


def end_responses(found, settings):
    """Gives each rollout its lengths and notes its tokens: `batch_generation` is where PPOTrainer samples."""
    steps, eos = iter(settings["lengths"]), settings["vocab"] - 1
    generate = ppo_trainer.batch_generation

    def counted(model, queries, size, pad_token_id, generation_config):
        sequences, logits = generate(model, queries, size, pad_token_id, generation_config)
        lengths, width = next(steps), queries.shape[1]
        ended = end(sequences[:, width:].tolist(), lengths, eos)
        sequences = torch.cat([sequences[:, :width], torch.tensor(ended)], 1)
        found.append(sum(lengths))
        return sequences, logits

    ppo_trainer.batch_generation = counted


def main(folder, result):
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    args = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=settings["prompts"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        total_episodes=settings["prompts"] * settings["steps"],
        local_rollout_forward_batch_size=settings["prompts"],
        response_length=settings["response_length"],
        num_ppo_epochs=settings["epochs"],
        temperature=settings["temperature"],
        num_sample_generations=0,
        stop_token="eos",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    watch, responses = Watch(), []
    end_responses(responses, settings)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(folder / "reward") for _ in range(2))
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": [tokenizer(row["prompt"])["input_ids"] for row in rows]}),
        callbacks=[watch],
    )
    trainer.train()
    seconds, cpu_seconds = ([b - a for a, b in itertools.pairwise(column)] for column in zip(*watch.times))
    row = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "built_bytes": watch.built,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "entropy": watch.entropy,
        "response_tokens": responses,
    }
    result.write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
