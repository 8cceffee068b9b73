"""DPO on a task small enough to enumerate: the policy comes to the known optimum pi* ~ pi_ref exp(r / beta).

Completions are the 39 texts of one to three of three words; the reference and the policy are looked at given that they
write one of them. Preferences are Bradley and Terry's of a known reward, over pairs that the reference samples.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from tiny_models import write_jsonl

from rlhf import dpo
from rlhf.config import DPOConfig, InitConfig
from rlhf.init import init
from rlhf.model import LanguageModel, load_language_model
from rlhf.reference import completion_logps
from rlhf.tokens import TokenExample

WORDS, LONGEST, BETA, PAIRS = ("a", "b", "c"), 3, 1.0, 8_000

pytestmark = pytest.mark.usefixtures("one_thread")


def texts() -> list[str]:
    """Every completion of one to three words."""
    return [" ".join(words) for n in range(1, LONGEST + 1) for words in itertools.product(WORDS, repeat=n)]


def reward(text: str) -> float:
    words = text.split()
    return words.count("a") - words.count("b") * 0.5 + (words[-1] == "c")


def log_distribution(model: LanguageModel, config: DPOConfig) -> torch.Tensor:  # (39,) over texts()
    """Of the texts alone: what else a model may write is no completion of this task."""
    prompt, *_ = model.tokenizer(["x"])["input_ids"]
    examples = [TokenExample(prompt, [[*model.tokenizer(t)["input_ids"], model.eos_ids[0]]], "x", {}) for t in texts()]
    return completion_logps(model, examples, config)[0].double().log_softmax(0)


def test_dpo_reaches_the_known_optimum(tmp_path):
    (tmp_path / "words.txt").write_text("x a b c")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8}
    there = {"dataset_name": str(tmp_path / "words.txt"), "output_dir": str(tmp_path / "base")}
    base = str(init(InitConfig(**there, tokenizer="word", **sizes)))
    config = DPOConfig(
        model_name_or_path=base,
        dataset_name=str(tmp_path / "pairs.jsonl"),
        output_dir=str(tmp_path / "dpo"),
        beta=BETA,
        max_length=8,
        per_device_train_batch_size=256,
        num_train_epochs=3.0,
        learning_rate=5e-3,
        eval_fraction=0.0,
        device="cpu",
        report_to="none",
    )
    before = load_language_model(base, config)
    reference = log_distribution(before, config)
    rng, all_texts, rows = random.Random(0), texts(), []
    while len(rows) < PAIRS:
        pair = rng.choices(all_texts, reference.exp().tolist(), k=2)
        if pair[0] == pair[1]:
            continue
        wins = 1 / (1 + math.exp(reward(pair[1]) - reward(pair[0])))
        chosen, rejected = pair if rng.random() < wins else pair[::-1]
        rows.append({"prompt": "x", "chosen": f" {chosen}", "rejected": f" {rejected}"})
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    result = dpo.train(config)
    after = log_distribution(load_language_model(str(result.final_dir), config), config)
    optimum = (reference + torch.tensor([reward(t) for t in all_texts]).double() / BETA).log_softmax(0)

    def kl(p, q) -> float:
        return float((p.exp() * (p - q)).sum())

    assert kl(reference, optimum) > 0.3
    assert kl(after, optimum) < 0.05, kl(after, optimum)
