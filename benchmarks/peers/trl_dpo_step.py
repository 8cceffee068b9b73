"""`.venv-peers/bin/python trl_dpo_step.py FOLDER RESULT`: the same steps by TRL's DPOTrainer.

Imports nothing of this project but what lies beside it. TRL's defaults but for what makes the work equal: the type of
the computation, no gradient checkpointing (off in this trainer unless asked for), the order of the pairs, a constant
learning rate, no saving. Phases are its training step, the reference's forward pass in it, and what follows it.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from meter import Meter
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from watch import Watch


def watch_phases(trainer, meter):
    training_step = trainer.training_step

    def watched(*args, **options):
        meter.enter("gradient")
        found = training_step(*args, **options)
        meter.enter("optimizer")
        return found

    trainer.training_step = watched
    if trainer.ref_model is not None:
        trainer.ref_model.register_forward_pre_hook(lambda *_: meter.enter("reference"))
        trainer.ref_model.register_forward_hook(lambda *_: meter.enter("gradient"))


def main(folder, result):
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    on_cpu, meter = settings["device"] == "cpu", Meter(settings["device"])
    args = DPOConfig(
        output_dir=str(folder / "trl"),
        beta=settings["beta"],
        per_device_train_batch_size=settings["pairs"],
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        max_length=settings["longest"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        precompute_ref_log_probs=settings["precompute"],
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    model, watch = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32), Watch(meter, "loss")
    meter.weigh()
    trainer = DPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([rows[i] for i in settings["order"]]),
        callbacks=[watch],
    )
    watch_phases(trainer, meter)
    trainer.train()
    result.write_text(
        json.dumps(meter.row() | {"losses": [float(entry["loss"]) for entry in watch.logged]}), encoding="utf-8"
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
