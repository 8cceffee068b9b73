"""Policy, reference, value and reward models: loading, saving, copies that share weights, adapters.

Weights that are trained are float32, or bfloat16 with stochastic rounding; bfloat16 is the compute type (autocast), so
an update of 1e-6 is not rounded away. Modules stay in eval mode: dropout would make the ratio of the first update
differ from 1.
"""

from __future__ import annotations

import copy
import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import rlhf_kernels
from rlhf import attention
from rlhf.config import LoraFields, RunConfig, UsageError

ADAPTER = "adapter_config.json"  # in a directory that holds LoRA adapters instead of a model
SCORING = ("reward_mean", "reward_std", "objective_weights")  # what a reward model's config.json adds


class ModelError(UsageError):
    """A model that can't be loaded or doesn't fit its use."""


@dataclass(frozen=True)
class _Loaded:
    """What language models and scorers share."""

    module: nn.Module
    tokenizer: object
    eos_ids: tuple[int, ...]  # the tokenizer's first; each of them ends a text
    vocab_size: int  # ids that the tokenizer knows; rows of the embedding beyond them are padding
    compute_dtype: torch.dtype
    padded_because: str | None = None  # why sequences are padded rather than packed

    @property
    def packed(self) -> bool:
        return self.module.config._attn_implementation == attention.NAME

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def pad_id(self) -> int:
        """Any valid id does: padding is known by lengths. A pad token outside the embedding gives way to EOS or 0."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None and pad < self.vocab_size else next(iter(self.eos_ids), 0)

    def autocast(self) -> AbstractContextManager:
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=enabled)


class LanguageModel(_Loaded):
    """Policy or reference. Ids from vocab_size on have no probability, in sampling and in training."""

    @cached_property
    def head(self) -> rlhf_kernels.LMHead:
        """What the ops on hidden states need; where it is not fused, its `reason` says why and logits are formed."""
        if self.device.type == "meta":  # of a dry run: nothing to probe
            return rlhf_kernels.LMHead(self.module.get_decoder(), self.module.get_output_embeddings())
        return rlhf_kernels.lm_head_of(self.module)

    def head_options(self) -> dict:
        """The head as those ops take it, cut to the ids that the tokenizer knows."""
        options = self.head.options() | {"weight": self.head.weight}
        for name in ("weight", "bias"):
            if options[name] is not None and len(options[name]) > self.vocab_size:
                options[name] = options[name][: self.vocab_size]
        return options


class Scorer(_Loaded):
    """A sequence classifier with a label for each objective, mostly one: a reward model, or a value model when read at
    every token."""

    @property
    def objectives(self) -> list[str]:
        """Names of several heads; of one, none."""
        return _objectives(self.module.config)


@dataclass(frozen=True)
class ValueHead:
    """A value model that is a head on the policy's last hidden states."""

    policy: LanguageModel
    module: nn.Linear  # (1, H) float32


def choose_device(config: RunConfig) -> tuple[torch.device, torch.dtype]:
    """(device, compute type) that the configuration asks for."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: cuda was asked for and torch finds no GPU: use --device cpu or a CUDA build of torch")
    use_gpu = config.device != "cpu" and torch.cuda.is_available()
    by_device = torch.bfloat16 if use_gpu else torch.float32
    dtype = by_device if config.dtype == "auto" else getattr(torch, config.dtype)
    return torch.device("cuda" if use_gpu else "cpu"), dtype


# Loading and saving


def load_tokenizer(path: str):
    from transformers import AutoTokenizer

    _check_directory(path)
    return _load(AutoTokenizer.from_pretrained, path)


def load_language_model(path: str, config: RunConfig) -> LanguageModel:
    from transformers import AutoModelForCausalLM

    device, dtype = choose_device(config)
    tokenizer = load_tokenizer(path)
    module, missing = _load_module(AutoModelForCausalLM, path, config)
    _refuse_missing(path, missing)
    reason = _prepare(module, device, dtype, config)
    return LanguageModel(module, tokenizer, *_special(module, tokenizer), dtype, reason)


def load_scorer(
    path: str,
    config: RunConfig,
    head: Literal["keep", "random", "zero"] = "keep",
    objectives: list[str] | None = None,  # of a language model's new head; by default one without a name
) -> Scorer:
    """A sequence classifier, with the objectives that it was trained for. `keep` refuses a model without a head;
    `random` and `zero` give one to a language model: N(0, 1/(H+1)) weights drawn from the seed (arXiv 2403.17031,
    detail 9), or zeros."""
    from transformers import AutoModelForSequenceClassification

    device, dtype = choose_device(config)
    tokenizer = load_tokenizer(path)
    names = _objectives(_saved_config(path))
    if names and objectives is not None and objectives != names:
        raise ModelError(f"objectives: expected those of {path}, {names}, got {objectives}")
    names = names or objectives or []
    with torch.random.fork_rng():
        module, missing = _load_module(AutoModelForSequenceClassification, path, config, num_labels=len(names) or 1)
    if not isinstance(getattr(module, "score", None), nn.Linear):
        raise ModelError(f"{path}: {type(module).__name__} has no linear `score` head: expected a decoder")
    _refuse_missing(path, {name for name in missing if not name.startswith("score.")})
    if missing:
        if head == "keep":
            raise ModelError(f"{path}: has no reward head: train one with `rlhf reward`")
        _init_head(module.score, head, config.seed)
    reason = _prepare(module, device, dtype, config)
    scorer = Scorer(module, tokenizer, *_special(module, tokenizer), dtype, reason)
    module.config.pad_token_id = scorer.pad_id  # transformers' own forward finds the last token by it
    if names:
        module.config.id2label = dict(enumerate(names))
        module.config.label2id = {name: i for i, name in enumerate(names)}
        module.config.objective_weights = getattr(module.config, "objective_weights", None) or [1.0] * len(names)
    return scorer


def _saved_config(path: str):
    """What config.json says; adapters alone may have none."""
    from transformers import AutoConfig, PretrainedConfig

    alone = (Path(path) / ADAPTER).is_file() and not (Path(path) / "config.json").is_file()
    return PretrainedConfig() if alone else _load(AutoConfig.from_pretrained, path)


def _objectives(config) -> list[str]:
    named = getattr(config, "objective_weights", None)
    return [config.id2label[i] for i in range(len(named))] if named else []


def _prepare(module: nn.Module, device: torch.device, dtype: torch.dtype, config: RunConfig) -> str | None:
    """Puts a module where it runs; returns why its sequences are padded, or None."""
    weightless = module.device.type == "meta"  # of a dry run
    (module if weightless else module.to(device)).eval()
    packs = getattr(config, "padding_free", True)
    return attention.enable_packing(module, dtype, probe=not weightless) if packs else "padding_free is false"


def to_bfloat16(module: nn.Module) -> None:
    """Weights alone, as transformers loads them: in bfloat16 the frequencies of rotary embeddings, which are buffers,
    turn a token at position 1,000 by up to two radians too much or too little."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def frozen(model: LanguageModel | Scorer, config: RunConfig) -> LanguageModel | Scorer:
    model.module.requires_grad_(False)
    if "frozen_bf16" in getattr(config, "memory_layout", ()):
        to_bfloat16(model.module)
    return model


