"""The exact divergence of policy and reference over the vocabulary, from the hidden states of both.

    logits = logit_scale * (hidden @ weight.T + bias),   ref_logits likewise
    kl     = logits_kl(logits, ref_logits)

Six matrix products forward and backward, two fewer where one gradient is wanted: the backward computes both logits
again, a tile of tokens and vocabulary at a time. A piece of either logits is half a chunk, so together they hold one.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .. import _checks as check
from .._head import CHUNKED, PLAN_SCHEMA, Chunking, Head, HeadGradients, Plan, Rows, check_head, plan
from .._layout import compute_dtype, full_mask, prepare
from .._library import call, define, once_differentiable
from .linear_token_logprobs import fake_gradients
from .logits_kl import DIRECTIONS, SAVED, logits_kl_backward_into, logits_kl_op
from .token_logprobs import check_shaping, split_temperature

# saved is (..., SAVED), a row of what logits_kl saves a token.
_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor ref_hidden, Tensor ref_weight, Tensor? bias, Tensor? ref_bias, Tensor? mask, "
    "Tensor? temperatures"
)
_OPTIONS = f"float temperature, float? softcap, int direction, float ref_logit_scale, {PLAN_SCHEMA}"
SCHEMA = f"linear_kl({_TENSORS}, {_OPTIONS}) -> (Tensor kl, Tensor saved)"
BACKWARD_SCHEMA = (
    f"linear_kl_backward(Tensor grad_kl, {_TENSORS}, Tensor saved, {_OPTIONS}, "
    "bool grad_hidden, bool grad_weight, bool grad_bias) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)"
)
N_ARGUMENTS = 16


def _per_token(hidden: Tensor) -> Tensor:
    """Something in the shape of the tokens."""
    return hidden[..., 0] if hidden.shape[-1] else hidden.sum(-1)


class _Call:
    """The operands of one call: the heads of policy and reference over the tokens that count."""

    def __init__(self, hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask, temperatures, ref_scale, settled):
        self.rows = Rows(full_mask(mask, _per_token(hidden)))
        settled = replace(settled, chunk_tokens=max(1, settled.chunk_tokens // 2))
        self.policy = Head(self.rows.take(hidden), weight, bias, settled)
        reference = replace(settled, logit_scale=ref_scale)
        self.reference = Head(self.rows.take(ref_hidden), ref_weight, ref_bias, reference)
        self.temperatures = self.rows.take(temperatures, fill=1)

    def pair(self, tokens: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits, reference's logits, temperatures) of a piece."""
        temperatures = None if self.temperatures is None else self.temperatures[tokens]
        return self.policy.logits(tokens, columns), self.reference.logits(tokens, columns), temperatures


def linear_kl_chunked(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    ref_hidden: Tensor,  # (..., R)
    ref_weight: Tensor,  # (V, R)
    bias: Tensor | None,  # (V,)
    ref_bias: Tensor | None,  # (V,)
    mask: Tensor | None,  # (...) bool
    temperatures: Tensor | None,  # (...)
    temperature: float,
    softcap: float | None,
    direction: int,
    ref_logit_scale: float,
    *settled,  # Plan
) -> tuple[Tensor, Tensor]:
    heads = (hidden, weight, ref_hidden, ref_weight, bias, ref_bias)
    run = _Call(*heads, mask, temperatures, ref_logit_scale, Plan(*settled))
    n, dtype = run.policy.hidden.shape[0], compute_dtype(hidden, weight, ref_hidden, ref_weight)
    kl, saved = run.policy.hidden.new_empty(n, dtype=dtype), run.policy.hidden.new_empty((n, SAVED), dtype=dtype)
    for tokens, columns in run.policy.chunks():
        logits, ref_logits, per_row = run.pair(tokens, columns)
        kl[tokens], part = logits_kl_op(logits, ref_logits, None, per_row, temperature, softcap, direction)
        saved[tokens] = part.t()
    return run.rows.put(kl), run.rows.put(saved)


def linear_kl_backward_tiled(
    grad_kl: Tensor,  # (...)
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    ref_hidden: Tensor,  # (..., R)
    ref_weight: Tensor,  # (V, R)
    bias: Tensor | None,  # (V,)
    ref_bias: Tensor | None,  # (V,)
    mask: Tensor | None,  # (...) bool
    temperatures: Tensor | None,  # (...)
    saved: Tensor,  # (..., 6)
    temperature: float,
    softcap: float | None,
    direction: int,
    ref_logit_scale: float,
    *settled,  # Plan, then whether hidden, weight and bias get a gradient
) -> tuple[Tensor, Tensor, Tensor]:
    heads = (hidden, weight, ref_hidden, ref_weight, bias, ref_bias)
    run = _Call(*heads, mask, temperatures, ref_logit_scale, Plan(*settled[:-3]))
    upstream, saved = run.rows.take(grad_kl), run.rows.take(saved)
    pieces = run.policy.tiles()
    sums = HeadGradients(run.policy, (hidden, weight, bias), settled[-3:], pieces)
    for tokens, columns in pieces:
        logits, ref_logits, per_row = run.pair(tokens, columns)
        grad = run.policy.gradient(logits)
        logits_kl_backward_into(
            grad, upstream[tokens], None if grad is logits else logits, ref_logits, None, per_row,
            saved[tokens].t(), temperature, softcap, direction,
        )  # fmt: skip
        sums.add(tokens, columns, grad)
    d_hidden, d_weight, d_bias = sums.result()
    return (run.rows.put(d_hidden) if settled[-3] else d_hidden), d_weight, d_bias


