"""OpenRLHF's functions and losses on our ops: log-probabilities, KL, policy, value and DPO loss, GAE.

Masks are OpenRLHF's, of any dtype: a token counts where its mask is not 0; None counts all. What stands under a mask
may be NaN and is never read; advantages and returns are 0 there. A batch with no counted token gives 0 where OpenRLHF
gives NaN. Results are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.dpo_loss import DPOOptions, dpo_loss
from ..ops.gae import gae
from ..ops.ppo_loss import PPOLossOptions, ppo_loss
from ..ops.token_kl import token_kl, with_gradient_of
from ..ops.token_logprobs import token_logprobs

SUPPORTED = ("0.11", "0.12")

LOG_RATIO_CLAMP = 20.0
KL_CLAMP = 10.0  # of every estimator's value, k1 included
KL_IS_WEIGHT_CLIP = 10.0


def log_probs_from_logits(
    logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:  # (..., V), (...) -> (...)
    """Of logits / temperature. The logits stay as they are, where OpenRLHF divides them in place."""
    return token_logprobs(logits, labels.reshape(logits.shape[:-1]), temperature=temperature)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """By element, in float32, clamped to +-10, with no gradient beyond. `unbiased_gradient` gives the value the
    gradient of k2 times exp(log_probs - log_probs_old), which is at most 10 and a constant."""
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"Unknown kl_estimator: {kl_estimator}")
    p, q = log_probs.float(), log_probs_base.float()
    # Where the argument's clamp acts, k3 lies above the value's: it only keeps exp finite.
    value = token_kl(p, q, kl_estimator, clamp=LOG_RATIO_CLAMP if kl_estimator == "k3" else None)
    value = value.clamp(-KL_CLAMP, KL_CLAMP)
    if not unbiased_gradient:
        return value
    surrogate = token_kl(p, q, "k2")
    if log_probs_old is not None:
        surrogate = surrogate * (p - log_probs_old.float()).exp().clamp(max=KL_IS_WEIGHT_CLIP).detach()
    return with_gradient_of(value, surrogate)


def _mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    return x.masked_fill(~mask, 0).sum(dim) / mask.sum(dim).clamp(min=1)


def _reduction(
    token_level_loss: bool, dp_size: int, batch_num_tokens: float | None, global_batch_size: float | None
) -> tuple[str, float | Tensor | None]:
    """(our reduction, its denominator): a local count is not multiplied by dp_size."""
    name, total = ("token_mean", batch_num_tokens) if token_level_loss else ("seq_mean_token_mean", global_batch_size)
    return name, None if total is None else total / dp_size


class PolicyLoss(nn.Module):
    """Clipped policy loss of tokens ("ppo") or of sequences ("gspo"), with the correction for a sampler that is not
    the trainer. Arguments and checks are OpenRLHF's."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: list = (0.5, 5.0),
    ) -> None:
        super().__init__()
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.is_correction_gating, self.is_correction_threshold = is_correction_gating, is_correction_threshold
        assert dual_clip is None or dual_clip > 1.0, f"dual_clip must be > 1.0, got {dual_clip}"
        if is_correction_level not in {"off", "token", "seq"}:
            raise ValueError(f"is_correction_level must be off/token/seq, got {is_correction_level}")
        if is_correction_mode not in {"mask", "clip"}:
            raise ValueError(f"is_correction_mode must be mask/clip, got {is_correction_mode}")
        if is_correction_gating not in {"ratio", "binary_kl", "tv"}:
            raise ValueError(f"is_correction_gating must be ratio/binary_kl/tv, got {is_correction_gating}")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                "is_correction_mode=clip requires is_correction_level=token and is_correction_gating=ratio"
            )
        if is_correction_gating != "ratio" and is_correction_level != "off" and is_correction_threshold[0] > 0:
            raise ValueError(f"is_correction_gating={is_correction_gating} takes an upper bound only (a single delta)")

    def forward(
        self,
        log_probs: Tensor,  # (B, T), as all tensors below
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(loss, clip fraction, mean of old - new, mean of rollout - old, share of what the correction filters), 0-dim;
        the last two are None where nothing is corrected."""
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        corrects, weights, gap, filtered = self.is_correction_level != "off", None, None, None
        if self.policy_loss_type == "ppo":
            learned, sampled, clamp = log_probs, old_log_probs, LOG_RATIO_CLAMP
            if corrects:
                weights, filtered = self._correction(old_log_probs, rollout_log_probs, mask)
                gap = _mean(rollout_log_probs - old_log_probs, mask)
        elif self.policy_loss_type == "gspo":  # every token has its sequence's mean log-ratio
            from_whom = rollout_log_probs if corrects else old_log_probs
            learned, clamp = _mean(log_probs - from_whom, mask, -1)[:, None].expand_as(mask), None
            sampled = torch.zeros_like(learned)
        else:
            raise ValueError(f"Invalid policy loss type: {self.policy_loss_type}")
        reduction, denominator = _reduction(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        options = PPOLossOptions(
            clip_low=min(self.clip_eps_low, 1.0), clip_high=self.clip_eps_high, dual_clip=self.dual_clip,
            log_ratio_clamp=clamp, reduction=reduction,
        )  # fmt: skip
        loss, stats = ppo_loss(
            learned, sampled, advantages, mask, is_weights=weights, options=options, denominator=denominator
        )
        return (
            loss,
            stats.clip_fraction.to(loss.dtype),
            _mean((old_log_probs - log_probs).detach(), mask),
            gap,
            filtered,
        )

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # (B, T), ()
        """(weights of the tokens, share that is filtered) by a statistic of each token, or of its sequence: the ratio
        of trainer and sampler, the binary KL of the sampled token, or its total variation."""
        log_ratio, by_sequence = old - rollout, self.is_correction_level == "seq"
        if self.is_correction_gating == "ratio":
            statistic = log_ratio
        else:
            p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
            tv = self.is_correction_gating == "tv"
            statistic = (p - q).abs() if tv else p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        statistic = _mean(statistic, mask, -1)[:, None] if by_sequence else statistic
        statistic = statistic.exp() if self.is_correction_gating == "ratio" else statistic
        low, high = self.is_correction_threshold
        if self.is_correction_mode == "clip":
            outside, weights = (statistic < low) | (statistic > high), statistic.clamp(low, high)
        else:
            outside = ~((statistic >= low) & (statistic <= high))  # NaN, of two that give -inf, is outside
            weights = torch.where(outside, 0.0, log_ratio.exp())
        return weights, outside.float().mean() if by_sequence else _mean(outside.float(), mask)


class ValueLoss(nn.Module):
    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps, self.token_level_loss = clip_eps, token_level_loss

    def forward(
        self,
        values: Tensor,  # (B, T), as all tensors below
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:  # ()
        """Half the squared error, or of it and the clipped value's the larger."""
        reduction, denominator = _reduction(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        options = PPOLossOptions(value_clip=self.clip_eps, value_coef=1.0, reduction=reduction)
        mask, nothing = None if action_mask is None else action_mask.bool(), torch.zeros_like(values)
        return ppo_loss(
            nothing, nothing, nothing, mask, values=values, old_values=old_values, returns=returns, options=options,
            denominator=denominator,
        )[0]  # fmt: skip


class DPOLoss(nn.Module):
    """cDPO with label_smoothing; ipo compares sums over a sequence, not means, and ignores label_smoothing."""

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta, self.label_smoothing, self.ipo = beta, label_smoothing, ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,  # (B,), as all below
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, rewards of the chosen, of the rejected): (), (B,), (B,), the rewards without gradient."""
        if self.ipo:
            options = DPOOptions(beta=self.beta, loss_type="ipo", ipo_average=False)
        else:
            options = DPOOptions(beta=self.beta, label_smoothing=self.label_smoothing)
        policy, reference = (
            (policy_chosen_logps, policy_rejected_logps),
            (reference_chosen_logps, reference_rejected_logps),
        )
        loss, _ = dpo_loss(*policy, *reference, options=options)
        return loss, *(self.beta * (p - r).detach() for p, r in zip(policy, reference))


def get_advantages_and_returns(
    self: object,  # a method of RemoteExperienceMaker; not used
    values: Tensor,  # (B, T)
    rewards: Tensor,  # (B, T)
    action_mask: Tensor | None,  # (B, T)
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns): a token between counted ones that does not count is a step with value and reward 0."""
    mask = None if action_mask is None else action_mask.bool()
    return gae(rewards, values, mask, gamma=float(gamma), lam=float(lambd), gap="zero")


_LOSSES, _UTILS = "openrlhf.models.loss", "openrlhf.models.utils"
REPLACEMENTS = {
    f"{_UTILS}.log_probs_from_logits": log_probs_from_logits,
    f"{_UTILS}.compute_approx_kl": compute_approx_kl,
    f"{_LOSSES}.PolicyLoss": PolicyLoss,
    f"{_LOSSES}.ValueLoss": ValueLoss,
    f"{_LOSSES}.DPOLoss": DPOLoss,
    "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker.get_advantages_and_returns": (
        get_advantages_and_returns
    ),
}
