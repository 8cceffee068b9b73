"""Cases that differentiate one formula three times: `oracle`, written plainly and run in float64, `ours` and `peer`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Values = dict[str, Tensor]
Function = Callable[..., Values]
CASES: dict[str, Callable[[], dict]] = {}


def case(name: str, *arguments):
    """Registers a function that compares, as a case with these arguments."""

    def register(function):
        CASES[name] = partial(function, *arguments)
        return function

    return register


def differentiate(function: Function, inputs: Values, dtype: torch.dtype) -> Values:
    """Its outputs, and gradients of the inputs for a fixed upstream gradient, which is not 1."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    outputs = function(**leaves)
    total = [(x * torch.linspace(2, -1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs.values()]
    grads = torch.autograd.grad(sum(t for t in total if t.requires_grad), list(leaves.values()))
    return {name: x.detach() for name, x in outputs.items()} | {f"d_{n}": g for n, g in zip(leaves, grads)}


def compare(inputs: Values, oracle: Function, ours: Function, peer: Function, differs: Function | None = None) -> dict:
    """`differs` is what our op of the same name gives, where the peer's definition is another; `ours` maps it."""
    truth = differentiate(oracle, inputs, torch.float64)
    found = {
        name: differentiate(function, inputs, torch.float32) for name, function in (("ours", ours), ("peer", peer))
    }
    figures = {
        name: {"scale": float(truth[name].abs().max())}
        | {who: float((values[name].double() - truth[name]).abs().max()) for who, values in found.items()}
        for name in found["peer"]
    }
    if differs:
        loss = differentiate(differs, inputs, torch.float32)["loss"]
        figures["loss"]["gap"] = float((loss - found["peer"]["loss"]).abs())
    return figures


# Log-probabilities of tokens


def head(rows: int, width: int, vocab: int, bias: bool = False) -> tuple[Values, Tensor]:
    """(hidden, weight and bias with logits of deviation 3, token ids)"""
    torch.manual_seed(0)
    inputs = {"hidden": torch.randn(rows, width), "weight": 3 * torch.randn(vocab, width) / width**0.5}
    inputs |= {"bias": torch.randn(vocab)} if bias else {}
    return inputs, torch.randint(0, vocab, (rows,))


def plain(hidden, weight, bias=None, *, ids, temperature=1.0, softcap=None, logit_scale=1.0) -> Values:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return plain_logits(logits * logit_scale, ids=ids, temperature=temperature, softcap=softcap)


def plain_logits(logits, *, ids, temperature=1.0, softcap=None) -> Values:
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logp = torch.log_softmax(logits / temperature, -1)
    counted = ids != -100
    picked = logp.gather(-1, ids.where(counted, 0)[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return {"logprobs": torch.where(counted, picked, 0.0), "entropy": torch.where(counted, entropy, 0.0)}
