"""`.venv-trl/bin/python trl_ppo_step.py FOLDER RESULT`: the same steps by TRL's PPOTrainer.

Imports nothing of this project but what lies beside it. TRL's defaults but for what makes the work equal: the type of
the computation, no gradient checkpointing (off in this trainer unless asked for), no saving, no tables of samples, no
stop token. Phases are the functions that PPOTrainer.train calls. Its log-probabilities of the policy come from the
logits of sampling, so that its scoring has a forward pass less than this trainer's.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from meter import REST, Meter, end
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from watch import Watch


class WatchFromTheModels(Watch):
    """Its models stand when training begins."""

    def on_train_begin(self, args, state, control, **others):
        self.meter.weigh()
        super().on_train_begin(args, state, control, **others)


def watch_phases(trainer, meter):
    """A phase begins where a function is called, or where it returns."""
    whole, forward, get_reward = trainer.model, ppo_trainer.forward, ppo_trainer.get_reward
    gather = trainer.accelerator.gather_for_metrics

    def watched_forward(model, *args, **options):
        meter.enter("update" if model is whole else "scoring")
        return forward(model, *args, **options)

    def watched_reward(*args, **options):
        meter.enter("scoring")
        found = get_reward(*args, **options)
        meter.enter("advantages")  # unless another micro-batch is scored
        return found

    def watched_gather(*args, **options):
        meter.enter(REST)
        return gather(*args, **options)

    ppo_trainer.forward, ppo_trainer.get_reward = watched_forward, watched_reward
    trainer.accelerator.gather_for_metrics = watched_gather


def end_responses(found, settings, meter):
    """Gives each rollout its lengths and notes its tokens: `batch_generation` is where PPOTrainer samples."""
    steps, eos = iter(settings["lengths"]), settings["vocab"] - 1
    generate = ppo_trainer.batch_generation

    def counted(model, queries, size, pad_token_id, generation_config):
        meter.enter("generation")
        sequences, logits = generate(model, queries, size, pad_token_id, generation_config)
        lengths, width = next(steps), queries.shape[1]
        ended = end(sequences[:, width:].tolist(), lengths, eos)
        sequences = torch.cat([sequences[:, :width], torch.tensor(ended, device=sequences.device)], 1)
        found.append(sum(lengths))
        meter.enter("scoring")
        return sequences, logits

    ppo_trainer.batch_generation = counted


def main(folder, result):
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    on_cpu, meter, responses = settings["device"] == "cpu", Meter(settings["device"]), []
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
        use_cpu=on_cpu,
        bf16=not on_cpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    watch = WatchFromTheModels(meter, "objective/entropy")
    end_responses(responses, settings, meter)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32) for _ in range(2)
    )
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
    watch_phases(trainer, meter)
    trainer.train()
    found = {"entropy": [entry["objective/entropy"] for entry in watch.logged], "response_tokens": responses}
    result.write_text(json.dumps(meter.row() | found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
