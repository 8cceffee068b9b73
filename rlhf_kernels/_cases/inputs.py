"""Random inputs of the battery's cases, float64, and the layouts that token ops meet."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def logits(
    generator,
    rows=(3, 5),
    vocab=127,
    offset=0.0,
    scale=3.0,
    minus_inf=False,
    ignored=False,
    ids=torch.int64,
    temperatures=False,
):
    logits = torch.randn(*rows, vocab, generator=generator, dtype=torch.float64) * scale + offset
    token_ids = torch.randint(0, vocab, rows, generator=generator).to(ids)
    if minus_inf:
        banned = torch.rand(logits.shape, generator=generator) < 0.3
        logits.masked_fill_(banned.scatter(-1, token_ids.long()[..., None], False), -float("inf"))
    if ignored:
        token_ids.masked_fill_(torch.rand(rows, generator=generator) < 0.4, -100)
    out = {"logits": logits, "token_ids": token_ids}
    if temperatures:
        out["temperature"] = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5
    return out


def two_logprobs(generator, shape=(4, 9), spread=0.3):
    logprobs = -torch.rand(shape, generator=generator, dtype=torch.float64) * 8
    return {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + spread * torch.randn(shape, generator=generator, dtype=torch.float64),
    }


def _mask(generator, shape, kind):
    if kind == "gaps":
        return torch.rand(shape, generator=generator) < 0.6
    if kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    lengths = torch.randint(0, shape[-1] + 1, (shape[0], 1), generator=generator)
    right_padded = torch.arange(shape[-1]) < lengths
    return right_padded.flip(-1) if kind == "left" else right_padded


def tokens(generator, names, shape=(4, 13), mask="right", packed=False, per_sequence=(), offset=0.0):
    """Random per-token inputs in either layout, with per-sequence ones beside them."""
    out = {}
    n_sequences = shape[0]
    if packed:
        lengths = torch.randint(0, shape[1] + 1, (n_sequences,), generator=generator)
        lengths[0] = 0  # an empty sequence
        out["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
        shape = (int(lengths.sum()),)
        mask = mask if mask in (None, "none") else "gaps"
    for name in names:
        out[name] = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    for name in per_sequence:
        out[name] = torch.randn(n_sequences, generator=generator, dtype=torch.float64)
    if mask is not None:
        out["mask"] = _mask(generator, shape, mask)
    return out


def sequences(like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Flat indices of the counted tokens of each sequence, in order."""
    counted = torch.ones_like(like, dtype=torch.bool) if mask is None else mask
    bounds = [i * like.shape[1] for i in range(like.shape[0] + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    flat = counted.reshape(-1)
    return [flat[a:b].nonzero()[:, 0] + a for a, b in pairwise(bounds)]


LAYOUTS = {
    "right_padded": {}, "left_padded": {"mask": "left"}, "gaps": {"mask": "gaps", "shape": (5, 21)},
    "packed": {"packed": True, "mask": None}, "packed_gaps": {"packed": True, "shape": (6, 17)},
    "all_masked": {"mask": "none"}, "no_mask": {"mask": None}, "one_step": {"shape": (3, 1)},
    "no_sequences": {"shape": (0, 5)}, "no_steps": {"shape": (3, 0), "mask": None},
    "long": {"shape": (2, 700), "mask": "gaps"}, "many": {"shape": (300, 3)},
}  # fmt: skip

THOROUGH = ("right_padded", "packed", "no_sequences")  # the layouts that go through the slow checks too
