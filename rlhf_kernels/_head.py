"""The products of a language model's head, a chunk at a time, for the ops that never hold its logits.

    logits   = logit_scale * (hidden @ weight.T + bias)     of a chunk of tokens, or a tile of tokens and vocabulary
    d_hidden = logit_scale * d_logits @ weight
    d_weight = logit_scale * d_logits.T @ hidden
    d_bias   = logit_scale * d_logits.sum(0)

What is rounded when. On a CPU everything is computed in float32 (float64 where an input is): operands of 16 bits are
widened, which is exact. On a GPU the operands keep their 16 bits and the tensor cores add in float32; a logit is
rounded once, to `logits_dtype`, its gradient once, to the operands' dtype. Sums over chunks are taken in float32 in
either place, and a gradient is rounded to its input's dtype once, at the end.

What is reproducible. There are no atomics, and sums over chunks have a fixed order: the same call on the same machine,
torch and number of threads gives the same bits wherever the library's products do (on a CPU here: asserted by a test;
cuBLAS: one stream, or CUBLAS_WORKSPACE_CONFIG=:4096:8). Another chunk size or batch may change the last bits, because
a product of other sizes adds in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from . import _checks as check
from ._layout import compute_dtype
from ._library import invalid

# A chunk holds at most this many bytes of logits, but no fewer tokens than MIN_TOKENS: a product over few tokens, and
# the addition of a chunk to the weight's gradient, cost reads and writes of the whole weight. CPU: on 2 cores of a Xeon
# with AVX-512, 1024 x 512 x 32000 float32 on 2026-11-25, the three products in chunks of 128, 256 or 512 tokens take
# 1.02, 0.99 and 1.02 times as long as at once, and fresh memory costs 0.14 ms a MiB. GPU: not measured; by arithmetic,
# 2048 tokens make the additions to a float32 gradient of 128256 x 4096 a tenth of the products' time.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
MIN_TOKENS = {"cpu": 256, "cuda": 2048}
# Where logits are computed again, a GPU splits the vocabulary, into no fewer columns than these: by arithmetic that
# spares the additions to d_weight. A CPU takes the chunks of the forward, whose logits come again to the bit: those of
# another shape of product did not, and at an offset of 1e4 (257 x 64 x 50257, 2026-11-25) cost d_hidden a digit.
MIN_COLUMNS = {"cpu": None, "cuda": 1024}
CHUNKED = "chunked products"  # what backends() calls the kernel of an op on hidden states; its row work is an op too
IGNORED = -(1 << 62)  # an id that no caller has


# MKL, which torch.mm calls on x86, leaves AVX-512 aside on processors of AMD; oneDNN, also within torch, does not: on 2
# cores of a Zen 5 (2026-11-25) logits of 262 x 128 x 32000 float32 come at 410 GFLOP/s, not 180. But it adds along a
# row in one chain where MKL starts again after 384 terms, so beyond that it would cost a digit.
ONEDNN_WIDTH = 384


def _prefers_onednn() -> bool:
    try:
        from . import _host
    except ImportError:
        return False
    if not (_host.cpu_is_amd() and torch.backends.mkldnn.is_available()):
        return False
    one = torch.ones(1, 1)
    try:  # not a public op: another torch may have another
        return torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "").item() == 1
    except (AttributeError, RuntimeError, TypeError):
        return False


ONEDNN = _prefers_onednn()


@dataclass(frozen=True)
class Chunking:
    """How an op on hidden states cuts its logits; pass it as `chunk_size` to say more than a number of tokens."""

    tokens: int | None = None  # of a chunk of full rows of logits; None: chosen from the sizes
    logits_dtype: torch.dtype | None = None  # on a GPU: None is the products' dtype; float32 leaves logits unrounded

    def __post_init__(self) -> None:
        tokens = self.tokens
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise ValueError(f"chunk_size: expected a number of tokens >= 1 or None, got {tokens!r}")
        if self.logits_dtype not in (None, *check.FLOATS):
            raise TypeError(f"logits_dtype: expected a floating dtype or None, got {self.logits_dtype!r}")


@dataclass(frozen=True)
class Plan:
    """What a public function settles for its op; the fields go into the schema as `PLAN_SCHEMA`, in this order."""

    logit_scale: float
    chunk_tokens: int
    product_dtype: torch.dtype
    logits_dtype: torch.dtype

    def __iter__(self) -> Iterator:
        return iter((self.logit_scale, self.chunk_tokens, self.product_dtype, self.logits_dtype))


PLAN_SCHEMA = "float logit_scale, int chunk_tokens, ScalarType product_dtype, ScalarType logits_dtype"


def plan(
    hidden: Tensor, weight: Tensor, logit_scale: float, chunk_size: int | Chunking | None, *others: Tensor
) -> Plan:
    """Chunk size and dtypes of a call; `others` are operands too. Under autocast on a GPU the products run in its
    dtype, as F.linear's would."""
    check.number("logit_scale", logit_scale)
    chunking = chunk_size if isinstance(chunk_size, Chunking) else Chunking(chunk_size)
    device, dtype = hidden.device.type, reduce(torch.promote_types, [x.dtype for x in (hidden, weight, *others)])
    if dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if device == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    logits_dtype = chunking.logits_dtype or dtype
    if logits_dtype not in (dtype, compute_dtype(hidden, weight, *others)):
        raise TypeError(
            f"logits_dtype: expected {dtype}, in which the products run here, or "
            f"{compute_dtype(hidden, weight, *others)}, got {logits_dtype}"
        )
    row = max(weight.shape[0], 1) * logits_dtype.itemsize
    kind = device if device in CHUNK_BYTES else "cuda"
    tokens = chunking.tokens or max(MIN_TOKENS[kind], CHUNK_BYTES[kind] // row)
    return Plan(float(logit_scale), tokens, dtype, logits_dtype)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden (..., H), weight (V, H), bias (V,), whole and on one device."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        check.is_float(name, tensor)
        check.same_device(name, tensor, "hidden", hidden)
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name}: expected a whole tensor, got a DTensor, which holds a shard; gather it where autograd sees "
                "it (FSDP2: lm_head.unshard() before this call, or wrap the head together with the final norm), not by "
                "full_tensor(), whose gradient is wrong here"
            )
    if weight.dim() != 2:
        raise ValueError(f"weight: expected (V, H), got {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        expected = f"expected (..., {weight.shape[1]}) for weight {tuple(weight.shape)}"
        raise ValueError(f"hidden: {expected}, got {tuple(hidden.shape)}")
    if bias is not None:
        check.same_shape("bias", bias, "the vocabulary", weight.shape[:1])


def check_ids(token_ids: Tensor, counted: Tensor, vocab: int) -> None:
    """Refuses a counted id outside [0, vocab), with its position; on the CPU only, where looking is free."""
    if token_ids.device.type != "cpu":
        return
    bad = ((token_ids < 0) | (token_ids >= vocab)) & counted
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise invalid(f"token_ids: expected ids in [0, {vocab}), got {int(token_ids[at])} at position {at}")


class Rows:
    """The tokens that count, of per-token tensors (..., *rest) flattened to (n, *rest).

    On a CPU the others are dropped, so they are never projected. On a GPU their number is not known without waiting for
    the device: they stay, with `fill` in place of what they hold, and `put` makes their results 0. `order` puts the
    tokens into another order, by their flat positions.
    """

    def __init__(self, counted: Tensor, order: Tensor | None = None) -> None:  # (...) bool, (N,) int64
        self.shape, self.index = counted.shape, order
        self.counted = counted.reshape(-1) if order is None else counted.reshape(-1)[order]
        if counted.device.type == "cpu":
            kept = self.counted.nonzero()[:, 0]
            if len(kept) < counted.numel():
                self.index = kept if order is None else order[kept]
            self.counted = None

    def take(self, x: Tensor | None, fill: float = 0) -> Tensor | None:
        if x is None:
            return None
        x = x.reshape(self.shape.numel(), *x.shape[len(self.shape) :])
        x = x if self.index is None else x[self.index]
        return x if self.counted is None else x.masked_fill(~self._mask(x), fill)

    def ids(self, token_ids: Tensor) -> Tensor:  # (n,) int64, IGNORED where a row stays without counting
        return self.take(token_ids.long(), IGNORED).contiguous()

    def put(self, x: Tensor) -> Tensor:
        """(n, *rest) back to (..., *rest), 0 at the tokens that do not count."""
        shape = (*self.shape, *x.shape[1:])
        x = x if self.counted is None else x.masked_fill(~self._mask(x), 0)
        if self.index is None:
            return x.view(shape)
        return x.new_zeros(self.shape.numel(), *x.shape[1:]).index_copy_(0, self.index, x).view(shape)

    def _mask(self, x: Tensor) -> Tensor:
        return self.counted.view(-1, *[1] * (x.dim() - 1))


class Head:
    """The operands of one call, in the dtype of the products, and one buffer for the chunk of logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> None:  # (N, H), (V, H), (V,)
        self.hidden, self.weight = (x.to(plan.product_dtype).contiguous() for x in (hidden, weight))
        self.bias = None if bias is None else bias.to(plan.logits_dtype).contiguous()
        self.plan = plan
        self._buffer: Tensor | None = None

    def chunks(self) -> list[tuple[slice, slice]]:
        """(tokens, the whole vocabulary) a piece: what an op needs that looks at whole rows."""
        n, size, everything = self.hidden.shape[0], self.plan.chunk_tokens, slice(0, self.weight.shape[0])
        return [(slice(i, min(i + size, n)), everything) for i in range(0, n, size)]

    def tiles(self) -> list[tuple[slice, slice]]:
        """(tokens, columns of the vocabulary) a piece, of a chunk's size, for an op that computes logits again. Columns
        outermost: what is left to be summed is d_hidden, which is small beside d_weight."""
        n, v = self.hidden.shape[0], self.weight.shape[0]
        least = MIN_COLUMNS["cpu" if self.hidden.is_cpu else "cuda"]
        if least is None or not (n and v):
            return self.chunks()
        size = self.plan.chunk_tokens * v
        columns = min(v, max(least, size // n // 128 * 128))  # rows of a tile start at 16 bytes
        tokens = max(1, size // columns)
        starts = [(i, j) for j in range(0, v, columns) for i in range(0, n, tokens)]
        return [(slice(i, min(i + tokens, n)), slice(j, min(j + columns, v))) for i, j in starts]

    def gradient(self, logits: Tensor) -> Tensor:  # (n, v) in the products' dtype
        """Where the gradient of a chunk goes: over the logits, unless its dtype differs from theirs."""
        return logits if logits.dtype == self.hidden.dtype else torch.empty_like(logits, dtype=self.hidden.dtype)

    def logits(self, tokens: slice, columns: slice) -> Tensor:  # (n, v), valid until the next call
        hidden, weight, scale = self.hidden[tokens], self.weight[columns], self.plan.logit_scale
        bias = None if self.bias is None else self.bias[columns]
        if ONEDNN and hidden.is_cpu and hidden.dtype == torch.float32 and 0 < hidden.shape[1] <= ONEDNN_WIDTH:
            if self._buffer is not None:
                self._buffer.set_()  # it comes in fresh memory: what the last ones held goes first
            self._buffer = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
            return self._buffer if scale == 1 else self._buffer.mul_(scale)
        size = hidden.shape[0] * weight.shape[0]
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = hidden.new_empty(size, dtype=self.plan.logits_dtype)
        out = self._buffer[:size].view(hidden.shape[0], weight.shape[0])
        if bias is not None and out.dtype == hidden.dtype:
            return torch.addmm(bias, hidden, weight.t(), beta=scale, alpha=scale, out=out)
        accumulate(out, hidden, weight.t(), scale, first=True)
        return out if bias is None else out.add_(bias, alpha=scale)


# d_hidden of fewer tokens is summed over blocks of the vocabulary: for few rows MKL adds all of it in one chain (as
# measured on AMD, 2026-11-25), with ten times the error that it has for many.
FEW_TOKENS, VOCABULARY_BLOCK = 32, 1024


def _blockwise(a: Tensor, b: Tensor) -> Tensor:  # (n, v) @ (v, h)
    whole = a.shape[1] // VOCABULARY_BLOCK * VOCABULARY_BLOCK
    blocks = a[:, :whole].unflatten(1, (-1, VOCABULARY_BLOCK)).transpose(0, 1)
    parts = torch.bmm(blocks, b[:whole].unflatten(0, (-1, VOCABULARY_BLOCK))).sum(0)
    return parts.addmm_(a[:, whole:], b[whole:])


def accumulate(out: Tensor, a: Tensor, b: Tensor, scale: float, first: bool) -> None:
    """out = scale * a @ b, or out += where not first; `out` may be float32 for operands of 16 bits (GPUs)."""
    if a.is_cpu and a.shape[0] < FEW_TOKENS and a.shape[1] > max(VOCABULARY_BLOCK, b.shape[1]):
        part = _blockwise(a, b).mul_(scale)
        out.copy_(part) if first else out.add_(part)
        return
    options = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if first and scale == 1:
        torch.mm(a, b, **options, out=out)
    else:
        torch.addmm(out, a, b, **options, beta=0 if first else 1, alpha=scale, out=out)


class HeadGradients:
    """Sums d_hidden, d_weight and d_bias over `pieces`, (tokens, columns) each; every one only if it is wanted."""

    def __init__(
        self,
        head: Head,
        inputs: tuple[Tensor, Tensor, Tensor | None],  # hidden, weight, bias as they came
        wants: tuple[bool, bool, bool],
        pieces: list[tuple[slice, slice]],
        rounded: bool = True,  # to the inputs' dtypes at the end; False: wide, for an upstream gradient yet to come
    ) -> None:
        self.head, self.wants = head, wants
        wide, narrow = compute_dtype(head.hidden), head.hidden.dtype
        self.dtypes = [wide if x is None or not rounded else x.dtype for x in inputs]
        (n, h), v = head.hidden.shape, head.weight.shape[0]

        def sums(axis: int, size: int, whole: int, dtype: torch.dtype) -> Tensor:
            """What one product writes, and is to be narrow, needs no wider sum: the tensor cores add in float32."""
            once = all(piece[axis].stop - piece[axis].start == whole for piece in pieces)
            return head.hidden.new_empty((size, h), dtype=narrow if once and dtype == narrow else wide)

        self.hidden = sums(1, n if wants[0] else 0, v, self.dtypes[0])
        self.weight = sums(0, v if wants[1] else 0, n, self.dtypes[1])
        self.bias = head.hidden.new_zeros(v if wants[2] else 0, dtype=wide)
        if not pieces:
            self.hidden.zero_(), self.weight.zero_()

    def add(self, tokens: slice, columns: slice, d_logits: Tensor) -> None:  # (n, v) in the products' dtype
        head, scale = self.head, self.head.plan.logit_scale
        if self.wants[0]:
            accumulate(self.hidden[tokens], d_logits, head.weight[columns], scale, first=columns.start == 0)
        if self.wants[1]:
            accumulate(self.weight[columns], d_logits.t(), head.hidden[tokens], scale, first=tokens.start == 0)
        if self.wants[2]:
            self.bias[columns] += scale * d_logits.sum(0, dtype=self.bias.dtype)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the inputs' dtypes if rounded; empty where not wanted."""
        sums = (self.hidden, self.weight, self.bias)
        return tuple(x.to(dtype) for x, dtype in zip(sums, self.dtypes))


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """A wide gradient that was formed for an upstream gradient of 1, rounded once. On a GPU looking whether it is 1
    would wait for it."""
    looked_at = type(upstream) is Tensor and upstream.device.type == "cpu"
    return (gradient if looked_at and float(upstream) == 1 else gradient * upstream).to(dtype)