def _fake(hidden, weight, ref_hidden, ref_weight, *_):
    dtype, shape = compute_dtype(hidden, weight, ref_hidden, ref_weight), hidden.shape[:-1]
    return hidden.new_empty(shape, dtype=dtype), hidden.new_empty((*shape, SAVED), dtype=dtype)


def _fake_backward(grad_kl, hidden, weight, ref_hidden, ref_weight, bias, *rest):
    return fake_gradients(hidden, weight, bias, rest[-3:])


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[8:]
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_kl, _):
    once_differentiable("linear_kl")
    if grad_kl is None:
        return (None,) * N_ARGUMENTS
    wants = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    grads = linear_kl_backward(grad_kl, *ctx.saved_tensors, *ctx.options, *wants)
    d_hidden, d_weight, d_bias = (d if want else None for d, want in zip(grads, wants))
    return d_hidden, d_weight, None, None, d_bias, *[None] * (N_ARGUMENTS - 5)


linear_kl_backward = define(BACKWARD_SCHEMA, linear_kl_backward_tiled, _fake_backward, kernel=CHUNKED)
linear_kl_op = define(
    SCHEMA, linear_kl_chunked, _fake, setup_context=_setup_context, backward=_backward, kernel=CHUNKED
)


def linear_kl(
    hidden: Tensor,  # (..., H) float32, float64, bfloat16 or float16; the policy's
    weight: Tensor,  # (V, H)
    ref_hidden: Tensor,  # (..., R)
    ref_weight: Tensor,  # (V, R), of the same vocabulary
    mask: Tensor | None = None,  # (...) bool, True on tokens that count
    *,
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # > 0; a number, or one a token (...)
    softcap: float | None = None,  # of both
    logit_scale: float = 1.0,
    ref_logit_scale: float | None = None,  # None: logit_scale
    direction: str = "reverse",  # or "forward"
    chunk_size: int | Chunking | None = None,  # tokens of both logits together; chosen from the sizes unless given
) -> Tensor:
    """KL per token `(...)` as `logits_kl` gives it, in float32 (float64 for float64 inputs), storing neither logits.

    Differentiable in hidden, weight and bias, once, for any upstream gradient, each only if needed; the reference is a
    constant. Tokens under the mask give 0 and no gradient, whatever they hold: on a CPU they are never projected, on a
    GPU they are projected as zeros. Memory: one chunk of logits, half for either model (see linear_token_logprobs), and
    in the backward the gradients. Raises TypeError or ValueError for wrong dtypes, shapes, devices and options.
    """
    check_head(hidden, weight, bias)
    try:
        check_head(ref_hidden, ref_weight, ref_bias)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the reference's {error}") from None
    check.same_device("ref_hidden", ref_hidden, "hidden", hidden)
    for name, ours, theirs in (
        ("ref_hidden", hidden.shape[:-1], ref_hidden.shape[:-1]), ("ref_weight", weight.shape[:1], ref_weight.shape[:1])
    ):  # fmt: skip
        if ours != theirs:
            raise ValueError(f"{name}: expected {(*ours, '...')} as the policy has, got {(*theirs, '...')}")
    if weight.shape[0] == 0 and hidden.shape[:-1].numel():
        raise ValueError(f"weight: expected a vocabulary of at least one token, got {tuple(weight.shape)}")
    check_shaping(temperature, softcap, "hidden", hidden, hidden.shape[:-1])
    check.mask_like(mask, "hidden's tokens", _per_token(hidden))
    check.number("logit_scale", logit_scale)
    ref_scale = logit_scale if ref_logit_scale is None else ref_logit_scale
    check.number("ref_logit_scale", ref_scale)
    scalar, temperatures = split_temperature(temperature, compute_dtype(hidden, weight, ref_hidden, ref_weight))
    ref = [None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias)]
    kl, _ = call(
        linear_kl_op, hidden, weight, *ref[:2], bias, ref[2], prepare(mask), temperatures, scalar, softcap,
        check.one_of("direction", direction, DIRECTIONS), float(ref_scale),
        *plan(hidden, weight, logit_scale, chunk_size, ref_hidden, ref_weight),
    )  # fmt: skip
    return kl
