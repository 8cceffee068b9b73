"""`.venv-trl/bin/python tests/peers_trl_ppo.py FOLDER`: the two epochs of one PPO step by TRL's own PPOTrainer, a case
at a time, on the models and the rollout in FOLDER; everything that it computed goes to FOLDER/trl.pt.

Imports nothing of this project. The sampling alone is replaced: the responses are given, with the policy's logits. The
numbers are the locals of `PPOTrainer.train`, read where it calls `backward` and `log`. Plain gradient descent, so that
a step is the gradient times the learning rate.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

ROLLOUT = ("logprobs", "ref_logprobs", "values", "scores", "kl", "rewards", "advantages", "returns")
MASKS = ("padding_mask", "padding_mask_p1", "responses", "postprocessed_responses")
MINIBATCH = ("new_logprobs", "vpred", "logits", "loss", "pg_loss", "vf_loss")
STATISTICS = ("approxkl", "pg_clipfrac", "pg_loss", "vf_loss", "vf_clipfrac", "entropy", "ratio")


def replay(responses):
    """In place of `batch_generation`: these responses, after whatever stands behind an EOS the pad id."""

    def batch_generation(model, queries, size, pad_token_id, generation_config):
        width = max(map(len, responses))
        padded = [response + [pad_token_id] * (width - len(response)) for response in responses]
        sequences = torch.cat([queries, torch.tensor(padded)], 1)
        logits = ppo_trainer.forward(model, sequences, pad_token_id).logits[:, queries.shape[1] - 1 : -1]
        return sequences, logits / generation_config.temperature

    return batch_generation


def copies(frame, names):
    return {name: frame[name].detach().clone() for name in names}


def spy(trainer):
    """The record that fills while the trainer trains: what it computed from the rollout, and each backward pass."""
    backward, record = trainer.accelerator.backward, {"steps": []}
    parameters = dict(trainer.model.named_parameters())

    def watched_backward(loss):
        frame = sys._getframe(1).f_locals
        if "advantages" not in record:
            record.update(copies(frame, ROLLOUT + MASKS))
        step = copies(frame, MINIBATCH) | {"rows": torch.as_tensor(frame["micro_batch_inds"])}
        step["weights"] = {name: p.detach().clone() for name, p in parameters.items()}
        backward(loss)
        step["gradients"] = {name: p.grad.clone() for name, p in parameters.items()}
        record["steps"].append(step)

    def watched_log(logs):
        frame = sys._getframe(1).f_locals
        record["metrics"] = {name: float(value) for name, value in logs.items()}
        record["statistics"] = {name: frame[f"{name}_stats"].flatten().clone() for name in STATISTICS}

    trainer.accelerator.backward, trainer.log = watched_backward, watched_log
    return record


def run(folder, prompts, case):
    ppo_trainer.batch_generation = replay(case["responses"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    if case["pad_is_eos"]:
        tokenizer.pad_token = tokenizer.eos_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / n) for n in ("policy", "reference"))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(folder / n) for n in ("value", "reward"))
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=case["options"]["learning_rate"])
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            total_episodes=len(prompts),
            stop_token="eos",
            num_sample_generations=0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **case["options"],
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.dataloader = [trainer.data_collator([{"input_ids": prompt} for prompt in prompts])]  # in order
    record = spy(trainer)
    whiten, record["whitened"] = ppo_trainer.masked_whiten, []

    def watched_whiten(values, mask, shift_mean=True):
        record["whitened"].append(values.clone())
        return whiten(values, mask, shift_mean)

    ppo_trainer.masked_whiten = watched_whiten
    try:
        trainer.train()
    finally:
        ppo_trainer.masked_whiten = whiten
    return record


def main(folder):
    torch.set_num_threads(1)
    settings = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    found = {name: run(folder, settings["prompts"], case) for name, case in settings["cases"].items()}
    found["defaults"] = {f.name: f.default for f in fields(PPOConfig) if isinstance(f.default, (int, float, str))}
    found["defaults"] |= {f.name: None for f in fields(PPOConfig) if f.default is None}
    torch.save(found, folder / "trl.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
