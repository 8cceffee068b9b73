"""Cases of the ops on per-token vectors: token_kl, gae, masked_whiten, ppo_advantages."""

from __future__ import annotations

from functools import partial

import torch

from ..ops.gae import gae
from ..ops.masked_whiten import masked_whiten
from ..ops.ppo_advantages import AdvantageOptions, ppo_advantages
from ..ops.token_kl import token_kl
from ..testing import OpCase
from .inputs import LAYOUTS, THOROUGH, sequences, tokens, two_logprobs

# --- token_kl -------------------------------------------------------------------------------------------------------


def kl_oracle(logprobs, ref_logprobs, estimator="k1", clamp=None):
    if logprobs.dtype in (torch.bfloat16, torch.float16):
        logprobs, ref_logprobs = logprobs.float(), ref_logprobs.float()
    x = logprobs - ref_logprobs
    x = x if clamp is None else x.clamp(-clamp, clamp)
    values = {"k1": x, "abs": x.abs(), "k2": x**2 / 2, "k3": torch.exp(-x) - 1 + x}
    value = values[estimator.removesuffix("+")]
    return (values["k2"] + (value - values["k2"]).detach() if estimator.endswith("+") else value,)


def _kl_case(estimator: str, clamp=None, **inputs) -> OpCase:
    options = {"estimator": estimator, "clamp": clamp}
    return OpCase(
        "token_kl", estimator + ("_clamped" if clamp else ""), partial(two_logprobs, **inputs),
        lambda **x: (token_kl(**x, **options),), partial(kl_oracle, **options),
        learned=("logprobs", "ref_logprobs"), values_only=estimator != "k3",
    )  # fmt: skip


TOKEN_KL = [
    *map(_kl_case, ("k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+")),
    _kl_case("k3", 0.2),
    _kl_case("k1", shape=(0, 3)),
]


# --- gae ------------------------------------------------------------------------------------------------------------


def _gae_oracle(rewards, values, mask=None, cu_seqlens=None, bootstrap_values=None, gamma=1.0, lam=0.95, gap="skip"):
    rewards, values = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (rewards, values))
    advantages, flat_v = torch.zeros_like(rewards).reshape(-1), values.reshape(-1)
    for b, index in enumerate(sequences(rewards, mask, cu_seqlens)):
        advantage = 0.0
        next_value = 0.0 if bootstrap_values is None else bootstrap_values[b].to(rewards.dtype)
        previous = None
        for t in reversed(index.tolist()):
            for _ in range(
                0 if previous is None or gap == "skip" else previous - t - 1
            ):  # gap="zero": steps of value and reward 0
                advantage, next_value = gamma * next_value + gamma * lam * advantage, 0.0
            delta = rewards.reshape(-1)[t] + gamma * next_value - flat_v[t]
            advantages[t] = advantage = delta + gamma * lam * advantage
            next_value, previous = flat_v[t], t
    advantages = advantages.view_as(rewards)
    counted = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    return advantages, torch.where(counted, advantages + values, 0)


def _gae_case(name, layout, bootstrap=False, values_only=True, offset=0.0, **options) -> OpCase:
    per_sequence = ("bootstrap_values",) if bootstrap else ()
    return OpCase(
        "gae", name, partial(tokens, names=("rewards", "values"), per_sequence=per_sequence, offset=offset, **layout),
        partial(gae, **options), partial(_gae_oracle, **options), values_only=values_only, tolerance=3e-6,
    )  # fmt: skip


GAE = [
    *(_gae_case(name, layout, values_only=name not in THOROUGH) for name, layout in LAYOUTS.items()),
    _gae_case("bootstrap_gaps_zero", LAYOUTS["gaps"], bootstrap=True, gap="zero", gamma=0.97, lam=0.9),
    _gae_case("bootstrap_packed_zero", LAYOUTS["packed_gaps"], bootstrap=True, gap="zero", gamma=0.97),
    _gae_case("bootstrap_right_padded", LAYOUTS["right_padded"], bootstrap=True, gamma=0.99, lam=1.0),
    _gae_case("lam_0", LAYOUTS["gaps"], lam=0.0, gamma=0.9),
    _gae_case("offset", LAYOUTS["long"], gamma=0.99, offset=1e3),
]


