"""Cases of linear_token_logprobs and linear_ppo_loss: the oracle projects everything and differentiates through it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..ops.linear_ppo_loss import linear_ppo_loss
from ..ops.linear_token_logprobs import linear_token_logprobs
from ..ops.ppo_loss import PPOLossOptions
from ..stats import PPO_FIELDS
from ..testing import OpCase
from .inputs import LAYOUTS, tokens
from .ppo_loss import ppo_loss_oracle
from .token_logprobs import token_logprobs_oracle


def head(generator, shape, vocab, width, offset=0.0, scale=1.0, bias=False) -> dict[str, Tensor]:
    """Hidden states and a head whose logits are N(offset, scale^2), the offset common to all."""
    hidden = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * scale / width**0.5
    if offset:
        hidden[..., 0], weight[:, 0] = 8.0, offset / 8
    out = {"hidden": hidden, "weight": weight}
    return out | ({"bias": torch.randn(vocab, generator=generator, dtype=torch.float64)} if bias else {})


def head_logits(hidden, weight, bias=None, logit_scale=1.0) -> Tensor:
    """As a model computes them: in the wider dtype of the two, rounded to it."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).transpose(-1, -2)
    return logit_scale * (logits if bias is None else logits + bias.to(dtype))


# --- linear_token_logprobs ------------------------------------------------------------------------------------------


def _scoring_inputs(
    generator, shape=(2, 3), vocab=19, width=8, ignored=False, temperatures=False, ids=torch.int64, **options
):
    out = head(generator, shape, vocab, width, **options)
    out["token_ids"] = torch.randint(0, vocab, shape, generator=generator).to(ids)
    if ignored:
        out["token_ids"].masked_fill_(torch.rand(shape, generator=generator) < 0.4, -100)
    if temperatures:
        out["temperature"] = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    return out


def _linear_token_logprobs(hidden, weight, token_ids, **options):
    out = linear_token_logprobs(hidden, weight, token_ids, **options)
    return out if isinstance(out, tuple) else (out,)


def _linear_token_logprobs_oracle(hidden, weight, token_ids, bias=None, logit_scale=1.0, chunk_size=None, **options):
    logits = head_logits(hidden, weight, bias, logit_scale)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # NaN in an ignored row would reach the weight through autograd's products.
    logits = logits.masked_fill((token_ids == -100)[..., None], 0)
    return token_logprobs_oracle(logits, token_ids, **options)


def _scoring_case(name, large=False, values_only=False, return_entropy=True, **inputs) -> OpCase:
    options = {"return_entropy": return_entropy}
    for key in ("temperature", "softcap", "logit_scale", "chunk_size"):
        if key in inputs:
            options[key] = inputs.pop(key)
    learned = ("hidden", "weight", "bias") if inputs.get("bias") else ("hidden", "weight")
    return OpCase(
        "linear_token_logprobs", name, partial(_scoring_inputs, **inputs),
        partial(_linear_token_logprobs, **options), partial(_linear_token_logprobs_oracle, **options),
        learned=learned, large=large, values_only=values_only,
        # float64 is judged against itself, and there an offset leaves no digit to spare.
        dtypes=OpCase.dtypes[:3] if inputs.get("offset") else OpCase.dtypes,
    )  # fmt: skip


GRID = [
    _scoring_case(f"vocab_{v}_tokens_{n}_hidden_{h}", values_only=True, shape=(n,), vocab=v, width=h, ignored=n == 17)
    for v in (1, 7, 127, 50257)
    for n in (0, 1, 3, 17)
    for h in (8, 64, 65)
]
HARD = {"offset": {"offset": 1e4}, "peaked": {"scale": 40.0}}
LARGE_GRID = [
    _scoring_case(f"large_vocab_{v}_tokens_{n}_hidden_{h}", large=True, shape=(n,), vocab=v, width=h, ignored=n == 1025)
    for v, n, h in ((32000, 1025, 64), (50257, 129, 513), (128257, 1025, 65), (151937, 33, 512), (151937, 1025, 513))
]

