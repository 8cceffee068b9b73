"""linear_token_logprobs and token_logprobs beside TRL's, Liger's and torch's own. Peers are imported where they run."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from peers_compare import Function, Values, case, compare, head, plain, plain_logits

import rlhf_kernels


def ours_linear(hidden, weight, bias=None, *, ids, **options) -> Values:
    found = rlhf_kernels.linear_token_logprobs(hidden, weight, ids, bias=bias, return_entropy=True, **options)
    return dict(zip(("logprobs", "entropy"), found))


def only(name: str, function: Function, **options) -> Function:
    return lambda **inputs: {name: function(**inputs, **options)[name]}


@case("trl-selective-log-softmax", 1.0)
@case("trl-selective-log-softmax-temperature", 0.7)
def selective_log_softmax(temperature):
    from trl.trainer.utils import selective_log_softmax

    inputs, ids = head(33, 16, 1000)
    ids[[3, 17]] = -100
    shaping = {"ids": ids, "temperature": temperature}

    def ours(logits):
        return {"logprobs": rlhf_kernels.token_logprobs(logits, ids, temperature=temperature)}

    def peer(logits):
        return {"logprobs": selective_log_softmax(logits, ids.clamp(min=0), temperature, row_mask=ids != -100)}

    return compare(
        {"logits": inputs["hidden"] @ inputs["weight"].T}, only("logprobs", plain_logits, **shaping), ours, peer
    )


@case("trl-selective-log-softmax-and-entropy", 1.0)
@case("trl-selective-log-softmax-and-entropy-temperature", 1.3)
def selective_log_softmax_and_entropy(temperature):
    from trl.trainer.utils import selective_log_softmax_and_entropy

    inputs, ids = head(33, 16, 1000)
    ids[[0, 32]] = -100

    def ours(logits):
        found = rlhf_kernels.token_logprobs(logits, ids, temperature=temperature, return_entropy=True)
        return dict(zip(("logprobs", "entropy"), found))

    def peer(logits):
        found = selective_log_softmax_and_entropy(logits, ids.clamp(min=0), True, temperature, ids != -100)
        return dict(zip(("logprobs", "entropy"), found))

    oracle = partial(plain_logits, ids=ids, temperature=temperature)
    return compare({"logits": inputs["hidden"] @ inputs["weight"].T}, oracle, ours, peer)


@case("trl-chunked-logprob", 16, 127, False, {})
@case("trl-chunked-logprob-bias", 64, 1000, True, {})
@case("trl-chunked-logprob-temperature", 16, 1000, False, {"temperature": 0.7})
@case("trl-chunked-logprob-softcap", 32, 127, False, {"softcap": 5.0})
@case("trl-chunked-logprob-scale", 32, 127, True, {"logit_scale": 0.125})
@case("trl-chunked-logprob-all", 64, 1000, True, {"temperature": 1.3, "softcap": 5.0, "logit_scale": 2.0})
def chunked_logprob(width, vocab, bias, options):
    """Tiles of 100 columns: the last one is ragged in both vocabularies."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    inputs, ids = head(33, width, vocab, bias)

    def peer(hidden, weight, bias=None):
        shaping = (options.get("temperature", 1.0), 100, options.get("softcap"), options.get("logit_scale", 1.0))
        found = ChunkedLogProbFunction.apply(hidden, weight, bias, ids, *shaping, ("entropy",))
        return dict(zip(("logprobs", "entropy"), found[:2]))

    return compare(inputs, partial(plain, ids=ids, **options), partial(ours_linear, ids=ids, **options), peer)


@case("trl-chunked-logprob-without-entropy")
def chunked_logprob_alone():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    inputs, ids = head(33, 16, 1000)

    def ours(hidden, weight):
        return {"logprobs": rlhf_kernels.linear_token_logprobs(hidden, weight, ids)}

    def peer(hidden, weight):
        return {"logprobs": ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, 300, None, 1.0, ())[0]}

    return compare(inputs, only("logprobs", plain, ids=ids), ours, peer)


@case("liger-linear-scaled-ce", 16, 1000, 1.0)
@case("liger-linear-scaled-ce-temperature", 64, 127, 0.7)
def scaled_cross_entropy(width, vocab, temperature):
    """Its first output is the negative log-probability; it has neither bias nor softcap."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    inputs, ids = head(33, width, vocab)
    ids[[5, 6, 30]] = -100

    def peer(hidden, weight):
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, ids, temperature, -100, 1, True)
        return {"logprobs": -found[0], "entropy": found[1]}

    shaping = {"ids": ids, "temperature": temperature}
    return compare(inputs, partial(plain, **shaping), partial(ours_linear, **shaping), peer)


@case("torch-linear-cross-entropy-none", False, "none")
@case("torch-linear-cross-entropy-chunked-sum", True, "sum")
@case("torch-linear-cross-entropy-chunked-mean", True, "mean")
def linear_cross_entropy(chunked, reduction):
    inputs, ids = head(33, 16, 1000, bias=True)
    ids[[2, 9]] = -100
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=8, acc_policy="accurate") if chunked else None
    reduce = {"none": lambda x: x, "sum": torch.sum, "mean": lambda x: x.sum() / (ids != -100).sum()}[reduction]

    def reduced(function):
        return lambda **leaves: {"loss": reduce(-function(**leaves, ids=ids)["logprobs"])}

    def peer(hidden, weight, bias):
        loss = F.linear_cross_entropy(hidden, weight, ids, linear_bias=bias, reduction=reduction, options=options)
        return {"loss": loss}

    return compare(inputs, reduced(plain), reduced(ours_linear), peer)
