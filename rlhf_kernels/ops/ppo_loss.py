"""The clipped PPO loss with value, entropy and KL terms, its gradients and its statistics, in one pass.

    d, r   = clamp(logprobs - old_logprobs), exp(d)
    policy = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), times is_weights
             where A < 0 and dual_clip = c: min(that, -A c)
    value  = 0.5 max((v - R)^2, (clip(v, V - c, V + c) - R)^2)   with V old_values, c value_clip
    kl     = estimator(logprobs - ref_logprobs)
    loss   = policy + value_coef * value - entropy_coef * entropy + kl_coef * kl, reduced over the counted tokens

    token_mean           sum over tokens / tokens
    seq_mean_token_sum   sum over tokens / sequences
    seq_mean_token_mean  mean over sequences of their token means; a sequence with no counted token does not count
    sum                  sum over tokens

Sources: Schulman et al., arXiv 1707.06347; dual clip: Ye et al., arXiv 1912.09729; statistics: PPOStats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks as check
from .._layout import as_scalar, check_cu_seqlens, compute_dtype, full_mask, prepare, sequence_ids, sequence_sums
from .._library import call, define, once_differentiable
from ..stats import PPO_FIELDS, PPOStats
from .token_kl import ESTIMATORS, kl_gradient, kl_value

REDUCTIONS = ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "sum")
TOKEN_MEAN, SEQ_TOKEN_SUM, SEQ_TOKEN_MEAN, SUM = range(4)

# stats is (13,) float64, PPO_FIELDS; a gradient that is not asked for is empty.
SCHEMA = (
    "ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? values, Tensor? old_values, Tensor? returns, Tensor? entropy, Tensor? ref_logprobs, Tensor? is_weights, "
    "Tensor? denominator, float clip_low, float clip_high, float? dual_clip, float? value_clip, float value_coef, "
    "float entropy_coef, float kl_coef, int kl_estimator, float? kl_clamp, float? log_ratio_clamp, int reduction, "
    "bool grad_logprobs, bool grad_values, bool grad_entropy) "
    "-> (Tensor loss, Tensor stats, Tensor d_logprobs, Tensor d_values, Tensor d_entropy)"
)
N_ARGUMENTS = 26


@dataclass(frozen=True)
class PPOLossOptions:
    """Options of `ppo_loss`; None switches a clip or clamp off."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # > 1
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_clamp: float | None = None  # bound on |logprobs - ref_logprobs|; no gradient outside it
    log_ratio_clamp: float | None = None  # bound on |logprobs - old_logprobs|; no gradient outside it
    reduction: str = "token_mean"

    def __post_init__(self) -> None:
        check.number("clip_low", self.clip_low, 0, 1)
        check.number("clip_high", self.clip_high, 0)
        if self.dual_clip is not None:
            check.number("dual_clip", self.dual_clip, above=1)
        for name in ("value_coef", "entropy_coef", "kl_coef"):
            check.number(name, getattr(self, name))
        for name in ("value_clip", "kl_clamp", "log_ratio_clamp"):
            if getattr(self, name) is not None:
                check.number(name, getattr(self, name), above=0)
        check.one_of("kl_estimator", self.kl_estimator, ESTIMATORS)
        check.one_of("reduction", self.reduction, REDUCTIONS)


def _clamped(x: Tensor, bound: float | None) -> tuple[Tensor, Tensor]:
    """(x in [-bound, bound], whether the gradient passes)."""
    if bound is None:
        return x, torch.ones_like(x, dtype=torch.bool)
    return x.clamp(-bound, bound), ~(x.abs() > bound)  # NaN passes, so that it shows


def _policy_terms(logprobs, old_logprobs, advantages, is_weights, clip_low, clip_high, dual_clip, log_ratio_clamp):
    """Per token: loss, d loss / d logprobs, and what the statistics average."""
    d, passes = _clamped(logprobs - old_logprobs, log_ratio_clamp)
    ratio = d.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    is_clipped = clipped > unclipped
    loss = torch.maximum(unclipped, clipped)
    is_dual = torch.zeros_like(is_clipped)
    if dual_clip is not None:
        is_dual = (advantages < 0) & (loss > -advantages * dual_clip)
        loss = torch.where(is_dual, -advantages * dual_clip, loss)
    gradient = torch.where(is_clipped | is_dual | ~passes, 0, unclipped)
    if is_weights is not None:
        loss, gradient = loss * is_weights, gradient * is_weights
    stats = {
        "approx_kl": 0.5 * d * d,
        "approx_kl_k3": torch.expm1(d) - d,
        "clip_fraction": is_clipped,
        "dual_clip_fraction": is_dual,
    }
    return loss, gradient, {**stats, "ratio_mean": ratio}


def _value_terms(values, old_values, returns, value_clip):
    """Per token: loss, d loss / d values, whether the clip is the larger loss."""
    error = values - returns
    loss, is_clipped = error * error, torch.zeros_like(error, dtype=torch.bool)
    if value_clip is not None:
        clipped_error = torch.maximum(torch.minimum(values, old_values + value_clip), old_values - value_clip) - returns
        is_clipped = clipped_error * clipped_error > loss
        loss = torch.maximum(loss, clipped_error * clipped_error)
    return 0.5 * loss, torch.where(is_clipped, 0, error), is_clipped


