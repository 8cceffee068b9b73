"""Losses of single completions that are desirable or not, from sequence log-probabilities.

r is the log-ratio to the reference, s the sigmoid, w the weight of desirable or of undesirable sequences, and
z = max(0, kl) without a gradient. The loss is the mean over sequences of both kinds.

    kto                  w (1 - s(beta (r - z))) if desirable, else w (1 - s(beta (z - r)))    arXiv 2402.01306, eq. 7
    apo_zero_unpaired    w (1 - s(beta r)) if desirable, else w s(beta r)                      arXiv 2408.06266

kl is the mean log-ratio of mismatched sequences, each prompt with the completion of another one of the batch: a biased
estimate of the KL divergence that all sequences of a step share. Small vectors: plain torch is the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._layout import as_scalar, compute_dtype
from .._library import call, define_composite
from ..stats import KTOStats

TYPES = ("kto", "apo_zero_unpaired")

# stats is (6,) float64, KTO_FIELDS.
SCHEMA = (
    "kto_loss(Tensor logps, Tensor ref_logps, Tensor labels, Tensor? kl, Tensor? denominator, float beta, "
    "float desirable_weight, float undesirable_weight) -> (Tensor loss, Tensor stats)"
)


def kto_loss_reference(
    logps: Tensor,  # (B,) float32 or float64
    ref_logps: Tensor,  # (B,)
    labels: Tensor,  # (B,) bool
    kl: Tensor | None,  # ()
    denominator: Tensor | None,  # ()
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, Tensor]:
    ratios = logps - ref_logps
    gains = ratios if kl is None else ratios - kl.clamp(min=0)
    shortfall = torch.sigmoid(beta * torch.where(labels, -gains, gains))  # 1 - s(x) = s(-x)
    losses = torch.where(labels, desirable_weight * shortfall, undesirable_weight * shortfall)
    loss = losses.sum() / (max(logps.shape[0], 1) if denominator is None else denominator)
    rewards, sums = beta * ratios.detach().double(), logps.detach().double()
    columns = [x.where(kind, 0) for x in (rewards, sums) for kind in (labels, ~labels)]
    return loss, torch.stack([x.sum() for x in (*columns, labels.double(), (~labels).double())])


kto_loss_op = define_composite(SCHEMA, kto_loss_reference)


def kto_loss(
    logps: Tensor,  # (B,) float, sums over each sequence, as all below
    ref_logps: Tensor,  # (B,) float
    labels: Tensor,  # (B,) bool, True on desirable sequences
    kl: Tensor | float | None = None,  # () mean log-ratio of mismatched sequences of the whole step
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, KTOStats]:
    """(loss, stats): the mean over sequences, float32 (float64 for float64 inputs), and sums on the device.

    Differentiable in logps alone. kto needs `kl`, which counts as 0 where it is below; apo_zero_unpaired takes none.
    `denominator` replaces the number of sequences, as that of a whole step of which these are a part. No sequences
    give 0. Raises TypeError or ValueError for wrong dtypes, shapes, devices and options. Source: arXiv 2402.01306.
    """
    check.one_of("loss_type", loss_type, TYPES)
    check.number("beta", beta, above=0)
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        check.number(name, weight, 0)
    check.is_float("logps", logps)
    if logps.dim() != 1:
        raise ValueError(f"logps: expected (B,), got {tuple(logps.shape)}; see sequence_logprobs")
    check.is_tensor("ref_logps", ref_logps)
    check.like("ref_logps", ref_logps, "logps", logps)
    check.is_tensor("labels", labels)
    if labels.dtype != torch.bool:
        raise TypeError(f"labels: expected bool, True on desirable sequences, got {labels.dtype}; use .bool()")
    check.same_shape("labels", labels, "logps", logps.shape)
    check.same_device("labels", labels, "logps", logps)
    if (kl is None) != (loss_type != "kto"):
        expected = "the mean log-ratio of mismatched sequences" if kl is None else "None"
        raise ValueError(f"kl: expected {expected} with loss_type={loss_type!r}, got {kl!r:.80}")
    dtype = compute_dtype(logps, ref_logps)
    check.scalar("kl", kl, "logps", logps)
    check.scalar("denominator", denominator, "logps", logps, above=0)
    scalars = [as_scalar(x, dtype, logps.device) for x in (kl, denominator)]
    loss, stats = call(
        kto_loss_op, logps.to(dtype), ref_logps.detach().to(dtype), labels, *scalars,
        float(beta), float(desirable_weight), float(undesirable_weight),
    )  # fmt: skip
    return loss, KTOStats(stats)
