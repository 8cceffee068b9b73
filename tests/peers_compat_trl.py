"""rlhf_kernels.compat.trl beside the functions of TRL that it stands in for, called alike."""

from __future__ import annotations

from functools import partial

import torch
from peers_compare import Values, case, compare, head

from rlhf_kernels.compat import trl as compat

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def plain(hidden, weight, bias=None, *, ids, temperature=1.0, softcap=None, logit_scale=1.0) -> Values:
    z = (hidden @ weight.T + (0 if bias is None else bias)) * logit_scale
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logp = z.log_softmax(-1)
    return {
        "log_probs": logp.gather(-1, ids[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1).detach(),
        "mean_logits": z.mean(-1).detach(),
        "is_top1": (z.argmax(-1) == ids).to(z.dtype),
    }


@case("compat-trl-head", 16, 127, False, {})
@case("compat-trl-head-temperature", 16, 1000, False, {"temperature": 0.7})
@case("compat-trl-head-softcap", 32, 127, True, {"softcap": 5.0, "temperature": 1.3})
@case("compat-trl-head-all", 64, 1000, True, {"temperature": 1.3, "softcap": 5.0, "logit_scale": 2.0})
def chunked(width, vocab, bias, options):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    inputs, ids = head(33, width, vocab, bias)
    likely = (inputs["hidden"] @ inputs["weight"].T + inputs.get("bias", 0)).argmax(-1)
    ids[::3] = likely[::3]  # or hardly any would be the most likely token

    def called(function, hidden, weight, bias=None) -> Values:
        shaping = (options.get("temperature", 1.0), 100, options.get("softcap"), options.get("logit_scale", 1.0))
        found = dict(zip(OUTPUTS, function.apply(hidden, weight, bias, ids, *shaping, OUTPUTS[1:])))
        assert found["is_top1"].dtype == torch.bool
        return found | {"is_top1": found["is_top1"].to(hidden.dtype)}

    ours, peer = partial(called, compat.ChunkedLogProbFunction), partial(called, ChunkedLogProbFunction)
    return compare(inputs, partial(plain, ids=ids, **options), ours, peer)


def _logits() -> tuple[Values, torch.Tensor]:
    inputs, ids = head(34, 16, 300)
    return {"logits": (inputs["hidden"] @ inputs["weight"].T).view(2, 17, 300)}, ids.view(2, 17)


@case("compat-trl-selective-log-softmax", False, False)
@case("compat-trl-selective-log-softmax-masked", False, True)
@case("compat-trl-selective-log-softmax-top-k", True, False)
@case("compat-trl-selective-log-softmax-top-k-masked", True, True)
def selective_log_softmax(several, masked):
    from trl.trainer import utils

    inputs, ids = _logits()
    ids = torch.stack([ids, (ids + 7) % 300, ids.flip(1)], -1) if several else ids
    mask = (torch.arange(ids.numel()).view(ids.shape) % 4 > 0).int() if masked else None

    def called(function, logits) -> Values:
        return {"logprobs": function(logits, ids, 0.8, mask)}

    def oracle(logits) -> Values:
        logp = (logits / 0.8).log_softmax(-1)
        picked = logp.gather(-1, ids if several else ids[..., None])
        picked = picked if several else picked[..., 0]
        return {"logprobs": picked if mask is None else picked.masked_fill(mask == 0, 0)}

    ours, peer = compat.selective_log_softmax, utils.selective_log_softmax
    return compare(inputs, oracle, partial(called, ours), partial(called, peer))


@case("compat-trl-entropy")
def entropy():
    from trl.trainer import utils

    inputs, _ = _logits()

    def called(function, logits) -> Values:
        return {"entropy": function(logits, 5)}

    def oracle(logits) -> Values:
        logp = logits.log_softmax(-1)
        return {"entropy": -(logp.exp() * logp).sum(-1)}

    ours, peer = compat.entropy_from_logits, utils.entropy_from_logits
    return compare(inputs, oracle, partial(called, ours), partial(called, peer))


@case("compat-trl-both", True)
@case("compat-trl-both-entropy-without-gradient", False)
def both(with_gradient):
    from trl.trainer import utils

    inputs, ids = _logits()
    mask = torch.arange(34).view(2, 17) % 5 > 0

    def called(function, logits) -> Values:
        return dict(zip(("logprobs", "entropy"), function(logits, ids, with_gradient, 1.2, mask)))

    def oracle(logits) -> Values:
        logp = (logits / 1.2).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        found = logp.gather(-1, ids[..., None])[..., 0], entropy if with_gradient else entropy.detach()
        return dict(zip(("logprobs", "entropy"), (x.masked_fill(~mask, 0) for x in found)))

    ours, peer = compat.selective_log_softmax_and_entropy, utils.selective_log_softmax_and_entropy
    return compare(inputs, oracle, partial(called, ours), partial(called, peer))