def frozen_copy(model: LanguageModel) -> LanguageModel:
    return replace(model, module=copy.deepcopy(model.module).requires_grad_(False))


def shared_copy(module: nn.Module) -> nn.Module:
    """The same weights in modules of their own, so that what is added to one is not seen by the other."""
    kept = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, kept)


def with_adapters(
    model: LanguageModel | Scorer,
    config: LoraFields,
    trained: tuple[str, ...] = (),  # modules that are trained, and saved, whole
) -> LanguageModel | Scorer:
    """The model with LoRA adapters over frozen weights, which it shares with `model` (arXiv 2106.09685)."""
    module = shared_copy(model.module.requires_grad_(False))
    settings = peft().LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=config.lora_target_modules or "all-linear",
        modules_to_save=list(trained) or None,
        task_type="CAUSAL_LM" if isinstance(model, LanguageModel) else "SEQ_CLS",
    )
    ends = module.get_input_embeddings(), module.get_output_embeddings()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            module.add_adapter(settings)
        except ValueError as error:  # no module of that name, or of a kind that takes no adapter
            raise UsageError(f"lora_target_modules: {' '.join(str(error).split()):.300}") from error
    for found in module.peft_config.values():
        found.target_modules = sorted(found.target_modules)  # a set, whose order changes from process to process
        found.base_model_name_or_path = _below_adapters(model, config)
    for parameter in module.parameters():
        if parameter.requires_grad:  # peft gives adapters the type of what they adapt
            parameter.data = parameter.data.float()
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    if tied and ends != (module.get_input_embeddings(), module.get_output_embeddings()):
        raise UsageError(
            "lora_target_modules: expected modules below the head, got the head or the embedding, which are one matrix "
            f"in {model.module.name_or_path}: merged into it, an adapter of one would change both"
        )
    return replace(model, module=module.eval())


def _below_adapters(model: LanguageModel | Scorer, config: LoraFields) -> str:
    """The model that new adapters name as their base. One that other adapters made is written whole: transformers and
    peft would load those others in place of the new ones, without a word."""
    path = model.module.name_or_path
    if not isinstance(model, LanguageModel) or model.device.type == "meta" or not (Path(path) / ADAPTER).is_file():
        return path
    # Named by the adapters: a run that is refused later must not change what an earlier one's final/ stands on.
    content = b"".join(file.read_bytes() for file in sorted(Path(path).glob("adapter_*")))
    merged = Path(config.output_dir) / f"merged_base_{hashlib.sha256(content).hexdigest()[:8]}"
    save(model, merged)
    return str(merged)


def peft():
    try:
        import peft
    except ImportError as error:
        raise UsageError("adapters need peft: pip install peft") from error
    return peft


