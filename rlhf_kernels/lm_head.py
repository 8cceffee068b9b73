"""What the ops on hidden states need of a language model: its decoder, its head's weight and what follows the product.

    logits = cap(logit_scale * (hidden @ weight.T + bias)),   cap(x) = softcap * tanh(x / softcap), or x

A config does not say which of its numbers scales or caps the logits, nor how: Granite divides by `logits_scaling`,
HyperCLOVAX multiplies by it, MiniCPM3 divides the head's input. So each is tried, and what reproduces the model's own
logits is taken. Of transformers, which is not imported, `get_decoder()` and `get_output_embeddings()` are needed.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrize import is_parametrized

from ._checks import FLOATS

DROPPED = {"labels", "logits_to_keep", "num_logits_to_keep", "output_router_logits", "return_dict"}  # other outputs
NUMBERS = re.compile("(cap|capping|scale|scaling|multiplier)$|logit|^hidden_size$")  # what may cap or scale logits
TOKENS = (2, 4)
TOLERANCE, ROUNDINGS = 1e-4, 2  # of the largest logit, or in the coarsest dtype on the way, where that is more
LARGE = 200.0  # the largest logit of the runs that show a softcap, or four times the config's largest cap if more


class _Unfit(Exception):
    """Why the head is not to be fused."""


@dataclass(frozen=True)
class LMHead:
    """The head of a causal language model, from lm_head_of. weight and bias are read from the module at each access."""

    decoder: nn.Module | None = field(repr=False)
    module: nn.Linear | None
    softcap: float | None = None
    logit_scale: float = 1.0
    reason: str | None = None  # why the head is not to be fused
    foreign: frozenset[str] = field(default=frozenset(), repr=False)  # arguments that the model takes, the decoder not
    caches: bool = field(default=False, repr=False)  # the decoder takes use_cache

    @property
    def fused(self) -> bool:
        return self.reason is None

    @property
    def weight(self) -> Tensor | None:  # (V, H)
        return getattr(self.module, "weight", None)

    @property
    def bias(self) -> Tensor | None:  # (V,)
        return getattr(self.module, "bias", None)

    def options(self) -> dict:
        """bias, softcap and logit_scale: keyword arguments of the ops on hidden states."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def hidden(self, **inputs) -> Tensor:  # (B, T, H)
        """The decoder's last hidden states for the model's arguments; those for its logits alone are dropped, and the
        cache is off unless asked for. The model's own forward, with its hooks, is not called: under FSDP2 call this
        inside the root's. RuntimeError if not fused; ValueError for what the decoder would not heed, such as images."""
        if not self.fused:
            raise RuntimeError(f"hidden: expected a head to fuse, got: {self.reason}; use the model's logits")
        if unheeded := sorted(self.foreign & inputs.keys()):
            raise ValueError(f"hidden: expected what the decoder takes, got {unheeded}: use the model's logits")
        inputs = {name: value for name, value in inputs.items() if name not in DROPPED}
        if self.caches:
            inputs.setdefault("use_cache", False)
        output = self.decoder(**inputs)
        return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


