"""TRL's functions on our ops: what its SFT, DPO, KTO, GRPO and RLOO trainers score tokens with.

In TRL 1.16 all five give their model a fused head (add_fused_lm_head), whose work ChunkedLogProbFunction does; the
experimental trainers (CPO, ORPO, ...) call selective_log_softmax and entropy_from_logits on logits. With `patch("trl")`
these run on linear_token_logprobs and token_logprobs, and positions that are not scored are not projected, which TRL
does on GPUs only. Results are float32 (float64 for float64 inputs), but for logits of 16 bits on a CPU, where TRL works
in their dtype, and so do these: its tests compare the bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.linear_token_logprobs import STATISTICS, with_statistics
from ..ops.token_logprobs import token_logprobs

SUPPORTED = ("1.16", "1.17")
IGNORE_INDEX = -100


class ChunkedLogProbs(NamedTuple):
    """What TRL's function returns, (N,) each; None where `outputs` does not name it."""

    log_probs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None  # bool


class ChunkedLogProbFunction:
    """trl.kernels.ChunkedLogProbFunction: `apply` is all that TRL calls."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,  # of the vocabulary, in TRL; ours cuts tokens, by its own rule
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *STATISTICS),
    ) -> ChunkedLogProbs:
        """Differentiable through log_probs and entropy, as TRL's. On a CPU the products run in float32 also under
        autocast; on a GPU in the autocast dtype, or in the wider of the two operands' where TRL takes the hidden
        states'. Raises NotImplementedError for a head that DeepSpeed's ZeRO stage 3 partitions: TRL gathers it again in
        its backward."""
        if hasattr(weight, "ds_id"):
            raise NotImplementedError(
                "weight: expected a whole head, got one that ZeRO stage 3 partitions; rlhf_kernels.unpatch('trl') "
                "returns to TRL's own function, stage 2 needs none"
            )
        wanted = tuple(name for name in STATISTICS if name in outputs)
        log_probs, entropy, statistics = with_statistics(
            hidden, weight, targets, wanted, bias=bias, temperature=temperature, softcap=final_logit_softcapping,
            logit_scale=logit_scale, ignore_index=IGNORE_INDEX, return_entropy="entropy" in outputs,
        )  # fmt: skip
        found = dict(zip(wanted, statistics.unbind() if wanted else ()))
        return ChunkedLogProbs(
            log_probs,
            entropy if "entropy" in outputs else None,
            found.get("log_sum_sq_probs"),
            found.get("mean_logits"),
            found["is_top1"].bool() if "is_top1" in wanted else None,
        )


def _projects_scored_positions_only(device: torch.device) -> bool:
    """In place of TRL's _use_triton where add_fused_lm_head asks it whether to drop positions before the head: no on
    devices that compile for a shape, as in TRL, but yes on a CPU."""
    return device.type in ("cpu", "cuda", "xpu")


def _ids(index: Tensor, row_mask: Tensor | None) -> Tensor:
    index = index if index.dtype in (torch.int64, torch.int32) else index.long()
    return index if row_mask is None else index.masked_fill(row_mask == 0, IGNORE_INDEX)


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError("temperature must be positive")


def _in_their_dtype(logits: Tensor) -> bool:
    return logits.is_cpu and logits.dtype in (torch.bfloat16, torch.float16)


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...) or (..., K)
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # of index's shape; 0 where the result is 0
) -> Tensor:
    """log_softmax(logits / temperature) gathered at index; K ids a row are plain torch, in the dtype of the logits."""
    _check_temperature(temperature)
    several = index.dim() == logits.dim()
    if not several and not _in_their_dtype(logits):
        return token_logprobs(logits, _ids(index, row_mask), temperature=temperature)
    z = logits if temperature == 1.0 else logits / temperature
    if several and z.dtype in (torch.float32, torch.float64):  # a row at a time, as TRL does for its memory
        logprobs = z.gather(-1, index) - torch.stack([row.logsumexp(-1) for row in z])[..., None]
    else:
        logprobs = z.log_softmax(-1).gather(-1, index if several else index[..., None])
    logprobs = logprobs if several else logprobs[..., 0]
    return logprobs if row_mask is None else logprobs.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:  # (..., V) -> (...)
    """Entropy in nats, differentiable; `chunk_size` is not needed."""
    if _in_their_dtype(logits):
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)
    index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_logprobs(logits, index, return_entropy=True)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...)
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # (...); 0 where both results are 0
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) `(...)` of the tempered distribution, in one pass over the logits."""
    _check_temperature(temperature)
    if _in_their_dtype(logits):
        z = logits if temperature == 1.0 else logits / temperature
        logprobs, entropy = selective_log_softmax(z, index, row_mask=row_mask), entropy_from_logits(z)
        entropy = entropy if row_mask is None else entropy.masked_fill(row_mask == 0, 0.0)
    else:
        ids = _ids(index, row_mask)
        logprobs, entropy = token_logprobs(logits, ids, temperature=temperature, return_entropy=True)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


REPLACEMENTS = {
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction": ChunkedLogProbFunction,
    "trl.trainer.utils._ChunkedLogProbFunction": ChunkedLogProbFunction,  # the same under the name of an import
    "trl.trainer.utils._use_triton": _projects_scored_positions_only,
    "trl.trainer.utils.selective_log_softmax": selective_log_softmax,
    "trl.trainer.utils.entropy_from_logits": entropy_from_logits,
    "trl.trainer.utils.selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
}
