"""The cases of the battery: inputs, and oracles written as a textbook would, with autograd and loops, apart from the
references."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ._case_inputs import LAYOUTS, logits, sequences, tokens, two_logprobs
from .ops.gae import gae
from .ops.masked_whiten import masked_whiten
from .ops.ppo_advantages import AdvantageOptions, ppo_advantages
from .ops.ppo_loss import PPOLossOptions, ppo_loss
from .ops.token_kl import token_kl
from .ops.token_logprobs import token_logprobs
from .stats import PPO_FIELDS
from .testing import OpCase

F32_F64 = (torch.float32, torch.float64)


# --- token_logprobs -------------------------------------------------------------------------------------------------


def _token_logprobs(logits, token_ids, temperature=1.0, **options):
    out = token_logprobs(logits, token_ids, temperature=temperature, **options)
    return out if isinstance(out, tuple) else (out,)


def _token_logprobs_oracle(logits, token_ids, temperature=1.0, softcap=None, return_entropy=False):
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
        partial(_token_logprobs, **options), partial(_token_logprobs_oracle, **options),
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


# --- token_kl -------------------------------------------------------------------------------------------------------


def _kl_oracle(logprobs, ref_logprobs, estimator="k1", clamp=None):
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
        lambda **x: (token_kl(**x, **options),), partial(_kl_oracle, **options),
        learned=("logprobs", "ref_logprobs"), values_only=estimator != "k3",
    )  # fmt: skip


TOKEN_KL = [
    *map(_kl_case, ("k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+")),
    _kl_case("k3", 0.2),
    _kl_case("k1", shape=(0, 3)),
]


# --- token sequences: masks and layouts -----------------------------------------------------------------------------


THOROUGH = ("right_padded", "packed", "no_sequences")


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
    kl = torch.where(counted, _kl_oracle(logprobs, ref_logprobs, options.kl_estimator)[0], 0)
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


# --- ppo_loss -------------------------------------------------------------------------------------------------------


def _loss_inputs(generator, value=True, entropy=True, ref=True, weights=False, denominator=None, **layout):
    names = (
        ["logprobs", "old_logprobs", "advantages"] + ["values", "old_values", "returns"] * value + ["entropy"] * entropy
    )
    out = tokens(generator, names + ["ref_logprobs"] * ref + ["is_weights"] * weights, **layout)
    for name in ("logprobs", "ref_logprobs"):
        if name in out:  # ratios of about 1, as in training
            out[name] = out["old_logprobs"] + 0.25 * out[name]
    if denominator is not None:
        out["denominator"] = torch.tensor(denominator, dtype=torch.float64)
    return out


def _ppo_loss(options, **inputs):
    loss, stats = ppo_loss(options=options, **inputs)
    return loss, stats.sums.new_tensor(0) + torch.stack(
        [getattr(stats, name) for name in PPO_FIELDS if name != "units"]
    )


def _ppo_loss_oracle(
    options, logprobs, old_logprobs, advantages, mask=None, cu_seqlens=None, values=None, old_values=None,
    returns=None, entropy=None, ref_logprobs=None, is_weights=None, denominator=None,
):  # fmt: skip
    o = options
    dtype = torch.float32 if logprobs.dtype in (torch.bfloat16, torch.float16) else logprobs.dtype
    logprobs, old_logprobs, advantages = logprobs.to(dtype), old_logprobs.to(dtype), advantages.to(dtype)
    index = sequences(logprobs, mask, cu_seqlens)
    n_tokens, n_full = sum(map(len, index)), sum(len(i) > 0 for i in index)
    flat = lambda x: x.to(dtype).reshape(-1)  # noqa: E731
    zero = logprobs.new_zeros(logprobs.numel())
    d = flat(logprobs) - flat(old_logprobs)
    d = d if o.log_ratio_clamp is None else d.clamp(-o.log_ratio_clamp, o.log_ratio_clamp)
    r, a = d.exp(), flat(advantages)
    first, second = -a * r, -a * r.clamp(1 - o.clip_low, 1 + o.clip_high)
    policy = torch.max(first, second)
    dual = zero.bool() if o.dual_clip is None else (a < 0) & (policy > -a * (o.dual_clip or 1))
    policy = policy if o.dual_clip is None else torch.where(a < 0, torch.min(policy, -a * o.dual_clip), policy)
    policy = policy if is_weights is None else policy * flat(is_weights)
    value, value_clipped = zero, zero.bool()
    if values is not None:
        v, old, target = flat(values), flat(old_values), flat(returns)
        plain, clipped = (v - target) ** 2, (torch.clamp(v, old - o.value_clip, old + o.value_clip) - target) ** 2
        value, value_clipped = 0.5 * torch.max(plain, clipped), clipped > plain
    kl = zero if ref_logprobs is None else _kl_oracle(flat(logprobs), flat(ref_logprobs), o.kl_estimator, o.kl_clamp)[0]
    ent = zero if entropy is None else flat(entropy)

    def reduce(x, divisor=None):
        sums = [x[i].sum() if o.reduction != "seq_mean_token_mean" else x[i].mean() for i in index if len(i)]
        total = sum(sums, x.new_zeros(()))
        count = {"token_mean": n_tokens, "sum": 1}.get(o.reduction, n_full)
        return total / max(count if divisor is None else divisor, 1e-30 if divisor is not None else 1)

    chosen = torch.cat(index) if index else torch.zeros(0, dtype=torch.int64)
    mean = lambda x: x[chosen].to(dtype).sum() / max(n_tokens, 1)  # noqa: E731
    loss = reduce(policy + o.value_coef * value - o.entropy_coef * ent + o.kl_coef * kl, denominator)
    stats = [*map(reduce, (policy, value, ent, kl)), zero.new_tensor(n_tokens), mean(0.5 * d * d), mean(r - 1 - d)]
    stats += [*map(mean, (second > first, dual, value_clipped, r)), r[chosen].max() if n_tokens else zero.new_tensor(0)]
    return loss, torch.stack([s.detach() for s in stats])


def _loss_case(
    name, layout, values_only=True, value=True, entropy=True, ref=True, weights=False, denominator=None, **options
) -> OpCase:
    options = PPOLossOptions(**{"entropy_coef": 0.01 * entropy, "kl_coef": 0.1 * ref, "clip_high": 0.28, **options})
    inputs = {"value": value, "entropy": entropy, "ref": ref, "weights": weights, "denominator": denominator}
    return OpCase(
        "ppo_loss", name, partial(_loss_inputs, **inputs, **layout),
        partial(_ppo_loss, options), partial(_ppo_loss_oracle, options),
        learned=("logprobs", *["values"] * value, *["entropy"] * entropy), values_only=values_only,
    )  # fmt: skip


PPO_LOSS = [
    *(_loss_case(name, layout, values_only=name not in THOROUGH) for name, layout in LAYOUTS.items()),
    _loss_case("policy_alone", LAYOUTS["gaps"], value=False, entropy=False, ref=False),
    _loss_case("dual_clip_weights", LAYOUTS["gaps"], weights=True, dual_clip=1.1, log_ratio_clamp=0.3, kl_clamp=0.2),
    _loss_case("denominator", LAYOUTS["right_padded"], denominator=77.0),
    *(
        _loss_case(f"{reduction}_{layout}", LAYOUTS[layout], reduction=reduction, kl_estimator=kl)
        for reduction, kl in (("seq_mean_token_sum", "k2"), ("seq_mean_token_mean", "abs"), ("sum", "k3+"))
        for layout in ("gaps", "packed_gaps", "all_masked")
    ),
    _loss_case(
        "seq_mean_denominator",
        LAYOUTS["packed_gaps"],
        reduction="seq_mean_token_mean",
        denominator=9.0,
        kl_estimator="k1+",
    ),
    _loss_case("blocks", {"shape": (64, 300), "mask": "gaps"}, kl_estimator="k1"),
]

CASES = {
    "token_logprobs": TOKEN_LOGPROBS, "token_kl": TOKEN_KL, "gae": GAE, "masked_whiten": MASKED_WHITEN,
    "ppo_advantages": PPO_ADVANTAGES, "ppo_loss": PPO_LOSS,
}  # fmt: skip