def lm_head_of(model: nn.Module) -> LMHead:
    """The head of a causal language model of transformers, checked against the model's own logits:

        head = lm_head_of(model)
        if head.fused:
            hidden = head.hidden(input_ids=ids, attention_mask=mask)
            logprobs = linear_token_logprobs(hidden[:, :-1], head.weight, ids[:, 1:], **head.options())

    or, with `reason`, one that is not to be fused: adapters on the head, quantised, parametrized or sharded weights, or
    whatever else makes the model's logits differ from the formula. PEFT adapters below the head stay active.

    Runs the model four times on 8 tokens, twice with the head's input enlarged (a softcap hides in small logits), in
    eval mode without grad; modes, random states, gradients and hooks are then as before. Probe before sharding or
    compiling, and again after replacing modules. What the model does in train mode alone is not seen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, a causal language model, got {type(model).__name__}")
    model, head = getattr(model, "_orig_mod", model), LMHead(None, None)
    try:
        base, head = _find(model)
        _check(head.module)
        with _undisturbed(model):
            return _verify(model, base, head)
    except _Unfit as refusal:
        return replace(head, reason=str(refusal))
    except Exception as error:
        return replace(head, reason=f"the model could not be run on 8 tokens: {type(error).__name__}: {error!s:.300}")


def _arguments(module: nn.Module) -> frozenset[str]:
    found = inspect.signature(module.forward).parameters.values()
    return frozenset(p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _find(model: nn.Module) -> tuple[nn.Module, LMHead]:
    """The model below PEFT, and its parts. Types are asked, because some wrappers forward every attribute."""
    base = model.get_base_model() if hasattr(type(model), "get_base_model") else model
    kind = type(base).__name__
    if kind == "FullyShardedDataParallel":
        raise _Unfit(f"{kind} holds flattened shards, of which the head is a part: use fully_shard (FSDP2)")
    if not hasattr(type(base), "get_decoder") or not hasattr(type(base), "get_output_embeddings"):
        if "module" in base._modules:
            raise _Unfit(f"{kind} wraps the model: pass model.module, and reduce the gradients yourself")
        raise _Unfit(f"{kind} has no get_decoder() and get_output_embeddings(), which causal models have")
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise _Unfit(f"{kind} is an encoder-decoder: its decoder's hidden states need those of the encoder")
    decoder, module = base.get_decoder(), base.get_output_embeddings()
    if decoder in (None, base, model):
        raise _Unfit(f"{kind}.get_decoder() gives no part of the model")
    if own := [name for name, _ in base.named_parameters(recurse=False)]:
        raise _Unfit(f"{kind} has parameters of its own, which may act on the logits: {', '.join(own)}")
    known = _arguments(decoder)
    return base, LMHead(decoder, module, foreign=_arguments(base) - known - DROPPED, caches="use_cache" in known)


def _check(module: nn.Module | None) -> None:
    """Refuses a head that is not a plain product with a weight that can be read."""
    weight = getattr(module, "weight", None)
    if type(weight).__name__ == "DTensor":
        raise _Unfit("the head's weight is a DTensor, a shard: unshard() or wrap it with the final norm, after probing")
    if module is not None and is_parametrized(module):
        raise _Unfit("the head is parametrized (torch.nn.utils.parametrize): its weight is computed at each call")
    if type(module) is not nn.Linear:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise _Unfit(f"the head is a {kind}, not an nn.Linear: a weight is not all of it")
    if type(weight) is not nn.Parameter:
        raise _Unfit(f"the head's weight is a {type(weight).__name__}: weight norm, pruning or quantisation makes it")
    whole = (module.out_features, module.in_features)
    if weight.is_meta or weight.dtype not in FLOATS or weight.shape != whole:
        came = f"{tuple(weight.shape)}, {weight.dtype}, {weight.device}"
        raise _Unfit(f"the head's weight is {came}: expected floats of 16 to 64 bits, {whole}, loaded and gathered")


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without grad, then modes and random states as before. Flags are set, as some modules' train() acts."""
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}):
            for module in training:
                module.training = False
            yield
    finally:
        for module in training:
            module.training = True


def _candidates(base: nn.Module) -> list[tuple[float | None, float]]:
    """(softcap, scale) that the numbers of the config admit, the plainest first. Some are properties of it."""
    config = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcaps, scales = [None], [1.0]
    for name, value in [(n, getattr(c, n, None)) for c in (text, config) for n in dir(c) if NUMBERS.search(n)]:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            continue
        if name.endswith(("cap", "capping")):
            softcaps.append(float(value))
        else:
            scales += [float(value), 1 / value, value**-0.5]
    return list(product(dict.fromkeys(softcaps), dict.fromkeys(scales)))


