"""From hidden states of chosen and rejected sequences to a preference loss and the gradients of the head.

    logits   = logit_scale * (hidden @ weight.T + bias)
    logps    = sequence_logprobs(token_logprobs(logits, token_ids), mask)
    loss     = dpo_loss(logps[:B], logps[B:], ref_logps[:B], ref_logps[B:], the counts of the mask)

Three matrix products where the loss is a sum over pairs: tokens are ordered by pair, a chunk holds whole pairs, and
the gradient is formed over its logits while they are alive. Four where it is not (aot, aot_unpaired), where a pair is
longer than a chunk, and on a GPU for packed sequences whose bounds lie there: planning by pairs would wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._head import CHUNKED, IGNORED, PLAN_SCHEMA, Chunking, Head, HeadGradients, Plan, Rows, check_ids, plan, scaled
from .._layout import check_cu_seqlens, compute_dtype, full_mask, prepare, segment_sums, sequence_ids
from .._library import call, define, once_differentiable
from ..stats import DPOStats
from .dpo_loss import (
    N_OPTIONS,
    OPTIONS_SCHEMA,
    OVER_THE_BATCH,
    DPOOptions,
    check_denominators,
    check_reference,
    divisors_of,
    dpo_loss_op,
    pair_terms,
)
from .linear_token_logprobs import check_linear, fake_gradients
from .token_logprobs import split_temperature, token_logprobs_backward_into, token_logprobs_op

# stats is (7,) float64, DPO_FIELDS; logps (2B,); a gradient that is not asked for is empty.
SCHEMA = (
    "linear_dpo_loss(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, Tensor? ref_logps, Tensor? mask, "
    "Tensor? cu_seqlens, Tensor? temperatures, Tensor? denominators, float temperature, float? softcap, "
    f"{OPTIONS_SCHEMA}, {PLAN_SCHEMA}, bool grad_hidden, bool grad_weight, bool grad_bias) "
    "-> (Tensor loss, Tensor stats, Tensor logps, Tensor d_hidden, Tensor d_weight, Tensor d_bias)"
)
N_ARGUMENTS = 26


class _Pairs:
    """Which tokens belong to which pair: B pairs, of sequences i and B + i."""

    def __init__(self, counted: Tensor, cu_seqlens: Tensor | None) -> None:  # (2B, T) or (N,) bool
        padded = cu_seqlens is None
        bounds = None if padded else cu_seqlens.to(counted.device, non_blocking=True)
        self.count = counted.shape[0] // 2 if padded else (cu_seqlens.shape[0] - 1) // 2
        self.sequence = sequence_ids(counted, bounds).reshape(-1)
        self.lengths = segment_sums(counted.double(), bounds)  # (2B,)
        # pair-major: chosen and rejected of a pair side by side, their tokens in order
        self.order = torch.argsort(self.sequence % max(self.count, 1), stable=True)
        self.on_host = padded or cu_seqlens.device.type == "cpu"
        if counted.device.type == "cpu":
            sizes = self.lengths.long()
        else:  # rows that do not count stay
            sizes = torch.full((2 * self.count,), counted.shape[1]) if padded else cu_seqlens.diff()
        self.sizes = sizes.view(2, -1).t().reshape(-1).tolist() if self.on_host else []  # of each half of each pair

    def chunks(self, tokens: int) -> list[range] | None:
        """Ranges of pairs whose tokens fit in a chunk; None where they do not, or where their sizes are not known."""
        if not self.on_host:
            return None
        out, start, held = [], 0, 0
        for pair in range(self.count):
            size = sum(self.sizes[2 * pair : 2 * pair + 2])
            if size > tokens:
                return None
            if held + size > tokens:
                out.append(range(start, pair))
                start, held = pair, 0
            held += size
        return [*out, range(start, self.count)] if self.count else []


class _Call:
    """One call: its operands, and the loss's slopes from log-probabilities of sequences."""

    def __init__(
        self, hidden, weight, token_ids, bias, ref_logps, mask, cu_seqlens, temperatures, whole, options, settled
    ):
        counted = full_mask(mask, token_ids)
        check_ids(token_ids, counted, weight.shape[0])
        self.pairs, self.options = _Pairs(counted, cu_seqlens), options
        self.rows = Rows(counted, self.pairs.order)
        self.head = Head(self.rows.take(hidden), weight, bias, settled)
        self.ids, self.temperatures = self.rows.ids(token_ids), self.rows.take(temperatures)
        self.dtype = compute_dtype(hidden, weight, ref_logps)
        self.halves = [None, None] if ref_logps is None else list(ref_logps.chunk(2))
        self.halves += [x.to(self.dtype) for x in self.pairs.lengths.chunk(2)]
        self.divisors = divisors_of(whole, self.pairs.count, self.halves[2])

    def score(self, logits: Tensor, tokens: slice, temperature: float, softcap: float | None) -> tuple[Tensor, ...]:
        per_row = None if self.temperatures is None else self.temperatures[tokens]
        return token_logprobs_op(logits, self.ids[tokens], per_row, temperature, softcap, IGNORED, False)

    def slopes(self, chosen: Tensor, rejected: Tensor, pairs: slice) -> Tensor:  # (2, pairs)
        of_pairs = [None if x is None else x[pairs] for x in self.halves]
        terms = pair_terms(chosen, rejected, *of_pairs, self.options, *self.divisors)
        return torch.stack(terms[1:])

    def descend(self, logits: Tensor, tokens: slice, columns: slice, slope: Tensor, found, shaping: tuple) -> Tensor:
        """The gradient of a piece's logits, for the slope of each of its tokens."""
        grad = self.head.gradient(logits)
        per_row = None if self.temperatures is None else self.temperatures[tokens]
        token_logprobs_backward_into(
            grad, slope, None, None if grad is logits else logits, self.ids[tokens], per_row, *found, *shaping, IGNORED,
            columns.start,
        )  # fmt: skip
        return grad


