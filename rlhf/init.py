"""A tokenizer trained on a corpus and a model with random weights, for work without downloads."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch

from rlhf.config import ConfigError, InitConfig
from rlhf.log import save_config, say
from rlhf.read import DataError, check_text, read_rows

PAD, BOS, EOS, UNKNOWN = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"


def init(config: InitConfig) -> Path:
    """Writes a directory that transformers loads, and returns it."""
    from transformers import PreTrainedTokenizerFast

    rows = chain.from_iterable(read_rows(name, config.dataset_split) for name in config.dataset_name)
    texts = [text for where, row in rows for text in _strings(where, row)]
    if not texts:
        raise DataError(f"{', '.join(config.dataset_name)}: no text in it")
    backend = (
        _train_bpe(texts, config.vocab_size) if config.tokenizer == "bpe" else _train_words(texts, config.vocab_size)
    )
    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    special |= {"unk_token": UNKNOWN} if config.tokenizer == "word" else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=config.max_position_embeddings, **special
    )
    model = build_model(config, tokenizer)
    save_config(config)
    model.save_pretrained(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)
    say(f"{config.output_dir}: {len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    return Path(config.output_dir)


def build_model(config: InitConfig, tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    # Architectures that have these give them the values of a large model.
    derived = {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    try:
        defaults = AutoConfig.for_model(config.model_type)
        sizes |= {name: value for name, value in derived.items() if hasattr(defaults, name)}
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.model_type, **sizes))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model_type: no causal model {config.model_type!r} of these sizes: {error}") from error


def _strings(where: str, value: object) -> list[str]:
    """Every text in a row, however deep: messages are dictionaries in lists."""
    if isinstance(value, str):
        return [check_text(where, value)]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for child in children for text in _strings(where, child)]


def _train_bpe(texts: list[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 3
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size: expected at least {smallest} (256 bytes and 3 special tokens), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_words(texts: list[str], vocab_size: int):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