def _inputs(base: nn.Module, head: LMHead, first: int) -> dict[str, Tensor]:
    """Ids from `first` on, modulo the vocabulary, and of the usual arguments those that both forwards name."""
    embeddings = getattr(base, "get_input_embeddings", lambda: None)()
    vocab = min(head.weight.shape[0], getattr(embeddings, "num_embeddings", math.inf))
    ids = (torch.arange(first, first + math.prod(TOKENS), device=head.weight.device) % vocab).view(TOKENS)
    positions = torch.arange(TOKENS[1], device=ids.device).expand(TOKENS)
    usual = {"attention_mask": torch.ones_like(ids), "position_ids": positions, "use_cache": False}
    named = _arguments(base) & _arguments(head.decoder)
    return {"input_ids": ids, **{name: value for name, value in usual.items() if name in named}}


class _Run:
    """The model's logits where its head's input is multiplied by `factor`, beside the product that we would make."""

    def __init__(self, model: nn.Module, head: LMHead, inputs: dict, hidden: Tensor, factor: float = 1.0) -> None:
        taken = []

        def enlarge(_, args):
            taken.append(args[0])
            return args[0] * factor

        with head.module.register_forward_pre_hook(enlarge):
            output = model(**inputs)
        if not taken:
            raise _Unfit("the model's forward does not call its output embeddings: nothing tells what it does instead")
        logits = output.logits if hasattr(output, "logits") else output if isinstance(output, Tensor) else output[0]
        ours = linear(hidden.to(head.weight.dtype) * factor, head.weight, head.bias)
        if logits.shape != ours.shape:
            raise _Unfit(f"the model's logits have the shape {tuple(logits.shape)}, its head's {tuple(ours.shape)}")
        self.ours, self.logits, self.largest = ours.float(), logits.float(), logits.abs().max().item()
        if not 0 < self.largest < math.inf:
            raise _Unfit(f"the model's largest logit is {self.largest}: there is nothing to compare")
        self.tolerance = max(TOLERANCE, ROUNDINGS * max(torch.finfo(x.dtype).eps for x in (hidden, ours, logits)))
        self.moved = taken[0].shape != hidden.shape or not torch.allclose(taken[0].to(hidden), hidden, rtol=1e-3)


def _agreement(runs: list[_Run], softcap: float | None, scale: float) -> tuple[int, float]:
    """(minus the runs that agree before one that does not, its largest difference as a part of its largest logit)."""
    errors = []
    for run in runs:
        logits = run.ours * scale if softcap is None else softcap * torch.tanh(run.ours * (scale / softcap))
        errors.append((logits - run.logits).abs().max().item() / run.largest)
        if not errors[-1] <= run.tolerance:
            return 1 - len(errors), errors[-1]
    return -len(runs), max(errors)


def _verify(model: nn.Module, base: nn.Module, head: LMHead) -> LMHead:
    """The head with the softcap and scale that give the model's logits, small ones and large ones."""
    candidates, runs = _candidates(base), []
    target = max(LARGE, 4 * max(softcap or 0 for softcap, _ in candidates))
    for first in (0, math.prod(TOKENS)):
        inputs = _inputs(base, head, first)
        hidden = head.hidden(**inputs)
        came = f"{tuple(hidden.shape)} on {hidden.device}"
        if came != (expected := f"{(*TOKENS, head.weight.shape[1])} on {head.weight.device}"):
            raise _Unfit(f"the decoder gives {came}, its head takes {expected}")
        plain = _Run(model, head, inputs, hidden)
        room = torch.finfo(head.weight.dtype).max / 4 / max(x.abs().max().item() for x in (plain.ours, hidden))
        runs += [plain, _Run(model, head, inputs, hidden, min(target / plain.largest, room))]
    found = min(candidates, key=lambda pair: _agreement(runs, *pair))
    agreed, error = _agreement(runs, *found)
    if -agreed == len(runs):
        return replace(head, softcap=found[0], logit_scale=found[1])
    run = runs[-agreed]
    reason = f"softcap {found[0]} and scale {found[1]:g}, differ by {error * run.largest:.3g} of {run.largest:.3g}"
    reason += "; small logits agree, large ones do not" * (agreed % 2)
    reason += "; the head's input is not the decoder's last hidden state" * run.moved
    raise _Unfit(f"no number of the config gives the model's logits: the nearest, {reason}")