# --- masked_whiten --------------------------------------------------------------------------------------------------


def _whiten_oracle(x, mask=None, shift_mean=True, unbiased=False, eps=1e-8):
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    chosen = x[counted]
    mean = chosen.mean() if chosen.numel() else x.new_zeros(())
    variance = chosen.var(unbiased=unbiased) if chosen.numel() > unbiased else x.new_zeros(())
    out = (x - mean) * torch.rsqrt(variance + eps)
    return (torch.where(counted, out if shift_mean else out + mean, 0),)


def _whiten_case(name, layout, values_only=True, offset=0.0, **options) -> OpCase:
    return OpCase(
        "masked_whiten", name, partial(tokens, names=("x",), offset=offset, **layout),
        lambda **x: (masked_whiten(**x, **options),), partial(_whiten_oracle, **options), values_only=values_only,
    )  # fmt: skip


MASKED_WHITEN = [
    *(
        _whiten_case(name, LAYOUTS[name], values_only=name != "gaps")
        for name in LAYOUTS
        if "packed" not in name and name != "one_step"
    ),
    _whiten_case("keep_mean", LAYOUTS["gaps"], shift_mean=False, offset=5.0),
    _whiten_case("unbiased", LAYOUTS["right_padded"], unbiased=True),
    _whiten_case("offset", LAYOUTS["long"], offset=1e4),
    _whiten_case("large", {"shape": (300, 1000), "mask": "gaps"}),
]


# --- ppo_advantages -------------------------------------------------------------------------------------------------


def _advantages_oracle(logprobs, ref_logprobs, values, scores, mask=None, cu_seqlens=None, options=None):
    logprobs, ref_logprobs, values, scores = (
        x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (logprobs, ref_logprobs, values, scores)
    )
    counted = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    kl = torch.where(counted, kl_oracle(logprobs, ref_logprobs, options.kl_estimator)[0], 0)
    rewards = -options.kl_coef * kl
    if options.score_clip:
        scores = scores.clamp(-options.score_clip, options.score_clip)
    if scores.shape == logprobs.shape:
        rewards = rewards + scores
    else:
        for b, index in enumerate(sequences(logprobs, mask, cu_seqlens)):
            if len(index):
                rewards.view(-1)[index[-1]] += scores[b]
    rewards = torch.where(counted, rewards, 0)
    if options.whiten_rewards:
        rewards = _whiten_oracle(rewards, counted, shift_mean=False)[0]
    advantages, returns = _gae_oracle(rewards, values, mask, cu_seqlens, gamma=options.gamma, lam=options.lam)
    if options.whiten_advantages:
        advantages = _whiten_oracle(advantages, counted)[0]
    return advantages, returns, rewards, kl


def _advantage_case(name, layout, values_only=True, per_token=False, **options) -> OpCase:
    names = ("logprobs", "ref_logprobs", "values", *(["scores"] if per_token else []))
    options = AdvantageOptions(**options)
    return OpCase(
        "ppo_advantages", name, partial(tokens, names=names, per_sequence=() if per_token else ("scores",), **layout),
        partial(ppo_advantages, options=options), partial(_advantages_oracle, options=options),
        values_only=values_only, tolerance=3e-6,
    )  # fmt: skip


PPO_ADVANTAGES = [
    *(_advantage_case(name, layout, values_only=name not in THOROUGH) for name, layout in LAYOUTS.items()),
    _advantage_case("whiten_both", LAYOUTS["gaps"], whiten_rewards=True, kl_estimator="k3", gamma=0.98),
    _advantage_case(
        "whiten_none_clip", LAYOUTS["packed_gaps"], whiten_advantages=False, score_clip=0.5, kl_estimator="abs"
    ),
    _advantage_case("per_token_scores", LAYOUTS["gaps"], per_token=True, kl_estimator="k2", score_clip=1.0),
    _advantage_case("per_token_packed", LAYOUTS["packed_gaps"], per_token=True, whiten_rewards=True),
]
