"""Log-probabilities of chosen tokens and the entropy of their distributions, from logits, both differentiable.

    z       = softcap * tanh(logits / softcap)   if softcap, else logits
    z       = z / temperature
    logp    = (z[y] - max z) - log sum exp(z - max z)
    entropy = -sum_v p_v log p_v,  p = softmax(z)                         in nats

    d logp / dz_v    = [v = y] - p_v
    d entropy / dz_v = -p_v (log p_v + entropy)

The forward reads the logits once, the backward reads them once and writes the gradient once. It saves the row maximum
and the log of the shifted sum, not their sum: one log-sum-exp loses three digits of the gradient where all logits
share an offset of 1e4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._layout import compute_dtype
from .._library import call, define, invalid, once_differentiable

# row_max and log_sum are what the backward needs; entropy is empty unless return_entropy. All (...) in the compute
# dtype.
SCHEMA = (
    "token_logprobs(Tensor logits, Tensor token_ids, Tensor? temperatures, float temperature, float? softcap, "
    "int ignore_index, bool return_entropy) -> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_sum)"
)
BACKWARD_SCHEMA = (
    "token_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor token_ids, "
    "Tensor? temperatures, Tensor entropy, Tensor row_max, Tensor log_sum, "
    "float temperature, float? softcap, int ignore_index) -> Tensor"
)
# The gradient of a part of the vocabulary, columns [first_id, first_id + v) of the logits, written into `grad`, which
# holds the logits on entry where none are given. Ids are not looked at: one in another part has no column here.
INTO_SCHEMA = (
    "token_logprobs_backward_into(Tensor(a!) grad, Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? logits, "
    "Tensor token_ids, Tensor? temperatures, Tensor entropy, Tensor row_max, Tensor log_sum, "
    "float temperature, float? softcap, int ignore_index, int first_id) -> ()"
)


def scaled_logits(logits: Tensor, temperatures: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    z = logits.to(compute_dtype(logits))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature if temperatures is None else temperatures.to(z.dtype)[..., None])


def _id_masks(logits: Tensor, token_ids: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ignored, out of range, ids made safe to gather); on the CPU an id out of range is an error with its position."""
    vocab = logits.shape[-1]
    ignored = token_ids == ignore_index
    bad = ((token_ids < 0) | (token_ids >= vocab)) & ~ignored
    if token_ids.device.type == "cpu" and bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        expected = f"expected ids in [0, {vocab}) or ignore_index={ignore_index}"
        raise invalid(f"token_ids: {expected}, got {int(token_ids[at])} at position {at}")
    return ignored, bad, torch.where(ignored | bad, 0, token_ids).long()