def _three_products(run: _Call, chunks: list[range], shaping: tuple, wants, inputs) -> tuple[Tensor, HeadGradients]:
    bounds = torch.tensor([0, *run.pairs.sizes]).cumsum(0)  # of the halves of the pairs, on the host
    on_device = bounds.to(run.head.weight.device, non_blocking=True)
    whole = slice(0, run.head.weight.shape[0])
    places = [slice(int(bounds[2 * c.start]), int(bounds[2 * c.stop])) for c in chunks]
    logps = run.head.hidden.new_zeros(2, run.pairs.count, dtype=run.dtype)
    sums = HeadGradients(
        run.head, inputs, wants, [(tokens, whole) for tokens in places if tokens.stop > tokens.start], rounded=False
    )
    for pairs, tokens in zip(chunks, places):
        if tokens.stop == tokens.start:
            continue
        logits = run.head.logits(tokens, whole)
        found = run.score(logits, tokens, *shaping)
        local = on_device[2 * pairs.start : 2 * pairs.stop + 1] - on_device[2 * pairs.start]
        part = segment_sums(found[0].to(run.dtype), local).view(-1, 2).t()
        at = slice(pairs.start, pairs.stop)
        logps[:, at] = part
        if any(wants):
            slopes = run.slopes(*part, at).t().reshape(-1)
            per_token = slopes.repeat_interleave(local.diff(), output_size=tokens.stop - tokens.start)
            per_token = per_token.to(found[0].dtype)
            sums.add(tokens, whole, run.descend(logits, tokens, whole, per_token, found[1:], shaping))
    return logps.reshape(-1), sums


def _four_products(run: _Call, shaping: tuple, wants, inputs) -> tuple[Tensor, HeadGradients]:
    n = run.ids.shape[0]
    saved = [run.head.hidden.new_empty(n, dtype=compute_dtype(run.head.hidden)) for _ in range(3)]
    for tokens, columns in run.head.chunks():
        logprobs, _, row_max, log_sum = run.score(run.head.logits(tokens, columns), tokens, *shaping)
        for whole, piece in zip(saved, (logprobs, row_max, log_sum)):
            whole[tokens] = piece
    # The tokens of a half of a pair are neighbours; on a GPU those that do not count stand there as zeros.
    of_token = run.pairs.sequence[run.pairs.order if run.rows.index is None else run.rows.index]
    half = torch.searchsorted(
        2 * (of_token % run.pairs.count) + of_token // run.pairs.count,
        torch.arange(2 * run.pairs.count + 1, device=of_token.device),
    )
    logps = segment_sums(saved[0].to(run.dtype), half).view(-1, 2).t()
    pieces = run.head.tiles() if any(wants) else []
    sums = HeadGradients(run.head, inputs, wants, pieces, rounded=False)
    slopes = run.slopes(*logps, slice(None)).reshape(-1)[of_token].to(saved[0].dtype)
    for tokens, columns in pieces:
        found = (saved[0].new_empty(0), saved[1][tokens], saved[2][tokens])
        logits = run.head.logits(tokens, columns)
        sums.add(tokens, columns, run.descend(logits, tokens, columns, slopes[tokens], found, shaping))
    return logps.reshape(-1), sums


