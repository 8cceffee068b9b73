"""Log-probabilities of whole sequences: sums, or means, of their counted tokens. Small vectors: plain torch is the
kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._layout import check_cu_seqlens, compute_dtype, segment_sums
from .._library import call, define_composite

SCHEMA = "sequence_logprobs(Tensor logprobs, Tensor? mask, Tensor? cu_seqlens, bool average) -> Tensor"


def sequence_logprobs_reference(
    logprobs: Tensor,  # (B, T) or (N,) float32 or float64
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    average: bool,
) -> Tensor:
    check_cu_seqlens(cu_seqlens, logprobs.shape[0] if logprobs.dim() == 1 else 0)
    counted = torch.ones_like(logprobs) if mask is None else mask.to(logprobs.dtype)
    kept = logprobs if mask is None else logprobs.masked_fill(~mask, 0)
    sums = segment_sums(kept, cu_seqlens)
    return sums / segment_sums(counted, cu_seqlens).clamp(min=1) if average else sums


sequence_logprobs_op = define_composite(SCHEMA, sequence_logprobs_reference)


def sequence_logprobs(
    logprobs: Tensor,  # (B, T) or (N,) float
    mask: Tensor | None = None,  # bool, True on tokens that count
    *,
    cu_seqlens: Tensor | None = None,  # (B+1,) int32 for packed (N,) tokens
    average: bool = False,
) -> Tensor:
    """Sums `(B,)` of the counted tokens' log-probabilities, or their means, in float32 (float64 for float64 input).

    Differentiable. Values under the mask may be NaN and change nothing; a sequence with no counted token gives 0.
    Raises TypeError or ValueError for wrong dtypes, shapes and devices.
    """
    check.is_float("logprobs", logprobs)
    check.token_layout("logprobs", logprobs, cu_seqlens)
    check.mask_like(mask, "logprobs", logprobs)
    return call(sequence_logprobs_op, logprobs.to(compute_dtype(logprobs)), mask, cu_seqlens, average)