def token_weights(mask: Tensor, cu_seqlens: Tensor | None, reduction: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weight of each token in the numerator, the local count that divides it: tokens, sequences, or 1 for sum)."""
    counted = mask.to(dtype)
    if reduction in (TOKEN_MEAN, SUM):
        return counted, counted.sum() if reduction == TOKEN_MEAN else counted.new_zeros(())
    n_sequences = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    lengths = sequence_sums(counted, cu_seqlens, n_sequences)
    units = (lengths > 0).sum().to(dtype)
    if reduction == SEQ_TOKEN_SUM or not mask.numel():
        return counted, units
    return counted / lengths.clamp(min=1)[sequence_ids(mask, cu_seqlens)], units


def token_scale(weight: Tensor, units: Tensor, denominator: Tensor | None) -> Tensor:
    """What each token's loss is multiplied by before everything is summed."""
    divisor = units.clamp(min=1) if denominator is None else denominator.to(units.dtype)
    return weight * torch.where(divisor == 0, 0, 1 / divisor)


def _stats(terms, weight: Tensor, units: Tensor, mask: Tensor, per_token: dict[str, Tensor]) -> Tensor:
    """The sums of PPO_FIELDS, (13,) float64."""
    sums = dict(zip(PPO_FIELDS, [(term.double() * weight.double()).sum() for term in terms]))
    sums |= {name: x.double().masked_fill(~mask, 0).sum() for name, x in per_token.items()}
    ratio = per_token["ratio_mean"].double().masked_fill(~mask, 0)
    sums |= {
        "units": units.double(),
        "tokens": mask.sum().double(),
        "ratio_max": ratio.max() if ratio.numel() else ratio.sum(),
    }
    return torch.stack([sums[name] for name in PPO_FIELDS])


