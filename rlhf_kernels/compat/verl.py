"""verl's functions on our ops: log-probabilities and entropy, GAE, policy and value loss, KL.

Masks are verl's, of any dtype: a token counts where its mask is not 0. What stands under a mask may be NaN and is never
read; results are 0 there, where verl leaves what its recursions carried past. Results are float32 (float64 for float64
inputs), logits of 16 bits included. A batch with no counted token gives 0 where verl gives NaN or raises.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._layout import as_scalar, compute_dtype
from ..ops.gae import gae
from ..ops.linear_token_logprobs import linear_token_logprobs
from ..ops.masked_whiten import masked_whiten as whiten
from ..ops.ppo_loss import REDUCTIONS, PPOLossOptions, ppo_loss, token_scale, token_weights
from ..ops.token_kl import token_kl, with_gradient_of
from ..ops.token_logprobs import token_logprobs

SUPPORTED = ("0.9", "0.10")

LOG_RATIO_CLAMP = 20.0
K3_CLAMP = 10.0  # of the value; its argument is clamped to LOG_RATIO_CLAMP
ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


# Log-probabilities and entropy


def logprobs_from_logits(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    inplace_backward: bool = True,
) -> Tensor:  # (...)
    """Labels of -100 give 0, as flash-attention's cross-entropy does. The gradient never overwrites the logits, which
    `inplace_backward` lets verl do: they can still be read after the backward."""
    return token_logprobs(logits, labels.reshape(logits.shape[:-1]))


def entropy_from_logits(logits: Tensor) -> Tensor:  # (..., V) -> (...)
    """In nats, differentiable; logits of -inf add nothing."""
    return token_logprobs(logits, logits.new_zeros(logits.shape[:-1], dtype=torch.long), return_entropy=True)[1]


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:  # (N, V) -> (N,)
    """The same: no float32 copy of the logits is made, so that nothing is left for `chunk_size` to bound."""
    return entropy_from_logits(logits)


def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # as many as hidden states
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[Tensor, Tensor]:  # (N,) or (), (N,)
    """(log-probabilities, entropies), both differentiable, of any width; `reduction` "sum" or "mean" reduces the
    first. A head whose vocabulary is split over the ranks of a group goes to verl's own kernels."""
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

        return LinearCrossEntropy.apply(hidden, weight, labels, temperature, reduction, dist_process_group)
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    logprobs, entropy = linear_token_logprobs(hidden, weight, labels, temperature=temperature, return_entropy=True)
    reduced = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}
    if reduction.lower() not in reduced:
        raise ValueError(f"Invalid reduction: {reduction}")
    return reduced[reduction.lower()](logprobs), entropy


class FusedLinearForPPO(nn.Module):
    """Log-probabilities in float32, entropies in the dtype of the hidden states."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"Unsupported FusedLinearForPPO backend: {impl_backend}. Choose 'torch' or 'liger'.")
        self.chunk_size = chunk_size  # not used: the op chooses its chunks by the vocabulary
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,  # (T, H) or (B, T, H)
        vocab_weights: Tensor,  # (V, H)
        input_ids: Tensor,  # (T,) or (B, T)
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = linear_token_logprobs(
            hidden_states, vocab_weights, input_ids.to(torch.int64), temperature=temperature, return_entropy=True
        )
        return logprobs, entropy.to(hidden_states.dtype)


# Advantages


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Unbiased variance, 1e-8 within the root. Raises RuntimeError where a gradient is asked for, which verl never
    does: its callers run under no_grad."""
    if torch.is_grad_enabled() and values.requires_grad:
        raise RuntimeError("values: expected a constant, got a tensor that requires a gradient; detach it")
    return whiten(values, mask.bool(), shift_mean=shift_mean, unbiased=True)


def compute_gae_advantage_return(
    token_level_rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T)
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """(whitened advantages, returns); the recursion skips tokens that do not count, so that observations neither
    discount nor decay, and a reward on one is lost."""
    mask = response_mask.bool()
    advantages, returns = gae(token_level_rewards, values, mask, gamma=float(gamma), lam=float(lam), gap="skip")
    return whiten(advantages, mask, unbiased=True), returns


# Losses


