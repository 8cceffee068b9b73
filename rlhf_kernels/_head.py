"""The products of a language model's head, chunk by chunk, for the ops that never hold its logits.

    logits   = logit_scale * (hidden @ weight.T + bias)        a chunk of tokens, or of the vocabulary, at a time
    d_hidden = logit_scale * d_logits @ weight
    d_weight = logit_scale * d_logits.T @ hidden
    d_bias   = logit_scale * d_logits.sum(0)

What is rounded when. On a CPU everything is computed in float32 (float64 where an input is): 16-bit operands are
widened, exactly. On a GPU the operands keep their 16 bits, the tensor cores add in float32, and a logit is rounded once,
to `logits_dtype`; its gradient is rounded once, to the operands' dtype. Sums over chunks are taken in float32 in either
place, and a gradient is rounded to its input's dtype once, at the end. There are no atomics: the same call on the same
machine gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks as check
from ._layout import compute_dtype

# Bytes of a chunk of logits. CPU (2 cores of a Xeon with AVX-512, 1024 x 512 x 32000 float32, 2026-11-25): against one
# product over all tokens, chunks of 512 tokens take 1.14 times as long, 256 tokens 1.3, 64 tokens 1.34; splits of the
# vocabulary of 4,096 columns 0.96, 0.84 for the weight's gradient. GPU: no measurement yet; at a vocabulary of 128,256 in
# bfloat16 these are 2,093 tokens, and adding a chunk to the weight's gradient moves 1 byte for every 2,000 flops.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
SPLIT_COLUMNS = 4096  # of a chunk that may split the vocabulary, on a CPU: the row work finds it in the cache


@dataclass(frozen=True)
class Chunking:
    """How an op on hidden states cuts its logits; pass it as `chunk_size` to say more than a number of tokens."""

    tokens: int | None = None  # None: chosen from the sizes; a chunk of logits then takes at most CHUNK_BYTES
    logits_dtype: torch.dtype | None = None  # on a GPU: None is the products' dtype; float32 does not round logits

    def __post_init__(self) -> None:
        tokens = self.tokens
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise ValueError(f"chunk_size: expected a number of tokens >= 1 or None, got {tokens!r}")
        if self.logits_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"logits_dtype: expected a floating dtype or None, got {self.logits_dtype!r}")
