"""Log-probabilities of chosen tokens and entropies from hidden states, never holding more than a chunk of logits.

    logits = logit_scale * (hidden @ weight.T + bias)
    logprobs, entropy: those of token_logprobs(logits, token_ids)

Four matrix products forward and backward: the backward computes the logits again, a tile of tokens and vocabulary at a
time, from the row maximum and log-sum that the forward saved, so any upstream gradient is served. Where the loss is
known, linear_ppo_loss and linear_dpo_loss need three. `_head.py` says what is rounded when.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._head import (
    CHUNKED,
    IGNORED,
    PLAN_SCHEMA,
    Chunking,
    Head,
    HeadGradients,
    Plan,
    Rows,
    check_head,
    check_ids,
    plan,
)
from .._layout import compute_dtype
from .._library import call, define, once_differentiable
from .token_logprobs import (
    check_ignore_index,
    check_scoring,
    split_temperature,
    token_logprobs_backward_into,
    token_logprobs_op,
)

# All outputs are (...) in the compute dtype; entropy is empty unless return_entropy; row_max and log_sum are what the
# backward needs. statistics holds (K, ...) what of STATISTICS was wanted, in that order and without gradient,
# or (0,).
SCHEMA = (
    "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, Tensor? temperatures, "
    f"float temperature, float? softcap, int ignore_index, bool return_entropy, str[] wanted, {PLAN_SCHEMA}) "
    "-> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_sum, Tensor statistics)"
)
# A gradient that is not asked for is empty.
BACKWARD_SCHEMA = (
    "linear_token_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, "
    "Tensor token_ids, Tensor? bias, Tensor? temperatures, Tensor entropy, Tensor row_max, Tensor log_sum, "
    f"float temperature, float? softcap, int ignore_index, {PLAN_SCHEMA}, "
    "bool grad_hidden, bool grad_weight, bool grad_bias) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)"
)
STATISTICS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def _is_top1(logits: Tensor, ids: Tensor) -> Tensor:  # (n, V), (n,) -> (n,) bool
    """Whether an id is the first of the largest logits."""
    if not logits.is_cpu:
        return logits.argmax(-1) == ids
    # argmax of 256 x 32000 takes 11 ms on 2 cores, amax 0.7: only rows that the largest value leaves are searched.
    top = logits.gather(-1, ids[:, None])[:, 0] == logits.amax(-1)
    rows = top.nonzero()[:, 0]
    return top.index_copy(0, rows, logits[rows].argmax(-1) == ids[rows])


def _statistics(
    wanted: list[str],
    logits: Tensor,
    ids: Tensor,
    log_z: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> list[Tensor]:  # of (n,)
    """What was wanted of a chunk of logits (n, V) whose log-sum-exp is log_z (n,)."""
    found = []
    if "log_sum_sq_probs" in wanted:  # at half the temperature every logit is doubled
        halved = temperatures if temperatures is None else temperatures / 2
        row_max, log_sum = token_logprobs_op(logits, ids, halved, temperature / 2, softcap, IGNORED, False)[2:]
        found.append(row_max + log_sum - 2 * log_z)
    if "mean_logits" in wanted:
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        mean = capped.mean(-1, dtype=log_z.dtype)
        found.append(mean / (temperature if temperatures is None else temperatures))
    if "is_top1" in wanted:
        found.append(_is_top1(logits, ids))
    return found


def linear_token_logprobs_chunked(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...)
    bias: Tensor | None,  # (V,)
    temperatures: Tensor | None,  # (...)
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    return_entropy: bool,
    wanted: list[str],  # of STATISTICS
    *settled,  # Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    counted = token_ids != ignore_index
    check_ids(token_ids, counted, weight.shape[0])
    rows = Rows(counted)
    head = Head(rows.take(hidden), weight, bias, Plan(*settled))
    ids, temperatures = rows.ids(token_ids), rows.take(temperatures)
    dtype = compute_dtype(hidden, weight)
    logprobs, row_max, log_sum = (head.hidden.new_empty(ids.shape, dtype=dtype) for _ in range(3))
    entropy = head.hidden.new_empty(ids.shape if return_entropy else (0,), dtype=dtype)
    statistics = head.hidden.new_empty((len(wanted), *ids.shape), dtype=dtype)
    for tokens, columns in head.chunks():
        per_row = temperatures if temperatures is None else temperatures[tokens]
        logits = head.logits(tokens, columns)
        part = token_logprobs_op(logits, ids[tokens], per_row, temperature, softcap, IGNORED, return_entropy)
        for whole, piece in zip((logprobs, entropy, row_max, log_sum), part):
            if whole.numel():
                whole[tokens] = piece
        found = _statistics(wanted, logits, ids[tokens], part[2] + part[3], per_row, temperature, softcap)
        for whole, piece in zip(statistics, found):
            whole[tokens] = piece
    log_sum = log_sum.masked_fill(logprobs.isnan(), float("nan"))  # an id out of range has no gradient but NaN
    entropy = rows.put(entropy) if return_entropy else entropy
    statistics = torch.stack([rows.put(x) for x in statistics]) if wanted else statistics.view(0)
    return rows.put(logprobs), entropy, rows.put(row_max), rows.put(log_sum), statistics


def linear_token_logprobs_backward_tiled(
    grad_logprobs: Tensor | None,  # (...)
    grad_entropy: Tensor | None,  # (...)
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...)
    bias: Tensor | None,  # (V,)
    temperatures: Tensor | None,  # (...)
    entropy: Tensor,  # (...) or (0,)
    row_max: Tensor,  # (...)
    log_sum: Tensor,  # (...)
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    *settled,  # Plan, then whether hidden, weight and bias get a gradient
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Rows(token_ids != ignore_index)
    head = Head(rows.take(hidden), weight, bias, Plan(*settled[:-3]))
    ids = rows.ids(token_ids)
    of_row = [rows.take(x) for x in (grad_logprobs, grad_entropy, temperatures, row_max, log_sum)]
    of_row.append(None if grad_entropy is None else rows.take(entropy))
    pieces = head.tiles()
    sums = HeadGradients(head, (hidden, weight, bias), settled[-3:], pieces)
    for tokens, columns in pieces:
        g_logprobs, g_entropy, per_row, top, log, ent = (None if x is None else x[tokens] for x in of_row)
        logits = head.logits(tokens, columns)
        grad = head.gradient(logits)
        token_logprobs_backward_into(
            grad, g_logprobs, g_entropy, None if grad is logits else logits, ids[tokens], per_row,
            entropy if ent is None else ent, top, log, temperature, softcap, IGNORED, columns.start,
        )  # fmt: skip
        sums.add(tokens, columns, grad)
    d_hidden, d_weight, d_bias = sums.result()
    return (rows.put(d_hidden) if settled[-3] else d_hidden), d_weight, d_bias


def _fake(hidden, weight, token_ids, bias, temperatures, temperature, softcap, ignore_index, *rest):
    return_entropy, wanted, *_ = rest
    dtype = compute_dtype(hidden, weight)
    per_token = lambda: hidden.new_empty(token_ids.shape, dtype=dtype)  # noqa: E731
    entropy = per_token() if return_entropy else hidden.new_empty(0, dtype=dtype)
    statistics = hidden.new_empty((len(wanted), *token_ids.shape) if wanted else (0,), dtype=dtype)
    return per_token(), entropy, per_token(), per_token(), statistics


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: tuple[bool, bool, bool], rounded: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """What HeadGradients gives: empty where not wanted."""
    wide = compute_dtype(hidden, weight)
    dtypes = [wide if x is None or not rounded else x.dtype for x in (hidden, weight, bias)]
    (vocab, h), shape = weight.shape, hidden.shape if wants[0] else (0, hidden.shape[-1])
    shapes = shape, (vocab if wants[1] else 0, h), (vocab if wants[2] else 0,)
    return tuple(weight.new_empty(s, dtype=d) for s, d in zip(shapes, dtypes))


def _fake_backward(grad_logprobs, grad_entropy, hidden, weight, token_ids, bias, *rest):
    return fake_gradients(hidden, weight, bias, rest[-3:])


N_ARGUMENTS = 14


def _setup_context(ctx, inputs, output):
    *tensors, temperature, softcap, ignore_index, ctx.return_entropy, _, scale, tokens, product, logits = inputs
    _, entropy, row_max, log_sum, statistics = output
    ctx.options = (temperature, softcap, ignore_index, scale, tokens, product, logits)
    ctx.save_for_backward(*tensors, entropy, row_max, log_sum)
    ctx.mark_non_differentiable(row_max, log_sum, statistics)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_entropy, *_):
    once_differentiable("linear_token_logprobs")
    grad_entropy = grad_entropy if ctx.return_entropy else None
    hidden, weight, bias = (ctx.needs_input_grad[i] for i in (0, 1, 3))
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * N_ARGUMENTS
    d_hidden, d_weight, d_bias = linear_token_logprobs_backward(
        grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, hidden, weight, bias
    )
    gradients = d_hidden if hidden else None, d_weight if weight else None, None, d_bias if bias else None
    return (*gradients, *[None] * (N_ARGUMENTS - 4))


linear_token_logprobs_backward = define(
    BACKWARD_SCHEMA, linear_token_logprobs_backward_tiled, _fake_backward, kernel=CHUNKED
)
linear_token_logprobs_op = define(
    SCHEMA, linear_token_logprobs_chunked, _fake, setup_context=_setup_context, backward=_backward, kernel=CHUNKED
)


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float | Tensor, softcap
) -> None:
    """What every op takes that scores tokens from hidden states."""
    check_head(hidden, weight, bias)
    check_scoring(token_ids, temperature, softcap, "hidden", hidden)
    if hidden.shape[:-1] != token_ids.shape:
        raise ValueError(
            f"hidden: expected {(*token_ids.shape, 'H')} for token_ids {tuple(token_ids.shape)}, got "
            f"{tuple(hidden.shape)}; row t scores token_ids[t], so callers shift: hidden[:, :-1], ids[:, 1:]"
        )
    if weight.shape[0] == 0 and token_ids.numel():
        raise ValueError(f"weight: expected a vocabulary of at least one token, got {tuple(weight.shape)}")


def with_statistics(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...)
    wanted: tuple[str, ...],  # of STATISTICS, in that order
    *,
    bias: Tensor | None,  # (V,)
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    return_entropy: bool,
    chunk_size: int | Chunking | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (...), (...) or (0,), (len(wanted), ...)
    """(logprobs, entropy, statistics) of linear_token_logprobs' logits z, the statistics without gradient:
    log sum_v p_v^2, the mean of z over the vocabulary, and 1 where the token is the first of the largest z."""
    check_linear(hidden, weight, bias, token_ids, temperature, softcap)
    check_ignore_index(ignore_index)
    scalar, temperatures = split_temperature(temperature, compute_dtype(hidden, weight))
    settled = plan(hidden, weight, logit_scale, chunk_size)
    logprobs, entropy, _, _, statistics = call(
        linear_token_logprobs_op, hidden, weight, token_ids, bias, temperatures, scalar, softcap, ignore_index,
        return_entropy, list(wanted), *settled,
    )  # fmt: skip
    return logprobs, entropy, statistics


def linear_token_logprobs(
    hidden: Tensor,  # (..., H) float32, float64, bfloat16 or float16
    weight: Tensor,  # (V, H), of the same dtype or another
    token_ids: Tensor,  # (...) int64 or int32
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # > 0; a number, or one a token (...)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_size: int | Chunking | None = None,  # tokens; chosen from the sizes unless given
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities `(...)` of `token_ids`, or `(logprobs, entropy)`, in float32 (float64 for float64 inputs), as
    token_logprobs gives them for the logits `logit_scale * (hidden @ weight.T + bias)`.

    Row t scores `token_ids[t]`: a causal model's hidden state at t predicts token t+1, so shift: hidden[:, :-1],
    ids[:, 1:]. Differentiable in hidden, weight and bias (each only if needed) through both outputs, for any upstream
    gradient, once; temperature is not. Without grad there is one product a chunk and nothing is saved.

    Memory: one chunk of logits, chunk_size * V (unless given at most 32 MiB on a CPU and 512 MiB on a GPU, but no fewer
    than 256 and 2048 tokens), forward and backward; six numbers a token; in the backward the gradients, summed in
    float32. Where tokens are ignored (on a GPU always) hidden is copied without them, and its gradient put back.
    Operands in another dtype than the products' (on a CPU: of 16 bits), or not contiguous, are converted first, whole.
    bias is converted to the logits' dtype.

    Tokens whose id is `ignore_index` give 0 and no gradient, whatever their hidden states hold. On a CPU they are never
    projected. On a GPU their number is on the device, and no op waits for it: their rows are projected as zeros; pass
    hidden[mask] to spare those products. A bad id: ValueError with its position on the CPU; on a GPU NaN.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices and options, and for a DTensor weight.
    """
    logprobs, entropy, _ = with_statistics(
        hidden, weight, token_ids, (), bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, return_entropy=return_entropy, chunk_size=chunk_size,
    )  # fmt: skip
    return (logprobs, entropy) if return_entropy else logprobs