def _reduction(
    mode: str,
    width: int,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[str, float | Tensor | None, float]:
    """(our reduction, its denominator, what the loss is multiplied by) of a loss_agg_mode."""
    if mode == "token-sum":
        return "sum", None, dp_size
    if mode == "token-mean":
        reduction, name, total, factor = "token_mean", "(global) batch_num_tokens", batch_num_tokens, 1.0
    elif mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm"):
        reduction, name, total = "seq_mean_token_sum", "global_batch_size", global_batch_size
        factor = 1.0 if mode == "seq-mean-token-sum" else 1.0 / (loss_scale_factor or width)
    elif mode == "seq-mean-token-mean":
        reduction, name, total, factor = "seq_mean_token_mean", "global_batch_size", global_batch_size, 1.0
    else:
        raise ValueError(f"Invalid loss_agg_mode: {mode}")
    if total is None and dp_size > 1:
        raise ValueError(f"{name} is required when dp_size > 1")
    return reduction, None if total is None else total / dp_size, factor


def agg_loss(
    loss_mat: Tensor,  # (B, T)
    loss_mask: Tensor,  # (B, T)
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:  # ()
    """By the weights that the fused losses use. Sequences with no counted token are no sequences."""
    totals = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    reduction, denominator, factor = _reduction(loss_agg_mode, loss_mask.shape[-1], *totals)
    mask, dtype = loss_mask.bool(), compute_dtype(loss_mat)
    weight, units = token_weights(mask, None, REDUCTIONS.index(reduction), dtype)
    scale = token_scale(weight, units, as_scalar(denominator, dtype, loss_mat.device))
    return (loss_mat.to(dtype).masked_fill(~mask, 0) * scale).sum() * factor


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,  # (B, T), as all below
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,  # verl's ActorConfig, or a DictConfig with its fields
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """(loss, metrics): always with the dual clip, 3 unless config.clip_ratio_c, and the log-ratio clamped to +-20.
    The metrics are read in one transfer."""
    assert config is not None
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    reduction, denominator, factor = _reduction(loss_agg_mode, response_mask.shape[-1], **config.global_batch_info)
    # A ratio is above 0, so that a lower bound below 0, by which some switch it off, is one of 0.
    options = PPOLossOptions(
        clip_low=min(low, 1.0), clip_high=high, dual_clip=config.get("clip_ratio_c", 3.0),
        log_ratio_clamp=LOG_RATIO_CLAMP, reduction=reduction,
    )  # fmt: skip
    mask = response_mask.bool()
    loss, stats = ppo_loss(
        log_prob, old_log_prob, advantages, mask, is_weights=rollout_is_weights, options=options,
        denominator=denominator,
    )  # fmt: skip
    fall = (old_log_prob - log_prob).detach().clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).masked_fill(~mask, 0)
    kl = fall.sum() / mask.sum().clamp(min=1)
    read = torch.stack([stats.clip_fraction, kl.to(torch.float64), stats.dual_clip_fraction]).tolist()
    return loss * factor, dict(zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), read))


def compute_value_loss(
    vpreds: Tensor,  # (B, T), as all below
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, fraction of tokens whose clipped loss is the larger), 0-dim tensors."""
    totals = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    reduction, denominator, factor = _reduction(loss_agg_mode, response_mask.shape[-1], *totals)
    nothing = torch.zeros_like(vpreds)  # no policy term
    loss, stats = ppo_loss(
        nothing, nothing, nothing, response_mask.bool(), values=vpreds, old_values=values, returns=returns,
        options=PPOLossOptions(value_clip=cliprange_value, value_coef=1.0, reduction=reduction),
        denominator=denominator,
    )  # fmt: skip
    return loss * factor, stats.value_clip_fraction.to(loss.dtype)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """By element; a `+` gives the value the gradient of k2. k3 alone is clamped: its argument to +-20, its value to
    10, with no gradient beyond."""
    name = kl_penalty.removesuffix("+")
    if name not in ESTIMATORS:
        raise NotImplementedError(f"kl_penalty: expected one of {', '.join(ESTIMATORS)}, or with a +, got {kl_penalty}")
    clamp = LOG_RATIO_CLAMP if ESTIMATORS[name] == "k3" else None
    value = token_kl(logprob, ref_logprob, ESTIMATORS[name], clamp=clamp)
    value = value if clamp is None else value.clamp(-K3_CLAMP, K3_CLAMP)
    if name == kl_penalty or ESTIMATORS[name] == "k2":
        return value
    return with_gradient_of(value, token_kl(logprob, ref_logprob, "k2"))


_CORE, _UTILS = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
REPLACEMENTS = {
    f"{_UTILS}.logprobs_from_logits": logprobs_from_logits,
    f"{_UTILS}.entropy_from_logits": entropy_from_logits,
    f"{_UTILS}.entropy_from_logits_with_chunking": entropy_from_logits_with_chunking,
    f"{_UTILS}.masked_whiten": masked_whiten,
    "verl.utils.kernel.linear_cross_entropy.linear_cross_entropy": linear_cross_entropy,
    "verl.utils.experimental.torch_functional.FusedLinearForPPO": FusedLinearForPPO,
    f"{_CORE}.compute_gae_advantage_return": compute_gae_advantage_return,
    f"{_CORE}.ADV_ESTIMATOR_REGISTRY.gae": compute_gae_advantage_return,
    f"{_CORE}.agg_loss": agg_loss,
    f"{_CORE}.compute_policy_loss_vanilla": compute_policy_loss_vanilla,
    f"{_CORE}.POLICY_LOSS_REGISTRY.vanilla": compute_policy_loss_vanilla,
    f"{_CORE}.compute_value_loss": compute_value_loss,
    f"{_CORE}.kl_penalty": kl_penalty,
}