LINEAR_TOKEN_LOGPROBS = [
    _scoring_case("entropy"),
    _scoring_case(
        "everything", vocab=17, softcap=5.0, bias=True, logit_scale=0.7, ignored=True, temperatures=True, chunk_size=2
    ),
    _scoring_case("logprobs_alone", temperature=0.7, return_entropy=False, chunk_size=1),
    _scoring_case("int32_ids", ids=torch.int32, ignored=True, values_only=True),
    *GRID,
    *(_scoring_case(f"{k}_{v}", values_only=True, shape=(17,), vocab=v, width=64, **o)
      for k, o in HARD.items() for v in (127, 50257)),
    _scoring_case("offset_bias", values_only=True, shape=(17,), vocab=1000, width=64, offset=1e4, bias=True),
    *LARGE_GRID,
    *(_scoring_case(f"large_{k}", large=True, shape=(257,), vocab=50257, width=64, **o) for k, o in HARD.items()),
]  # fmt: skip


# --- linear_ppo_loss ------------------------------------------------------------------------------------------------


def _loss_inputs(generator, vocab=19, width=8, ref=True, weights=False, bias=False, denominator=None, **layout):
    names = ["old_logprobs", "advantages"] + ["ref_logprobs"] * ref + ["is_weights"] * weights
    out = tokens(generator, names, **layout)
    shape = out["advantages"].shape
    out |= head(generator, shape, vocab, width, bias=bias)
    out["token_ids"] = torch.randint(0, vocab, shape, generator=generator)
    logits = head_logits(out["hidden"], out["weight"], out.get("bias"))
    (logprobs,) = token_logprobs_oracle(logits, out["token_ids"])
    for name in ("old_logprobs", "ref_logprobs"):
        if name in out:  # ratios of about 1, as in training
            out[name] = logprobs + 0.25 * out[name]
    if denominator is not None:
        out["denominator"] = torch.tensor(denominator, dtype=torch.float64)
    return out


def _linear_ppo_loss(options, extra, **inputs):
    loss, stats, logprobs = linear_ppo_loss(options=options, **extra, **inputs)
    return loss, torch.stack([getattr(stats, name) for name in PPO_FIELDS if name != "units"]), logprobs


def _linear_ppo_loss_oracle(options, extra, hidden, weight, token_ids, bias=None, mask=None, **inputs):
    counted = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    logits = head_logits(hidden, weight, bias, extra.get("logit_scale", 1.0))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits.masked_fill(~counted[..., None], 0)
    shaping = {k: v for k, v in extra.items() if k in ("temperature", "softcap")}
    logprobs, entropy = token_logprobs_oracle(logits, token_ids, return_entropy=True, **shaping)
    return *ppo_loss_oracle(options, logprobs, mask=mask, entropy=entropy, **inputs), (logprobs * counted).detach()


def _loss_case(
    name, layout, values_only=True, ref=True, weights=False, bias=False, denominator=None, extra=None, **options
) -> OpCase:
    options = PPOLossOptions(**{"entropy_coef": 0.01, "kl_coef": 0.1 * ref, "clip_high": 0.28, **options})
    inputs = {"ref": ref, "weights": weights, "denominator": denominator, "bias": bias}
    return OpCase(
        "linear_ppo_loss", name, partial(_loss_inputs, **inputs, **layout),
        partial(_linear_ppo_loss, options, extra or {}), partial(_linear_ppo_loss_oracle, options, extra or {}),
        learned=("hidden", "weight", "bias") if bias else ("hidden", "weight"), values_only=values_only,
    )  # fmt: skip


EVERYTHING = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5, "chunk_size": 3}
LINEAR_PPO_LOSS = [
    *(_loss_case(name, layout, extra={"chunk_size": 7}, values_only=name not in ("right_padded", "no_sequences"))
      for name, layout in LAYOUTS.items() if name not in ("long", "many")),
    _loss_case("everything", {"shape": (2, 4)}, values_only=False, weights=True, bias=True, denominator=7.0,
               dual_clip=1.1, log_ratio_clamp=0.3, kl_clamp=0.2, extra=EVERYTHING),
    _loss_case("policy_alone", LAYOUTS["gaps"], ref=False, entropy_coef=0.0),
    *(_loss_case(f"{reduction}_{layout}", LAYOUTS[layout], reduction=reduction, kl_estimator=k, extra={"chunk_size": 5})
      for reduction, k in (("seq_mean_token_sum", "k2"), ("seq_mean_token_mean", "abs"), ("sum", "k3+"))
      for layout in ("gaps", "packed_gaps", "all_masked")),
    _loss_case("seq_mean_denominator", LAYOUTS["packed_gaps"], reduction="seq_mean_token_mean", denominator=9.0),
]  # fmt: skip
