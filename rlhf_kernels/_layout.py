"""The two token layouts: padded (B, T), and packed (N,) with cu_seqlens (B+1,) int32. Sequence b of a packed tensor
is [cu[b], cu[b+1])."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import invalid


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any input is float64, else float32: the dtype of every per-token result."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def prepare(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """What a per-token kernel takes: the compute dtype, contiguous. No copy when it is so already; differentiable."""
    if tensor is None:
        return None
    return (tensor if dtype is None else tensor.to(dtype)).contiguous()


def as_scalar(value: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:  # ()
    """A constant of a loss: no gradient goes into it."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else prepare(value.detach(), dtype)
    return torch.full((), float(value), dtype=dtype, device=device)


def check_cu_seqlens(cu_seqlens: Tensor | None, n_tokens: int) -> None:
    """Refuses bounds that do not run from 0 to N without falling; on the CPU only, where looking is free."""
    if type(cu_seqlens) is not Tensor or cu_seqlens.device.type != "cpu":  # None, or the compiler's stand-in
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != n_tokens or bool((cu_seqlens.diff() < 0).any()):
        raise invalid(
            f"cu_seqlens: expected bounds that rise from 0 to {n_tokens}, the number of tokens, "
            f"got {cu_seqlens.tolist()[:8]}"
        )


def full_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask


def sequence_ids(
    like: Tensor,  # (B, T) or (N,)
    cu_seqlens: Tensor | None,  # (B+1,) int32
) -> Tensor:
    """The sequence that each token belongs to, int64, in the shape of `like`; no host sync."""
    if cu_seqlens is None:
        return torch.arange(like.shape[0], device=like.device)[:, None].expand(like.shape)
    token = torch.arange(like.shape[0], device=like.device, dtype=torch.int32)
    last = max(cu_seqlens.shape[0] - 2, 0)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True).clamp_(max=last)


def sequence_sums(
    x: Tensor,  # (B, T) or (N,)
    cu_seqlens: Tensor | None,
    n_sequences: int,
) -> Tensor:
    """Sums over each sequence, (B,)."""
    if cu_seqlens is None:
        return x.sum(-1)
    return x.new_zeros(n_sequences).index_add_(0, sequence_ids(x, cu_seqlens), x) if n_sequences else x.new_zeros(0)


def segment_sums(
    x: Tensor,  # (B, T) or (N,)
    cu_seqlens: Tensor | None,  # (B+1,)
) -> Tensor:
    """Sums over each sequence, (B,): differentiable, in a fixed order on every device, unlike index_add_ on a GPU."""
    if cu_seqlens is None:
        return x.sum(-1)
    if cu_seqlens.shape[0] == 1:
        return x.new_zeros(0)
    # Nobody looked at bounds on a GPU or under the compiler: they must not lead outside x.
    inner = cu_seqlens[:-1].long().clamp(0, x.shape[0]).cummax(0).values
    offsets = torch.cat([inner, inner.new_full((1,), x.shape[0])])
    return torch.segment_reduce(x, "sum", offsets=offsets, initial=0, unsafe=True)


def last_counted(
    mask: Tensor,  # (B, T) or (N,) bool
    cu_seqlens: Tensor | None,
    n_sequences: int,
) -> Tensor:
    """True on the last counted token of every sequence, in the shape of `mask`."""
    position = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    counted = torch.where(mask, position, -1)
    if cu_seqlens is None:
        return mask & (position == counted.amax(-1, keepdim=True)) if mask.numel() else mask
    ids = sequence_ids(mask, cu_seqlens)
    last = torch.full((max(n_sequences, 1),), -1, device=mask.device, dtype=position.dtype)
    return mask & (position == last.scatter_reduce(0, ids, counted, "amax")[ids])


def to_padded(
    packed: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (B+1,) int32
) -> Tensor:
    """(B, T) with T the longest sequence, zeros after the end of each. Reads cu_seqlens on the host: for references,
    not for kernels."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    position = torch.arange(longest, device=packed.device)
    inside = position < lengths[:, None]
    index = (cu_seqlens[:-1, None] + position).clamp_(max=max(packed.shape[0] - 1, 0))
    return packed[index].masked_fill(~inside, 0) if packed.shape[0] else packed.new_zeros(inside.shape)


def to_packed(
    padded: Tensor,  # (B, T)
    cu_seqlens: Tensor,
) -> Tensor:
    """Undoes to_padded."""
    return padded[torch.arange(padded.shape[1], device=padded.device) < cu_seqlens.diff()[:, None]]