def ppo_loss_reference(
    logprobs: Tensor,  # (B, T) or (N,), float32 or float64, as all floats below
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,  # bool
    cu_seqlens: Tensor | None,  # (B+1,) int32
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    denominator: Tensor | None,  # ()
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: int,
    kl_clamp: float | None,
    log_ratio_clamp: float | None,
    reduction: int,
    grad_logprobs: bool,
    grad_values: bool,
    grad_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_cu_seqlens(cu_seqlens, logprobs.shape[0] if logprobs.dim() == 1 else 0)
    mask = full_mask(mask, logprobs)
    # What stands under the mask may be NaN: it is replaced before the arithmetic, not multiplied by 0 after it.
    clean = lambda x: None if x is None else x.masked_fill(~mask, 0)  # noqa: E731
    logprobs, old_logprobs, advantages, is_weights = map(clean, (logprobs, old_logprobs, advantages, is_weights))
    weight, units = token_weights(mask, cu_seqlens, reduction, logprobs.dtype)
    policy, d_policy, token_stats = _policy_terms(
        logprobs, old_logprobs, advantages, is_weights, clip_low, clip_high, dual_clip, log_ratio_clamp
    )
    zero = torch.zeros_like(weight)
    value, d_value, value_clipped = zero, zero, zero
    if values is not None:
        value, d_value, value_clipped = _value_terms(clean(values), clean(old_values), clean(returns), value_clip)
    kl, d_kl = zero, zero
    if ref_logprobs is not None:
        x, passes = _clamped(logprobs - clean(ref_logprobs), kl_clamp)
        kl, d_kl = kl_value(x, kl_estimator), kl_gradient(x, kl_estimator) * passes
    entropy = zero if entropy is None else clean(entropy)
    scale = token_scale(weight, units, denominator)
    # A term that is there for its statistic alone may be inf or NaN: times a coefficient of 0 that would still be NaN.
    terms = [(value_coef, value), (-entropy_coef, entropy), (kl_coef, kl)]
    loss = (policy + sum(c * term for c, term in terms if c)).mul(scale).sum()
    stats = _stats(
        (policy, value, entropy, kl), weight, units, mask, {**token_stats, "value_clip_fraction": value_clipped}
    )
    d_logprobs = (d_policy + kl_coef * d_kl if kl_coef else d_policy) * scale
    d_values = value_coef * d_value * scale if value_coef else zero
    d_entropy = -entropy_coef * scale
    wanted = ((grad_logprobs, d_logprobs), (grad_values, d_values), (grad_entropy, d_entropy))
    return (loss, stats, *(gradient if want else logprobs.new_empty(0) for want, gradient in wanted))


def _fake(logprobs, old_logprobs, *rest):
    empty = lambda wanted: torch.empty_like(logprobs) if wanted else logprobs.new_empty(0)  # noqa: E731
    loss, stats = logprobs.new_empty(()), logprobs.new_empty((len(PPO_FIELDS),), dtype=torch.float64)
    return (loss, stats, *map(empty, rest[-3:]))


def _setup_context(ctx, inputs, output):
    _, stats, *gradients = output
    ctx.wanted = inputs[-3:]
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(stats, *gradients)
    ctx.set_materialize_grads(False)  # else autograd fills a zero gradient for each of them


def _backward(ctx, grad_loss, *_):
    once_differentiable("ppo_loss")
    given = grad_loss is not None
    d_logprobs, d_values, d_entropy = (
        d * grad_loss if wanted and given else None for d, wanted in zip(ctx.saved_tensors, ctx.wanted)
    )
    # logprobs is argument 0, values argument 5, entropy argument 8 of the schema
    return (d_logprobs, None, None, None, None, d_values, None, None, d_entropy, *[None] * (N_ARGUMENTS - 9))


ppo_loss_op = define(SCHEMA, ppo_loss_reference, _fake, setup_context=_setup_context, backward=_backward)


def _check(logprobs, tensors: dict[str, Tensor | None], mask, cu_seqlens, options: PPOLossOptions, denominator) -> None:
    check.options(options, PPOLossOptions)
    check.is_float("logprobs", logprobs)
    check.token_layout("logprobs", logprobs, cu_seqlens)
    for name in ("old_logprobs", "advantages"):
        check.is_tensor(name, tensors[name])
    for name, tensor in tensors.items():
        check.like(name, tensor, "logprobs", logprobs)
    check.mask_like(mask, "logprobs", logprobs)
    if tensors["values"] is not None:
        for name in ("returns", *(["old_values"] if options.value_clip is not None else [])):
            if tensors[name] is None:
                way_out = ", or PPOLossOptions(value_clip=None)" if name == "old_values" else ""
                raise ValueError(f"{name}: expected a tensor because values is given, got None; pass it{way_out}")
    if options.entropy_coef and tensors["entropy"] is None:
        raise ValueError(f"entropy: expected a tensor because entropy_coef is {options.entropy_coef}, got None")
    check_terms(logprobs, tensors["ref_logprobs"], options, denominator)


def check_terms(like: Tensor, ref_logprobs: Tensor | None, options: PPOLossOptions, denominator) -> None:
    """What every PPO loss takes beside its per-token tensors."""
    if options.kl_coef and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor because kl_coef is {options.kl_coef}, got None")
    if denominator is not None and options.reduction == "sum":
        raise ValueError("denominator: expected None with reduction='sum', which divides by nothing")
    check.scalar("denominator", denominator, "the per-token tensors", like, above=0)


def loss_terms(o: PPOLossOptions) -> tuple:
    """The options as the schema takes them, clip_low to reduction."""
    return (
        o.clip_low, o.clip_high, o.dual_clip, o.value_clip, o.value_coef, o.entropy_coef, o.kl_coef,
        ESTIMATORS.index(o.kl_estimator), o.kl_clamp, o.log_ratio_clamp, REDUCTIONS.index(o.reduction),
    )  # fmt: skip


def ppo_loss(
    logprobs: Tensor,  # (B, T) or (N,) float, of the policy that learns
    old_logprobs: Tensor,  # the same shape, as all below; of the policy that sampled
    advantages: Tensor,
    mask: Tensor | None = None,  # bool, True on response tokens
    *,
    cu_seqlens: Tensor | None = None,  # (B+1,) int32 for packed (N,) tokens
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    is_weights: Tensor | None = None,  # importance weights of the policy term (sampler against trainer)
    options: PPOLossOptions = PPOLossOptions(),
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, PPOStats]:
    """(loss, stats): a scalar, float32 (float64 for float64 inputs), and device-side sums that are read without
    touching the graph.

    Differentiable in logprobs, values and entropy, once; everything else is a constant. Values under the mask may be
    NaN and change nothing; a batch with no counted token gives loss 0 and zero gradients. `denominator` replaces the
    local count of tokens (of sequences for seq_*): pass that of the whole optimizer step divided by the world size,
    and accumulation and data parallelism equal one big batch. Raises TypeError or ValueError for wrong dtypes,
    shapes, devices and options, and for a term whose inputs are missing.
    """
    tensors = {
        "old_logprobs": old_logprobs, "advantages": advantages, "values": values, "old_values": old_values,
        "returns": returns, "entropy": entropy, "ref_logprobs": ref_logprobs, "is_weights": is_weights,
    }  # fmt: skip
    _check(logprobs, tensors, mask, cu_seqlens, options, denominator)
    dtype = compute_dtype(logprobs, *tensors.values())
    learned = [prepare(x, dtype) for x in (logprobs, values, entropy)]
    constant = {name: prepare(x.detach(), dtype) for name, x in tensors.items() if x is not None}
    denominator = as_scalar(denominator, dtype, logprobs.device)
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in learned]
    loss, stats, *_ = call(
        ppo_loss_op,
        learned[0], constant["old_logprobs"], constant["advantages"], prepare(mask), prepare(cu_seqlens),
        learned[1], constant.get("old_values"), constant.get("returns"), learned[2], constant.get("ref_logprobs"),
        constant.get("is_weights"), denominator,
        *loss_terms(options), *wants,
    )  # fmt: skip
    return loss, PPOStats(stats.detach())