def linear_dpo_loss_chunked(
    hidden: Tensor,  # (2B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (2B, T) or (N,)
    bias: Tensor | None,  # (V,)
    ref_logps: Tensor | None,  # (2B,) float32 or float64
    mask: Tensor | None,
    cu_seqlens: Tensor | None,  # (2B+1,) int32
    temperatures: Tensor | None,
    denominators: Tensor | None,  # (2,)
    temperature: float,
    softcap: float | None,
    *rest,  # the options' codes, Plan, which gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_cu_seqlens(cu_seqlens, token_ids.shape[0] if token_ids.dim() == 1 else 0)
    codes, settled, wants = rest[:N_OPTIONS], Plan(*rest[N_OPTIONS:-3]), rest[-3:]
    options = DPOOptions.from_codes(*codes)
    run = _Call(
        hidden, weight, token_ids, bias, ref_logps, mask, cu_seqlens, temperatures, denominators, options, settled
    )
    chunks = None if options.loss_type in OVER_THE_BATCH else run.pairs.chunks(settled.chunk_tokens)
    shaping, inputs = (temperature, softcap), (hidden, weight, bias)
    if chunks is None:
        logps, sums = _four_products(run, shaping, wants, inputs)
    else:
        logps, sums = _three_products(run, chunks, shaping, wants, inputs)
    loss, stats, *_ = dpo_loss_op(*logps.chunk(2), *run.halves, denominators, *codes, False, False)
    d_hidden, d_weight, d_bias = sums.result()
    return loss, stats, logps, run.rows.put(d_hidden) if wants[0] else d_hidden, d_weight, d_bias


def _fake(hidden, weight, token_ids, bias, ref_logps, mask, cu_seqlens, *rest):
    dtype = compute_dtype(hidden, weight, ref_logps)
    count = token_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    loss, stats, logps = (hidden.new_empty(s, dtype=d) for s, d in (((), dtype), (7, torch.float64), (count, dtype)))
    return loss, stats, logps, *fake_gradients(hidden, weight, bias, rest[-3:], rounded=False)


def _setup_context(ctx, inputs, output):
    _, stats, logps, *gradients = output
    ctx.wants, ctx.dtypes = inputs[-3:], [None if x is None else x.dtype for x in (inputs[0], inputs[1], inputs[3])]
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(stats, logps, *gradients)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    once_differentiable("linear_dpo_loss")
    given = grad_loss is not None
    d_hidden, d_weight, d_bias = (
        scaled(d, grad_loss, dtype) if want and given else None
        for d, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants)
    )
    return d_hidden, d_weight, None, d_bias, *[None] * (N_ARGUMENTS - 4)


linear_dpo_loss_op = define(
    SCHEMA, linear_dpo_loss_chunked, _fake, setup_context=_setup_context, backward=_backward, kernel=CHUNKED
)


def linear_dpo_loss(
    hidden: Tensor,  # (2B, T, H) or (N, H) float32, float64, bfloat16 or float16
    weight: Tensor,  # (V, H), of the same dtype or another
    token_ids: Tensor,  # (2B, T) or (N,) int64 or int32; row t scores token_ids[t]
    ref_logps: Tensor | None = None,  # (2B,) float: sums over the same tokens
    *,
    cu_seqlens: Tensor | None = None,  # (2B+1,) int32 for packed (N,) tokens; on the CPU or on hidden's device
    mask: Tensor | None = None,  # bool, True on completion tokens
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # > 0; a number, or one a token
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | Chunking | None = None,  # tokens; chosen from the sizes unless given
    options: DPOOptions = DPOOptions(),  # noqa: B008, frozen
    denominators: tuple[float, float] | Tensor | None = None,  # (2,) pairs and chosen tokens of a step, this a part
) -> tuple[Tensor, DPOStats, Tensor]:
    """(loss, stats, logps): what dpo_loss gives for the summed log-probabilities of these sequences, and those sums
    (2B,), detached.

    The first half of the sequences is chosen, the second rejected; pair i is (i, B + i). Token counts are those of the
    mask. Differentiable once, in hidden, weight and bias, each only if needed. Bounds on the CPU let a GPU plan three
    products for packed sequences. Memory, masked tokens and errors are as in linear_ppo_loss.
    """
    check_linear(hidden, weight, bias, token_ids, temperature, softcap)
    bounds = cu_seqlens
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.to(token_ids.device, non_blocking=True)
    sequences = check.token_layout("token_ids", token_ids, bounds)
    if sequences % 2:
        raise ValueError(f"token_ids: expected 2B sequences, chosen first, got {sequences}")
    check.mask_like(mask, "token_ids", token_ids)
    check.options(options, DPOOptions)
    check_reference(options, "ref_logps", ref_logps is not None)
    if ref_logps is not None:
        check.is_float("ref_logps", ref_logps)
        check.same_shape("ref_logps", ref_logps, "the sequences", (sequences,))
        check.same_device("ref_logps", ref_logps, "hidden", hidden)
    dtype = compute_dtype(hidden, weight, ref_logps)
    ref = None if ref_logps is None else ref_logps.detach().to(dtype)
    whole = check_denominators(denominators, options, hidden)
    whole = None if whole is None else whole.to(dtype)
    scalar, temperatures = split_temperature(temperature, compute_dtype(hidden, weight))
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, stats, logps, *_ = call(
        linear_dpo_loss_op, hidden, weight, token_ids.contiguous(), bias, ref, prepare(mask), prepare(cu_seqlens),
        temperatures, whole, scalar, softcap, *options.codes(), *plan(hidden, weight, logit_scale, chunk_size), *wants,
    )  # fmt: skip
    return loss, DPOStats(stats.detach()), logps.detach()
