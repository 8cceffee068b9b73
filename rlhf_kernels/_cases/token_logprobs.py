"""Cases of token_logprobs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..ops.token_logprobs import token_logprobs
from ..testing import OpCase
from .inputs import logits


def _token_logprobs(logits, token_ids, temperature=1.0, **options):
    out = token_logprobs(logits, token_ids, temperature=temperature, **options)
    return out if isinstance(out, tuple) else (out,)


def token_logprobs_oracle(logits, token_ids, temperature=1.0, softcap=None, return_entropy=False):
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    every = torch.log_softmax(z.clamp(min=max(torch.finfo(z.dtype).min, -1e9)), -1)
    ignored = token_ids == -100
    chosen = every.gather(-1, token_ids.long().masked_fill(ignored, 0)[..., None])[..., 0].masked_fill(ignored, 0)
    entropy = -(every.exp() * every).sum(-1).masked_fill(ignored, 0)
    return (chosen, entropy) if return_entropy else (chosen,)


def _logprob_case(
    name: str,
    large: bool = False,
    values_only: bool = False,
    temperature=1.0,
    softcap=None,
    return_entropy=True,
    **inputs,
) -> OpCase:
    options = {"softcap": softcap, "return_entropy": return_entropy}
    if not inputs.get("temperatures"):
        options["temperature"] = temperature
    return OpCase(
        "token_logprobs", name, partial(logits, **inputs),
        partial(_token_logprobs, **options), partial(token_logprobs_oracle, **options),
        learned=("logits",), row_major=("logits",), large=large, values_only=values_only,
    )  # fmt: skip


TOKEN_LOGPROBS = [
    _logprob_case("entropy", rows=(2, 3), vocab=17),
    _logprob_case("everything", rows=(2, 3), vocab=19, softcap=5.0, ignored=True, temperatures=True),
    _logprob_case("logprobs_alone", rows=(5,), vocab=33, temperature=0.7, return_entropy=False),
    _logprob_case("no_tokens", rows=(0,), vocab=7),
    _logprob_case("vocab_1", rows=(4,), vocab=1, values_only=True),
    _logprob_case("vocab_7_int32_ids", rows=(1, 3), vocab=7, ids=torch.int32, ignored=True, values_only=True),
    _logprob_case("minus_inf", minus_inf=True, ignored=True, values_only=True),
    _logprob_case("offset_plus", vocab=1000, offset=1e4, values_only=True),
    _logprob_case("offset_minus", vocab=1000, offset=-1e4, temperature=1.3, values_only=True),
    _logprob_case("peaked", vocab=4099, scale=40.0, values_only=True),
    _logprob_case("softcap_30", vocab=4097, scale=40.0, softcap=30.0, values_only=True),
    _logprob_case("vocab_32000", rows=(3,), vocab=32000, temperatures=True, values_only=True),
    *(
        _logprob_case(f"vocab_{v}_rows_{n}", True, rows=(n,), vocab=v, ignored=True)
        for v in (32000, 50257, 128257, 151936)
        for n in (1, 33)
    ),
    _logprob_case("vocab_151936_softcap", True, rows=(9,), vocab=151936, softcap=30.0, temperatures=True, offset=1e4),
]
