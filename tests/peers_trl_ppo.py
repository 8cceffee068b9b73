"""`.venv-trl/bin/python tests/peers_trl_ppo.py FOLDER`: both epochs of one PPO step by TRL's own PPOTrainer, a case at
a time; all that it computed goes to FOLDER/trl.pt, beside the models. tests/test_trl_ppo.py starts it and judges.

Imports nothing of this project. The sampling alone is replaced: the responses are given, with the policy's logits. The
numbers are the locals of `PPOTrainer.train`, read where it calls `backward` and `log`. Plain gradient descent, so that
a step is the gradient times the learning rate.
"""

import sys
from dataclasses import fields
from pathlib import Path

import torch

EOS, PAD, WORDS, VOCAB, ROWS, WIDTH = 0, 1, 40, 50, 8, 7  # responses hold ids below WORDS
OPTIONS = {
    "response_length": WIDTH, "num_ppo_epochs": 2, "per_device_train_batch_size": ROWS, "learning_rate": 0.05,
    "max_grad_norm": 0.01, "temperature": 0.8, "missing_eos_penalty": 0.7, "kl_coef": 0.1, "kl_estimator": "k1",
    "gamma": 0.97, "lam": 0.9, "cliprange": 0.1, "cliprange_value": 0.05, "vf_coef": 0.3, "whiten_rewards": False,
}  # fmt: skip
CASES = {  # (responses of one length, options)
    "full": (True, {}),
    "full-k3": (True, {"kl_estimator": "k3"}),
    "full-whitened-rewards": (True, {"whiten_rewards": True}),
    "ragged": (False, {}),
    "ragged-k3": (False, {"kl_estimator": "k3"}),
    "ragged-whitened-rewards": (False, {"whiten_rewards": True}),
    "ragged-undiscounted": (False, {"gamma": 1.0, "lam": 1.0}),
}
ACCUMULATED = {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2}
OTHERS = {
    "accumulated": (False, ACCUMULATED),
    "accumulated-at-the-end-of-the-data": (False, ACCUMULATED),
    "pad-is-eos": (False, {}),
    "cold": (True, {"temperature": 1e-3}),
}
ALL = CASES | OTHERS
LENGTHS = (7, 4, 1, 7, 6, 3, 7, 5)  # with the EOS; rows 0 and 6 do not end


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (2 + row % 4,), generator=draw).tolist() for row in range(ROWS)]


def responses(full: bool) -> list[list[int]]:
    draw = torch.Generator().manual_seed(2)
    words = torch.randint(2, WORDS, (ROWS, WIDTH), generator=draw).tolist()
    lengths = [WIDTH] * ROWS if full else LENGTHS
    return [row[:n] if i in (0, 6) else [*row[: n - 1], EOS] for i, (row, n) in enumerate(zip(words, lengths))]


def sampled(name: str) -> list[list[int]]:
    """As they are sampled for TRL: one goes on after its EOS, with another EOS, and TRL cuts it."""
    rows = responses(ALL[name][0])
    return [[*row, 9, EOS, 9, 9] if name.startswith("ragged") and len(row) == 3 else row for row in rows]


def write_models(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(2, VOCAB)}, "w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"initializer_range": 0.15, "vocab_size": VOCAB, "max_position_embeddings": 32, "num_labels": 1}
    config = LlamaConfig(**sizes, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None)
    torch.manual_seed(3)
    policy = LlamaForCausalLM(config)
    models = {"policy": policy, "reward": LlamaForSequenceClassification(config)}
    models["value"], models["reference"] = LlamaForSequenceClassification(config), LlamaForCausalLM(config)
    with torch.no_grad():
        for mine, its in zip(models["reference"].parameters(), policy.parameters()):
            mine.copy_(its + 0.05 * mine)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


# TRL

ROLLOUT = ("logprobs", "ref_logprobs", "values", "scores", "kl", "rewards", "advantages", "returns")
MASKS = ("padding_mask", "padding_mask_p1")
MINIBATCH = ("new_logprobs", "logits", "loss", "pg_loss", "vf_loss")
STATISTICS = ("approxkl", "pg_clipfrac", "vf_clipfrac", "entropy", "ratio")


def replay(responses):
    """In place of `batch_generation`: these responses, right-padded."""
    from trl.experimental.ppo import ppo_trainer

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


def run(folder, name):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    ppo_trainer.batch_generation = replay(sampled(name))
    options = OPTIONS | ALL[name][1]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    if name == "pad-is-eos":
        tokenizer.pad_token = tokenizer.eos_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / n) for n in ("policy", "reference"))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(folder / n) for n in ("value", "reward"))
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=options["learning_rate"])
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            total_episodes=ROWS,
            stop_token="eos",
            num_sample_generations=0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts()}),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    if name != "accumulated-at-the-end-of-the-data":  # in order, and no DataLoader of accelerate's that could end
        trainer.dataloader = [trainer.data_collator([{"input_ids": prompt} for prompt in prompts()])]
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
    from trl.experimental.ppo import PPOConfig

    torch.set_num_threads(1)
    write_models(folder)
    found = {name: run(folder, name) for name in ALL}
    found["defaults"] = {f.name: f.default for f in fields(PPOConfig) if isinstance(f.default, (int, float, str))}
    found["defaults"] |= {f.name: None for f in fields(PPOConfig) if f.default is None}
    torch.save(found, folder / "trl.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