def token_logprobs_reference(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    temperatures: Tensor | None,  # (...)
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = scaled_logits(logits, temperatures, temperature, softcap)
    ignored, bad, safe_ids = _id_masks(logits, token_ids, ignore_index)
    if z.numel() == 0:
        return tuple(z.new_zeros(token_ids.shape if i != 1 or return_entropy else (0,)) for i in range(4))
    row_max = z.amax(-1)
    shifted = z - row_max[..., None]
    weights = shifted.exp()
    total = weights.sum(-1)
    log_sum = total.log()
    logprobs = shifted.gather(-1, safe_ids[..., None])[..., 0] - log_sum
    logprobs = logprobs.masked_fill(bad, float("nan")).masked_fill(ignored, 0)
    entropy = z.new_empty(0)
    if return_entropy:
        terms = torch.where(shifted == -float("inf"), 0, weights * shifted)
        entropy = (log_sum - terms.sum(-1) / total).masked_fill(ignored, 0)
    return logprobs, entropy, row_max, log_sum


def token_logprobs_backward_into_reference(
    grad: Tensor,  # (..., v)
    grad_logprobs: Tensor | None,  # (...)
    grad_entropy: Tensor | None,  # (...)
    logits: Tensor | None,  # (..., v)
    token_ids: Tensor,  # (...)
    temperatures: Tensor | None,  # (...)
    entropy: Tensor,  # (...) or (0,)
    row_max: Tensor,  # (...)
    log_sum: Tensor,  # (...)
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    first_id: int,
) -> None:
    logits = grad if logits is None else logits
    if not logits.numel():
        return
    z = scaled_logits(logits, temperatures, temperature, softcap)
    column = (token_ids - first_id).long()
    here = (column >= 0) & (column < logits.shape[-1])
    logp = z - row_max[..., None] - log_sum[..., None]
    p = logp.exp()
    d = torch.zeros_like(z)
    if grad_logprobs is not None:
        chosen = torch.where(here, grad_logprobs.to(z.dtype), 0)
        d -= p * grad_logprobs[..., None]
        d.scatter_add_(-1, torch.where(here, column, 0)[..., None], chosen[..., None])
    if grad_entropy is not None:
        term = p * (logp + entropy[..., None])
        d -= torch.where(logp == -float("inf"), 0, term) * grad_entropy[..., None]
    d = d / (temperature if temperatures is None else temperatures.to(z.dtype)[..., None])
    if softcap is not None:
        d = d * (1 - torch.tanh(logits.to(z.dtype) / softcap) ** 2)
    # -inf logits stand for tokens that cannot be chosen: their gradient is 0, also under a softcap.
    d = torch.where((logits == -float("inf")) & d.isfinite(), 0, d)
    grad.copy_(d.masked_fill((token_ids == ignore_index)[..., None], 0))


def token_logprobs_backward_reference(
    grad_logprobs: Tensor | None,  # (...)
    grad_entropy: Tensor | None,  # (...)
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    temperatures: Tensor | None,  # (...)
    entropy: Tensor,  # (...) or (0,)
    row_max: Tensor,  # (...)
    log_sum: Tensor,  # (...)
    temperature: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _, bad, _ = _id_masks(logits, token_ids, ignore_index)
    token_logprobs_backward_into_reference(
        grad, grad_logprobs, grad_entropy, logits, token_ids, temperatures, entropy, row_max, log_sum,
        temperature, softcap, ignore_index, 0,
    )  # fmt: skip
    return grad.masked_fill_(bad[..., None], float("nan"))


def check_scoring(
    token_ids: Tensor, temperature: float | Tensor, softcap: float | None, other_name: str, other: Tensor
) -> None:
    """What every op that scores tokens takes; `other` is the tensor that sets the device."""
    check.is_tensor("token_ids", token_ids)
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token_ids: expected int64 or int32, got {token_ids.dtype}; convert it with .long()")
    check.same_device("token_ids", token_ids, other_name, other)
    check_shaping(temperature, softcap, other_name, other, token_ids.shape)


def check_shaping(
    temperature: float | Tensor, softcap: float | None, other_name: str, other: Tensor, shape: torch.Size
) -> None:
    """`shape` is that of the rows, one a token."""
    if isinstance(temperature, Tensor):
        check.is_float("temperature", temperature)
        check.same_shape("temperature", temperature, "the tokens", shape)
        check.same_device("temperature", temperature, other_name, other)
    else:
        check.number("temperature", temperature, above=0)
    if softcap is not None:
        check.number("softcap", softcap, above=0)


def split_temperature(temperature: float | Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    """(the number, the tensor) that a schema takes: one of them is used."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature.detach().to(dtype).contiguous()
    return float(temperature), None


def check_ignore_index(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")


def _check(
    logits: Tensor, token_ids: Tensor, temperature: float | Tensor, softcap: float | None, ignore_index: int
) -> None:
    check.is_float("logits", logits)
    check_scoring(token_ids, temperature, softcap, "logits", logits)
    check_ignore_index(ignore_index)
    if logits.dim() == 0 or logits.shape[:-1] != token_ids.shape:
        expected = f"expected logits {(*token_ids.shape, 'V')} for token_ids {tuple(token_ids.shape)}"
        raise ValueError(
            f"logits: {expected}, got {tuple(logits.shape)}; row t scores token_ids[t], "
            "so callers shift: logits[:, :-1], ids[:, 1:]"
        )
    if logits.shape[-1] == 0 and token_ids.numel():
        raise ValueError(f"logits: expected a vocabulary of at least one token, got {tuple(logits.shape)}")


def _fake(logits, token_ids, temperatures, temperature, softcap, ignore_index, return_entropy):
    per_token = lambda: logits.new_empty(token_ids.shape, dtype=compute_dtype(logits))  # noqa: E731
    entropy = per_token() if return_entropy else logits.new_empty((0,), dtype=compute_dtype(logits))
    return per_token(), entropy, per_token(), per_token()


def _fake_backward(grad_logprobs, grad_entropy, logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    logits, token_ids, temperatures, ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.return_entropy = inputs
    _, entropy, row_max, log_sum = output
    ctx.save_for_backward(logits, token_ids, temperatures, entropy, row_max, log_sum)
    ctx.mark_non_differentiable(row_max, log_sum)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_entropy, _grad_row_max, _grad_log_sum):
    once_differentiable("token_logprobs")
    grad_entropy = grad_entropy if ctx.return_entropy else None
    grad = None
    if grad_logprobs is not None or grad_entropy is not None:
        options = (ctx.temperature, ctx.softcap, ctx.ignore_index)
        grad = token_logprobs_backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, *options)
    return grad, None, None, None, None, None, None


token_logprobs_backward_into = define(INTO_SCHEMA, token_logprobs_backward_into_reference, lambda *_: None)
token_logprobs_backward = define(BACKWARD_SCHEMA, token_logprobs_backward_reference, _fake_backward)
token_logprobs_op = define(SCHEMA, token_logprobs_reference, _fake, setup_context=_setup_context, backward=_backward)


def token_logprobs(
    logits: Tensor,  # (..., V) float32, float64, bfloat16 or float16; last stride 1, leading dimensions of any strides
    token_ids: Tensor,  # (...) int64 or int32
    *,
    temperature: float | Tensor = 1.0,  # > 0; a number, or one a row (...)
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities `(...)` of `token_ids`, or `(logprobs, entropy)`, in float32 (float64 for float64 logits).

    Row t scores `token_ids[t]`. A causal language model's logits at t predict token t+1, so shift, without a copy:

        logprobs = token_logprobs(model(ids).logits[:, :-1], ids[:, 1:], temperature=0.7)

    Differentiable in logits through both outputs, for any upstream gradient; temperature is not differentiable. Rows
    whose id is `ignore_index` give 0 and no gradient, whatever their logits hold. A logit of -inf is a token that
    cannot be chosen: it adds 0 to the entropy, gets gradient 0, and choosing it gives -inf; a row of -inf alone gives
    NaN. (A softcap makes -inf a finite -softcap: ban tokens after the cap.) No logits-sized memory is allocated but the
    gradient; logits whose last stride is not 1 are copied once. Differentiable once: create_graph=True raises.

    Raises TypeError or ValueError for wrong dtypes, shapes and devices. An id out of range: ValueError with its
    position on the CPU (RuntimeError with the same words from compiled code); on a GPU, where looking would wait for
    the device, its log-probability and gradient are NaN. Per-row temperatures are not looked at: each must be > 0.
    """
    _check(logits, token_ids, temperature, softcap, ignore_index)
    scalar, temperatures = split_temperature(temperature, compute_dtype(logits))
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    logprobs, entropy, _, _ = call(
        token_logprobs_op, logits, token_ids.contiguous(), temperatures, scalar, softcap, ignore_index, return_entropy
    )
    return (logprobs, entropy) if return_entropy else logprobs
