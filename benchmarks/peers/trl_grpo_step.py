"""`.venv-peers/bin/python -m benchmarks.peers.trl_grpo_step trl|rlhf FOLDER RESULT`: steps of TRL's GRPOTrainer, on its
functions or on ours. TRL's defaults but for what a CPU needs, a constant learning rate and no saving."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import rlhf_kernels
from benchmarks.peers.grpo_step import COMPARED
from benchmarks.peers.meter import Meter
from benchmarks.peers.models import model_config, tokenizer
from benchmarks.peers.watch import Watch


def watch_phases(trainer: GRPOTrainer, meter: Meter) -> None:
    """Sampling, with what it scores for it, lies within the training step; the optimizer follows it."""

    def watched(function, phase: str, then: str):
        def run(*args, **options):
            meter.enter(phase)
            found = function(*args, **options)
            meter.enter(then)
            return found

        return run

    sample = "_generate_and_score_completions"
    setattr(trainer, sample, watched(getattr(trainer, sample), "generation", "gradient"))
    trainer.training_step = watched(trainer.training_step, "gradient", "optimizer")


def few_large_ids(completion_ids, **_) -> list[float]:
    """A reward that differs between completions."""
    return [sum(i % 3 == 0 for i in ids) / len(ids) for ids in completion_ids]


def main(which: str, folder: Path, result: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    if which == "rlhf":
        rlhf_kernels.patch("trl")
    args = GRPOConfig(
        output_dir=str(folder / which), max_steps=settings["steps"], steps_per_generation=1,
        per_device_train_batch_size=settings["completions"], num_generations=settings["completions"],
        max_completion_length=settings["response_length"], learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    vocab, meter = settings["vocab"], Meter(settings["device"])
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(model_config(vocab, settings["longest"], **settings["policy"]))
    policy.generation_config.eos_token_id = policy.config.eos_token_id = vocab - 1
    meter.weigh()
    words = torch.randint(vocab - 1, (settings["steps"], settings["prompt_length"])).tolist()
    watch = Watch(meter, "loss")
    trainer = GRPOTrainer(
        model=policy,
        args=args,
        reward_funcs=few_large_ids,
        train_dataset=Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in words]),
        processing_class=tokenizer(vocab, f"w{vocab - 1}"),
        callbacks=[watch],
    )
    watch_phases(trainer, meter)
    trainer.train()
    compared = {name: [float(entry[name]) for entry in watch.logged] for name in COMPARED}
    result.write_text(json.dumps(meter.row() | compared), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:4]))
