"""`python -m benchmarks.peers.models FOLDER`: models and data that both trainers read, by FOLDER/settings.json.

Every sampled response has the length that the settings give it in both: the pad id stands behind the vocabulary of the
models, and the last word ends a response where, and only where, the benchmark puts it. Models that read pairs pad with
the last word, which no mask counts.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch


def write(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    vocab, preferences = settings["vocab"], "pair_lengths" in settings
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=settings["longest"],
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        num_labels=1,
    )
    torch.manual_seed(0)
    kinds = {"policy": LlamaForCausalLM} | ({} if preferences else {"reward": LlamaForSequenceClassification})
    for name, kind in kinds.items():
        kind(config).save_pretrained(folder / name)
        tokenizer(vocab, f"w{vocab - 1}" if preferences else "<|pad|>").save_pretrained(folder / name)
    rng = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{rng.randrange(vocab - 1)}" for _ in range(length))

    if preferences:  # both completions end with the EOS token
        rows = [
            {"prompt": text(prompt)} | {k: f" {text(n - 1)} w{vocab - 1}" for k, n in (("chosen", c), ("rejected", r))}
            for prompt, c, r in settings["pair_lengths"]
        ]
    else:
        rows = [{"prompt": text(settings["prompt_length"])} for _ in range(settings["prompts"])]
    data = folder / ("pairs.jsonl" if preferences else "prompts.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokenizer(vocab: int, pad: str):
    """Words w0, w1, ...; transformers puts the special tokens behind them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token=f"w{vocab - 1}")


def end(rows: list[list[int]], lengths: list[int], eos: int) -> list[list[int]]:
    """Sampled rows with the EOS id as their token number `length` and nowhere before it."""
    return [[*(min(i, eos - 1) for i in row[: n - 1]), eos, *row[n:]] for row, n in zip(rows, lengths)]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
