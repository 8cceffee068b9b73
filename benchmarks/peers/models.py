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
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    vocab, preferences = settings["vocab"], settings["trainer"] == "dpo"
    kinds = {"policy": AutoModelForCausalLM}
    if not preferences:
        kinds["reward"] = AutoModelForSequenceClassification
    torch.manual_seed(0)
    for name, kind in kinds.items():
        config = model_config(vocab, settings["longest"], **settings.get(name, settings["policy"]))
        with torch.device(settings["device"]):
            module = kind.from_config(config, dtype=torch.float32)
        if settings["device"] == "cuda":  # half to write and to read; both trainers hold them in float32
            module.to(torch.bfloat16)
        module.save_pretrained(folder / name)
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


def model_config(vocab: int, longest: int, kind: str, width: int, layers: int, heads: int, **others):
    """A Llama or an OPT with one label and no special tokens; `others` are fields of its configuration."""
    from transformers import LlamaConfig, OPTConfig

    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    common = sizes | special | {"max_position_embeddings": longest, "num_labels": 1}
    if kind == "opt":
        return OPTConfig(**common | {"ffn_dim": 4 * width, "word_embed_proj_dim": width} | others)
    return LlamaConfig(**common | {"intermediate_size": 4 * width, "num_key_value_heads": heads} | others)


def tokenizer(vocab: int, pad: str):
    """Words w0, w1, ...; transformers puts the special tokens behind them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token=f"w{vocab - 1}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
