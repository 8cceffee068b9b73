"""From hidden states to the clipped PPO loss and the gradients of the head, in three matrix products.

    logits            = logit_scale * (hidden @ weight.T + bias)
    logprobs, entropy = token_logprobs(logits, token_ids)
    loss, stats       = ppo_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, ...)   no value terms

The loss of a token needs no other token but their number, which the mask tells beforehand. So the gradient is formed
over a chunk of logits while the chunk is alive, and nothing is computed twice. `_head.py` says what is rounded when.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._head import CHUNKED, IGNORED, PLAN_SCHEMA, Chunking, Head, HeadGradients, Plan, Rows, check_ids, plan, scaled
from .._layout import as_scalar, check_cu_seqlens, compute_dtype, full_mask, prepare
from .._library import call, define, once_differentiable
from ..stats import PPO_FIELDS, PPOStats
from .linear_token_logprobs import check_linear, fake_gradients
from .ppo_loss import (
    SUM,
    PPOLossOptions,
    check_terms,
    loss_terms,
    ppo_loss_op,
    token_scale,
    token_weights,
)
from .token_logprobs import split_temperature, token_logprobs_backward_into, token_logprobs_op

# stats is (13,) float64, PPO_FIELDS; logprobs has the shape of token_ids; a gradient that is not asked for is empty.
SCHEMA = (
    "linear_ppo_loss(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, Tensor old_logprobs, "
    "Tensor advantages, Tensor? mask, Tensor? cu_seqlens, Tensor? ref_logprobs, Tensor? is_weights, "
    "Tensor? temperatures, Tensor? denominator, float temperature, float? softcap, "
    "float clip_low, float clip_high, float? dual_clip, float? value_clip, float value_coef, "
    "float entropy_coef, float kl_coef, int kl_estimator, float? kl_clamp, float? log_ratio_clamp, int reduction, "
    f"{PLAN_SCHEMA}, bool grad_hidden, bool grad_weight, bool grad_bias) "
    "-> (Tensor loss, Tensor stats, Tensor logprobs, Tensor d_hidden, Tensor d_weight, Tensor d_bias)"
)
N_ARGUMENTS = 32


def linear_ppo_loss_chunked(
    hidden: Tensor,  # (B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (B, T) or (N,), as all per-token tensors
    bias: Tensor | None,  # (V,)
    old_logprobs: Tensor,  # float32 or float64, as all floats below
    advantages: Tensor,
    mask: Tensor | None,  # bool
    cu_seqlens: Tensor | None,  # (B+1,) int32
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    temperatures: Tensor | None,
    denominator: Tensor | None,  # ()
    temperature: float,
    softcap: float | None,
    *settled,  # the options of ppo_loss, clip_low to reduction; Plan; which gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    terms, settled, wants = settled[:11], Plan(*settled[11:15]), settled[15:]
    entropy_coef, reduction = terms[5], terms[10]
    check_cu_seqlens(cu_seqlens, token_ids.shape[0] if token_ids.dim() == 1 else 0)
    counted = full_mask(mask, token_ids)
    check_ids(token_ids, counted, weight.shape[0])
    rows = Rows(counted)
    head = Head(rows.take(hidden), weight, bias, settled)
    scale = rows.take(token_scale(*token_weights(counted, cu_seqlens, reduction, old_logprobs.dtype), denominator))
    ids = rows.ids(token_ids)
    old, advantage, ref, is_weight, per_row = map(
        rows.take, (old_logprobs, advantages, ref_logprobs, is_weights, temperatures)
    )
    logprobs, entropy = torch.empty_like(old), torch.empty_like(old)
    pieces = head.chunks()
    sums = HeadGradients(head, (hidden, weight, bias), wants, pieces, rounded=False)
    for tokens, columns in pieces:
        part = lambda x: None if x is None else x[None, tokens]  # noqa: B023, E731
        logits = head.logits(tokens, columns)
        temps = None if per_row is None else per_row[tokens]
        found = token_logprobs_op(logits, ids[tokens], temps, temperature, softcap, IGNORED, True)
        logprobs[tokens], entropy[tokens] = found[:2]
        if not any(wants):
            continue
        inputs = (part(logprobs), part(old), part(advantage), *[None] * 6, part(ref), part(is_weight), None)
        slopes = ppo_loss_op(*inputs, *terms[:10], SUM, True, False, False)[2]
        grad = head.gradient(logits)
        token_logprobs_backward_into(
            grad, slopes[0] * scale[tokens], -entropy_coef * scale[tokens] if entropy_coef else None,
            None if grad is logits else logits, ids[tokens], temps, *found[1:], temperature, softcap, IGNORED, 0,
        )  # fmt: skip
        sums.add(tokens, columns, grad)
    logprobs, entropy = rows.put(logprobs), rows.put(entropy)
    loss, stats, *_ = ppo_loss_op(
        logprobs, old_logprobs, advantages, mask, cu_seqlens, None, None, None, entropy, ref_logprobs, is_weights,
        denominator, *terms, False, False, False,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = sums.result()
    return loss, stats, logprobs, rows.put(d_hidden) if wants[0] else d_hidden, d_weight, d_bias


def _fake(hidden, weight, token_ids, bias, old_logprobs, *rest):
    loss, stats = old_logprobs.new_empty(()), old_logprobs.new_empty((len(PPO_FIELDS),), dtype=torch.float64)
    return loss, stats, torch.empty_like(old_logprobs), *fake_gradients(hidden, weight, bias, rest[-3:], rounded=False)


def _setup_context(ctx, inputs, output):
    _, stats, logprobs, *gradients = output
    ctx.wants, ctx.dtypes = inputs[-3:], [None if x is None else x.dtype for x in (inputs[0], inputs[1], inputs[3])]
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(stats, logprobs, *gradients)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    once_differentiable("linear_ppo_loss")
    given = grad_loss is not None
    d_hidden, d_weight, d_bias = (
        scaled(d, grad_loss, dtype) if want and given else None
        for d, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants)
    )
    return d_hidden, d_weight, None, d_bias, *[None] * (N_ARGUMENTS - 4)


linear_ppo_loss_op = define(
    SCHEMA, linear_ppo_loss_chunked, _fake, setup_context=_setup_context, backward=_backward, kernel=CHUNKED
)


def linear_ppo_loss(
    hidden: Tensor,  # (B, T, H) or (N, H) float32, float64, bfloat16 or float16
    weight: Tensor,  # (V, H), of the same dtype or another
    token_ids: Tensor,  # (B, T) or (N,) int64 or int32; row t scores token_ids[t]
    old_logprobs: Tensor,  # (B, T) or (N,) float, as all below; of the policy that sampled
    advantages: Tensor,
    mask: Tensor | None = None,  # bool, True on response tokens
    *,
    cu_seqlens: Tensor | None = None,  # (B+1,) int32 for packed (N,) tokens
    ref_logprobs: Tensor | None = None,
    is_weights: Tensor | None = None,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # > 0; a number, or one a token
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | Chunking | None = None,  # tokens; chosen from the sizes unless given
    options: PPOLossOptions = PPOLossOptions(),  # noqa: B008, frozen
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, PPOStats, Tensor]:
    """(loss, stats, logprobs): the scalar that `ppo_loss` gives for the log-probabilities and entropies of these hidden
    states, its statistics, and the log-probabilities, detached, 0 where nothing is counted.

    Differentiable once, in hidden, weight and bias, each only if needed; everything else is a constant. The gradients
    are formed in the forward pass and multiplied by the upstream gradient, whatever it is, in the backward. Under
    no_grad there is one product. The terms, reductions and `denominator` are those of ppo_loss; the value options are
    not used. Tokens under the mask may hold anything: on a CPU they are never projected, on a GPU they are projected as
    zeros (see linear_token_logprobs; pass hidden[mask] with cu_seqlens to spare those products).

    Memory: one chunk of logits (as linear_token_logprobs), and the gradients; the weight's is summed in float32 where
    there is more than one chunk. Raises TypeError or ValueError for wrong dtypes, shapes, devices and options, for a
    term whose inputs are missing, for a DTensor weight, and on the CPU for an id out of range.
    """
    check_linear(hidden, weight, bias, token_ids, temperature, softcap)
    check.options(options, PPOLossOptions)
    check.token_layout("token_ids", token_ids, cu_seqlens)
    tensors = {
        "old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs, "is_weights": is_weights,
    }  # fmt: skip
    for name in ("old_logprobs", "advantages"):
        check.is_tensor(name, tensors[name])
    for name, tensor in tensors.items():
        check.like(name, tensor, "token_ids", token_ids)
    check.mask_like(mask, "token_ids", token_ids)
    check_terms(old_logprobs, ref_logprobs, options, denominator)
    dtype = compute_dtype(hidden, weight, *tensors.values())
    old, advantages, ref, weights = (None if x is None else prepare(x.detach(), dtype) for x in tensors.values())
    scalar, temperatures = split_temperature(temperature, dtype)
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, stats, logprobs, *_ = call(
        linear_ppo_loss_op, hidden, weight, token_ids.contiguous(), bias, old, advantages, prepare(mask),
        prepare(cu_seqlens), ref, weights, temperatures, as_scalar(denominator, dtype, hidden.device), scalar,
        softcap, *loss_terms(options), *plan(hidden, weight, logit_scale, chunk_size), *wants,
    )  # fmt: skip
    return loss, PPOStats(stats.detach()), logprobs.detach()
