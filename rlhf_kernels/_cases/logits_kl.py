"""Cases of logits_kl and linear_kl: the oracle is the plain sum over log-probabilities."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..ops.linear_kl import linear_kl
from ..ops.logits_kl import logits_kl
from ..testing import OpCase
from .inputs import logits
from .linear import head, head_logits


def _oracle(policy, reference, mask=None, temperature=1.0, softcap=None, direction="reverse"):
    dtype = torch.float64 if torch.float64 in (policy.dtype, reference.dtype) else torch.float32
    logs = []
    for x in (policy, reference.detach()):
        x = x.to(dtype) if mask is None else x.to(dtype).masked_fill(~mask[..., None], 0)
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        x = x / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
        logs.append(torch.log_softmax(x.clamp(min=-1e9), -1))
    (p, q) = logs if direction == "reverse" else logs[::-1]
    kl = (p.exp() * (p - q)).sum(-1)
    return (kl if mask is None else kl.masked_fill(~mask, 0),)


# --- logits_kl ------------------------------------------------------------------------------------------------------


def _two_logits(generator, apart=0.5, masked=False, **inputs):
    out = logits(generator, **inputs)
    policy = out["logits"]
    noise = torch.randn(policy.shape, generator=generator, dtype=torch.float64)
    pair = {"logits": policy, "ref_logits": policy + apart * noise}
    if masked:
        pair["mask"] = torch.rand(policy.shape[:-1], generator=generator) < 0.6
    return pair | {k: v for k, v in out.items() if k == "temperature"}


def _logits_case(name, large=False, values_only=True, options=None, **inputs) -> OpCase:
    options = options or {}
    return OpCase(
        "logits_kl", name, partial(_two_logits, **inputs),
        lambda **x: (logits_kl(**x, **options),),
        lambda logits, ref_logits, **x: _oracle(logits, ref_logits, **x, **options),
        learned=("logits",), row_major=("logits", "ref_logits"), large=large, values_only=values_only,
    )  # fmt: skip


FORWARD = {"direction": "forward"}
LOGITS_KL = [
    _logits_case("reverse", values_only=False, rows=(2, 3), vocab=17),
    _logits_case("forward", values_only=False, rows=(5,), vocab=33, options=FORWARD),
    _logits_case("everything", values_only=False, rows=(2, 3), vocab=19, masked=True, temperatures=True,
                 options={"softcap": 5.0}),
    _logits_case("everything_forward", rows=(2, 3), vocab=19, masked=True, temperatures=True,
                 options={"softcap": 5.0} | FORWARD),
    _logits_case("no_tokens", values_only=False, rows=(0,), vocab=7),
    _logits_case("vocab_1", rows=(4,), vocab=1),
    _logits_case("minus_inf", minus_inf=True),
    _logits_case("minus_inf_forward", minus_inf=True, options=FORWARD),
    *(_logits_case(f"{k}_{d}", vocab=v, options={"direction": d}, **o)
      for d in ("reverse", "forward")
      for k, v, o in (("near", 1000, {"apart": 1e-3}), ("offset", 1000, {"offset": 1e4}),
                      ("peaked", 4099, {"scale": 40.0}), ("far", 127, {"apart": 30.0}), ("wide", 50257, {}))),
    *(_logits_case(f"large_{v}_{d}", True, rows=(17,), vocab=v, options={"direction": d})
      for v in (50257, 128257, 151937) for d in ("reverse", "forward")),
]  # fmt: skip


# --- linear_kl ------------------------------------------------------------------------------------------------------


def _two_heads(generator, shape=(2, 3), vocab=19, width=8, ref_width=None, apart=1.0, masked=False, bias=False, **hard):
    out = head(generator, shape, vocab, width, bias=bias, **hard)
    if ref_width is None:
        noise = torch.randn(out["weight"].shape, generator=generator, dtype=torch.float64) / width**0.5
        noise[:, 0] = 0
        other = {name: value.clone() for name, value in out.items()}
        other["weight"] += apart * noise
    else:
        other = head(generator, shape, vocab, ref_width, bias=bias, **hard)
    out |= {f"ref_{name}": value for name, value in other.items()}
    if masked:
        out["mask"] = torch.rand(shape, generator=generator) < 0.6
    return out


def _linear_oracle(hidden, weight, ref_hidden, ref_weight, bias=None, ref_bias=None, mask=None, **options):
    scale, ref_scale = options.pop("logit_scale", 1.0), options.pop("ref_logit_scale", 1.0)
    options.pop("chunk_size", None)
    policy, reference = (
        head_logits(hidden, weight, bias, scale),
        head_logits(ref_hidden, ref_weight, ref_bias, ref_scale),
    )
    return _oracle(policy, reference, mask, **options)


def _linear_case(name, large=False, values_only=True, options=None, **inputs) -> OpCase:
    options = options or {}
    return OpCase(
        "linear_kl", name, partial(_two_heads, **inputs),
        lambda **x: (linear_kl(**x, **options),), lambda **x: _linear_oracle(**x, **options),
        learned=("hidden", "weight", "bias") if inputs.get("bias") else ("hidden", "weight"),
        large=large, values_only=values_only,
        dtypes=OpCase.dtypes[:3] if inputs.get("offset") else OpCase.dtypes,
    )  # fmt: skip


EVERYTHING = {"softcap": 5.0, "temperature": 0.7, "logit_scale": 0.5, "ref_logit_scale": 0.6, "chunk_size": 2}
LINEAR_KL = [
    _linear_case("reverse", values_only=False),
    _linear_case("everything", values_only=False, vocab=17, ref_width=5, bias=True, masked=True, options=EVERYTHING),
    _linear_case("everything_forward", vocab=17, ref_width=5, bias=True, masked=True, options=EVERYTHING | FORWARD),
    _linear_case("no_tokens", values_only=False, shape=(0,)),
    *(_linear_case(f"vocab_{v}_tokens_{n}_hidden_{h}_{d}", shape=(n,), vocab=v, width=h, masked=n == 17,
                   options={"direction": d})
      for v, n, h in ((1, 3, 8), (7, 17, 64), (127, 17, 65), (50257, 3, 64)) for d in ("reverse", "forward")),
    _linear_case("offset", shape=(17,), vocab=1000, width=64, offset=1e4),
    _linear_case("peaked", shape=(17,), vocab=1000, width=64, scale=40.0),
    *(_linear_case(f"large_{d}", True, shape=(257,), vocab=50257, width=64, options={"direction": d})
      for d in ("reverse", "forward")),
]  # fmt: skip
