"""Cases of ppo_loss."""

from __future__ import annotations

from functools import partial

import torch

from ..ops.ppo_loss import PPOLossOptions, ppo_loss
from ..stats import PPO_FIELDS
from ..testing import OpCase
from .inputs import LAYOUTS, THOROUGH, sequences, tokens
from .tokens import kl_oracle


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


def ppo_loss_oracle(
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
    kl = zero if ref_logprobs is None else kl_oracle(flat(logprobs), flat(ref_logprobs), o.kl_estimator, o.kl_clamp)[0]
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
        partial(_ppo_loss, options), partial(ppo_loss_oracle, options),
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