def value_on_trunk(policy: LanguageModel) -> Scorer:
    """A scorer that shares the policy's trunk; its head is zero."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(policy.module.config)
    config.num_labels = 1
    with torch.device("meta"):
        module = AutoModelForSequenceClassification.from_config(config)
    setattr(module, module.base_model_prefix, shared_copy(policy.module.base_model))
    module.score = nn.Linear(module.score.in_features, 1, bias=False, device=policy.device)
    nn.init.zeros_(module.score.weight)
    return Scorer(module.eval(), *(getattr(policy, f.name) for f in fields(policy)[1:]))


def save(model: LanguageModel | Scorer, path: Path) -> None:
    """As transformers and vLLM load it. Sampling options of the base model are left out: training made them stale."""
    from transformers import GenerationConfig

    if isinstance(model, LanguageModel):
        # of a model with adapters these are all that is written, and their configuration names the base
        model.module.generation_config = GenerationConfig(
            bos_token_id=model.tokenizer.bos_token_id,
            eos_token_id=list(model.eos_ids) or None,
            pad_token_id=model.pad_id,
        )
    model.module.save_pretrained(path)
    if isinstance(model, Scorer):  # beside adapters, too: the normalisation of scores stands there
        model.module.config.save_pretrained(path)
    model.tokenizer.save_pretrained(path)


def same_vocabulary(a: LanguageModel | Scorer, b: LanguageModel | Scorer) -> bool:
    return a.tokenizer.get_vocab() == b.tokenizer.get_vocab()


def check_context(model: LanguageModel | Scorer, length: int, fields: str) -> None:
    limit = getattr(model.module.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        name = model.module.name_or_path
        raise ModelError(f"{fields}: {length} tokens are more than the {limit} positions of {name}")


def _special(module: nn.Module, tokenizer) -> tuple[tuple[int, ...], int]:
    """(every id that ends a text, by the tokenizer, the generation configuration and the configuration; vocab_size)"""
    vocab_size = min(max(tokenizer.get_vocab().values()) + 1, module.get_input_embeddings().num_embeddings)
    ids = []
    for source in (tokenizer, getattr(module, "generation_config", None), module.config.get_text_config()):
        found = getattr(source, "eos_token_id", None)
        ids += found if isinstance(found, list) else [] if found is None else [found]
    return tuple(i for i in dict.fromkeys(ids) if i < vocab_size), vocab_size


def _check_directory(path: str) -> None:
    beside_existing = "/" in path and Path(path).parent.exists()  # a mistyped directory, not a hub id
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists() or beside_existing
    if looks_local and not any((Path(path) / name).is_file() for name in ("config.json", ADAPTER)):
        problem = "has no config.json" if Path(path).is_dir() else "no such directory"
        raise ModelError(f"{path}: not a model directory: {problem}")


def _load(loader, path: str, model: nn.Module | None = None, **options):
    try:
        return loader(*([] if model is None else [model]), path, local_files_only=Path(path).is_dir(), **options)
    except Exception as error:  # a damaged or foreign directory raises the types of five libraries
        reason = " ".join(str(error).split())
        raise ModelError(f"{path}: cannot be loaded: {reason}") from error


def _load_module(auto_class, path: str, config: RunConfig, **options) -> tuple[nn.Module, set[str]]:
    """The model and the names of the weights it had to make up. In a dry run it is built from config.json alone, on
    the meta device. A directory of adapters gives the model that they make: merged into the weights of their base."""
    dry, adapter = getattr(config, "dry_run", False), Path(path) / ADAPTER
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        _check_directory(base)
        module, missing = _load_module(auto_class, base, config, **options)
        settings = _load(peft().PeftConfig.from_pretrained, path)
        whole = tuple(f"{name}." for name in settings.modules_to_save or ())
        missing = {name for name in missing if not name.startswith(whole)}
        for name in SCORING:
            if hasattr(saved := _saved_config(path), name):
                setattr(module.config, name, getattr(saved, name))
        if dry:
            return module, missing
        settings.task_type = None  # of a policy's adapters it would refuse the scorer that is begun from them
        module = _load(peft().PeftModel.from_pretrained, path, model=module, config=settings).merge_and_unload()
        module.name_or_path = path
        return module.requires_grad_(True), missing  # peft froze it
    if dry:
        from transformers import AutoConfig

        described = _load(AutoConfig.from_pretrained, path, **options)
        with torch.device("meta"):
            return auto_class.from_config(described, dtype=torch.float32, **_attention(path)), set()
    options |= {"dtype": torch.float32, "output_loading_info": True, **_attention(path)}
    module, info = _load(auto_class.from_pretrained, path, **options)
    return module, set(info["missing_keys"])


def _refuse_missing(path: str, names: set[str]) -> None:
    if names:
        raise ModelError(f"{path}: has no weights for {', '.join(sorted(names))[:200]}: is it a model of another kind?")


def _attention(path: str) -> dict[str, str]:
    """Eager attention where scores are capped: sdpa drops the softcap of Gemma 2 without a word."""
    from transformers import AutoConfig

    config = _load(AutoConfig.from_pretrained, path).get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def _init_head(head: nn.Linear, kind: str, seed: int) -> None:
    with torch.no_grad():
        head.weight.zero_()
        if kind == "random":
            noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
            head.weight.copy_(noise / (head.in_features + 1) ** 0.5)
