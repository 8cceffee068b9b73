"""Cases of sequence_logprobs, group_advantages and the preference losses: formulas written out, with autograd."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn.functional import logsigmoid

from ..ops.dpo_loss import REFERENCE_FREE, TYPES, DPOOptions, dpo_loss
from ..ops.group_advantages import group_advantages
from ..ops.kto_loss import kto_loss
from ..ops.linear_dpo_loss import linear_dpo_loss
from ..ops.sequence_logprobs import sequence_logprobs
from ..stats import DPO_FIELDS, KTO_FIELDS
from ..testing import OpCase
from .inputs import LAYOUTS, THOROUGH, sequences, tokens
from .linear import head, head_logits
from .token_logprobs import token_logprobs_oracle

HALF = (torch.bfloat16, torch.float16)


def _wide(x):
    return x.float() if x.dtype in HALF else x


# --- sequence_logprobs ----------------------------------------------------------------------------------------------


def _sums_oracle(logprobs, mask=None, cu_seqlens=None, average=False):
    flat = _wide(logprobs).reshape(-1)
    parts = [flat[i] for i in sequences(logprobs, mask, cu_seqlens)]
    sums = [p.sum() / (max(len(p), 1) if average else 1) for p in parts]
    return (torch.stack(sums) if sums else flat.sum(0, keepdim=True)[:0],)


SEQUENCE_LOGPROBS = [
    OpCase(
        "sequence_logprobs", f"{name}{'_mean' * average}", partial(tokens, names=("logprobs",), **layout),
        partial(lambda average, **x: (sequence_logprobs(**x, average=average),), average),
        partial(_sums_oracle, average=average), learned=("logprobs",), values_only=name not in THOROUGH,
    )
    for name, layout in LAYOUTS.items()
    for average in (False, True)
]  # fmt: skip


# --- group_advantages -----------------------------------------------------------------------------------------------


def _group_inputs(generator, count=12, groups=4, offset=0.0):
    scores = torch.randn(count, generator=generator, dtype=torch.float64) + offset
    return {"scores": scores, "group_ids": torch.randint(0, max(groups, 1), (count,), generator=generator)}


def _group_oracle(scores, group_ids, kind="grpo"):
    scores, out = _wide(scores), torch.zeros_like(_wide(scores))
    for group in group_ids.unique().tolist():
        at = (group_ids == group).nonzero()[:, 0]
        if len(at) == 1:
            continue
        s = scores[at]
        if kind == "rloo":
            out[at] = torch.stack([s[k] - torch.cat([s[:k], s[k + 1 :]]).mean() for k in range(len(at))])
        else:
            out[at] = (s - s.mean()) / (s.std() + 1e-4 if kind == "grpo" else 1)
    return (out,)


GROUP_ADVANTAGES = [
    OpCase(
        "group_advantages", f"{kind}_{name}", partial(_group_inputs, **inputs),
        partial(lambda kind, **x: (group_advantages(**x, kind=kind),), kind), partial(_group_oracle, kind=kind),
        values_only=name != "mixed", tolerance=2e-6,
    )
    for kind in ("grpo", "grpo_no_std", "rloo")
    for name, inputs in {
        "mixed": {}, "alone": {"count": 3, "groups": 3}, "one_group": {"groups": 1}, "none": {"count": 0},
    }.items()
]  # fmt: skip


# --- dpo_loss -------------------------------------------------------------------------------------------------------


def _pair_inputs(generator, pairs=5, reference=True, lengths=True, spread=4.0):
    def draw():
        return torch.randn(pairs, generator=generator, dtype=torch.float64)

    out = {"chosen_logps": -10 - 5 * draw().abs(), "rejected_logps": -10 - 5 * draw().abs()}
    if reference:
        for name in ("chosen", "rejected"):
            out[f"ref_{name}_logps"] = out[f"{name}_logps"] + spread * draw()
    if lengths:
        for name in ("chosen", "rejected"):
            out[f"{name}_lengths"] = torch.randint(1, 9, (pairs,), generator=generator)
    return out


def _margin_loss(x, e):
    return -(1 - e) * logsigmoid(x) - e * logsigmoid(-x)


def pair_losses(o: DPOOptions, c, j, pi_c, pi_j, ref_c, ref_j):
    """One loss a pair from (mean, where the type averages) log-ratios c, j and log-probabilities pi."""
    s, ls, b, e, d = torch.sigmoid, logsigmoid, o.beta, o.label_smoothing, c - j
    table = {
        "sigmoid": lambda: _margin_loss(b * d, e),
        "hinge": lambda: torch.clamp(1 - b * d, min=0),
        "ipo": lambda: (d - 1 / (2 * b)) ** 2,
        "robust": lambda: (-(1 - e) * ls(b * d) + e * ls(-b * d)) / (1 - 2 * e),
        "exo_pair": lambda: s(b * d) * (ls(b * d) - math.log(1 - e)) + s(-b * d) * (ls(-b * d) - math.log(e)),
        "nca_pair": lambda: -ls(b * c) - 0.5 * ls(-b * c) - 0.5 * ls(-b * j),
        "bco_pair": lambda: -ls(b * c) - ls(-b * j),
        "sppo_hard": lambda: (c - 1 / (2 * b)) ** 2 + (j + 1 / (2 * b)) ** 2,
        "aot": lambda: _margin_loss(b * ((pi_c - pi_j).sort()[0] - (ref_c - ref_j).sort()[0]), e),
        "aot_unpaired": lambda: _margin_loss(b * (c.sort()[0] - j.sort()[0]), e),
        "apo_zero": lambda: 1 - s(b * c) + s(b * j),
        "apo_down": lambda: s(b * c) + 1 - s(b * d),
        "discopop": lambda: (1 - s(b * d / o.discopop_tau)) * -ls(b * d) + s(b * d / o.discopop_tau) * (-b * d).exp(),
        "sigmoid_norm": lambda: _margin_loss(b * d, 0),
        "simpo": lambda: _margin_loss(b * d - o.simpo_gamma, e),
        "cpo": lambda: _margin_loss(b * d, e),
        "orpo": lambda: -b * ls((c - j) - (torch.log1p(-c.exp()) - torch.log1p(-j.exp()))),
    }
    return table[o.loss_type]()


def dpo_loss_oracle(
    o, chosen_logps, rejected_logps, ref_chosen_logps=None, ref_rejected_logps=None, chosen_lengths=None,
    rejected_lengths=None,
):  # fmt: skip
    pi_c, pi_j = _wide(chosen_logps), _wide(rejected_logps)
    ref_c, ref_j = (0, 0) if ref_chosen_logps is None else (_wide(ref_chosen_logps), _wide(ref_rejected_logps))
    n_c, n_j = (x.clamp(min=1) for x in (chosen_lengths, rejected_lengths)) if chosen_lengths is not None else (1, 1)
    averaged = o.loss_type in ("sigmoid_norm", "simpo", "orpo") or (o.loss_type == "ipo" and o.ipo_average)
    c, j = ((pi_c - ref_c) / n_c, (pi_j - ref_j) / n_j) if averaged else (pi_c - ref_c, pi_j - ref_j)
    pairs = max(len(pi_c), 1)
    loss = pair_losses(o, c, j, pi_c, pi_j, ref_c, ref_j).sum() / pairs
    nll = {"cpo": o.cpo_alpha, "orpo": 1}.get(o.loss_type, 0) + o.sft_coef
    if nll:
        loss = loss - nll * pi_c.sum() / (pairs if chosen_lengths is None else max(int(chosen_lengths.sum()), 1))
    by_mean = o.loss_type in ("simpo", "orpo")
    rewards = [o.beta * (c if by_mean else pi_c - ref_c), o.beta * (j if by_mean else pi_j - ref_j)]
    columns = (*rewards, rewards[0] - rewards[1], rewards[0] > rewards[1], pi_c, pi_j)
    means = [x.detach().to(pi_c.dtype).sum() / pairs for x in columns]
    return loss, torch.stack([*means, pi_c.new_tensor(len(pi_c))])


def _dpo_loss(options, **inputs):
    loss, stats = dpo_loss(options=options, **inputs)
    return loss, torch.stack([getattr(stats, name) for name in DPO_FIELDS])


def options_of(kind: str, **more) -> DPOOptions:
    smoothing = {"exo_pair": 0.1, "robust": 0.2, "cpo": 0.1, "aot": 0.1}.get(kind, 0.0)
    return DPOOptions(**{"loss_type": kind, "label_smoothing": smoothing, "beta": 0.3, **more})


def _dpo_case(name, options, lengths=True, values_only=True, **inputs) -> OpCase:
    inputs |= {"reference": options.loss_type not in REFERENCE_FREE, "lengths": lengths}
    return OpCase(
        "dpo_loss", name, partial(_pair_inputs, **inputs), partial(_dpo_loss, options),
        partial(dpo_loss_oracle, options), learned=("chosen_logps", "rejected_logps"), values_only=values_only,
        tolerance=3e-6,
    )  # fmt: skip


DPO_LOSS = [
    *(_dpo_case(kind, options_of(kind), values_only=kind not in ("sigmoid", "aot", "orpo")) for kind in TYPES),
    _dpo_case("ipo_sums", options_of("ipo", ipo_average=False), lengths=False),
    _dpo_case("cdpo", options_of("sigmoid", label_smoothing=0.2), lengths=False),
    _dpo_case("cpo_paper", options_of("cpo", cpo_alpha=0.5), lengths=False),
    _dpo_case("rpo", options_of("sigmoid", sft_coef=0.7)),
    _dpo_case("ipo_sft_of_sequences", options_of("ipo", sft_coef=0.7, ipo_average=False), lengths=False),
    _dpo_case("no_pairs", options_of("sigmoid"), pairs=0),
]


# --- kto_loss -------------------------------------------------------------------------------------------------------


def _kto_inputs(generator, count=9, kl=0.8):
    draw = lambda: torch.randn(count, generator=generator, dtype=torch.float64)  # noqa: E731
    logps = -10 - 5 * draw().abs()
    out = {"logps": logps, "ref_logps": logps + 4 * draw(), "labels": torch.rand(count, generator=generator) < 0.6}
    return out | ({} if kl is None else {"kl": torch.tensor(kl, dtype=torch.float64)})


def _kto_loss(options, **inputs):
    loss, stats = kto_loss(**inputs, **options)
    return loss, torch.stack([getattr(stats, name) for name in KTO_FIELDS])


def _kto_oracle(options, logps, ref_logps, labels, kl=None):
    pi, b = _wide(logps), options["beta"]
    r, z = pi - _wide(ref_logps), 0 if kl is None else max(0.0, float(kl))
    good, bad = labels.nonzero()[:, 0], (~labels).nonzero()[:, 0]
    losses = torch.cat([
        options["desirable_weight"] * (1 - torch.sigmoid(b * (r[good] - z))),
        options["undesirable_weight"] * (1 - torch.sigmoid(b * (z - r[bad]))),
    ])  # fmt: skip
    means = [x[at].detach().sum() / max(len(at), 1) for x in (b * r, pi) for at in (good, bad)]
    return losses.sum() / max(len(pi), 1), torch.stack([*means, *(pi.new_tensor(len(at)) for at in (good, bad))])


def _kto_case(name, loss_type="kto", values_only=False, **inputs) -> OpCase:
    options = {"loss_type": loss_type, "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    return OpCase(
        "kto_loss", name, partial(_kto_inputs, **inputs), partial(_kto_loss, options), partial(_kto_oracle, options),
        learned=("logps",), values_only=values_only, tolerance=3e-6,
    )  # fmt: skip


KTO_LOSS = [
    _kto_case("kto"),
    _kto_case("kto_below_the_reference", kl=-0.4, values_only=True),
    _kto_case("apo_zero_unpaired", "apo_zero_unpaired", kl=None),
    _kto_case("no_sequences", count=0, values_only=True),
]


# --- linear_dpo_loss ------------------------------------------------------------------------------------------------


def _linear_inputs(generator, vocab=19, width=8, reference=True, **layout):
    out = tokens(generator, ("keep",), **layout)
    shape = out.pop("keep").shape
    out |= head(generator, shape, vocab, width)
    out["token_ids"] = torch.randint(0, vocab, shape, generator=generator)
    if reference:
        count = shape[0] if "cu_seqlens" not in out else len(out["cu_seqlens"]) - 1
        out["ref_logps"] = -20 * torch.rand(count, generator=generator, dtype=torch.float64)
    return out


def _linear_dpo_loss(options, chunk_size, **inputs):
    loss, stats, logps = linear_dpo_loss(options=options, chunk_size=chunk_size, **inputs)
    return loss, torch.stack([getattr(stats, name) for name in DPO_FIELDS]), logps


def _linear_oracle(options, chunk_size, hidden, weight, token_ids, ref_logps=None, mask=None, cu_seqlens=None):
    counted = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    logits = _wide(head_logits(hidden, weight)).masked_fill(~counted[..., None], 0)
    (logprobs,) = token_logprobs_oracle(logits, token_ids)
    (logps,) = _sums_oracle(logprobs, mask, cu_seqlens)
    (lengths,) = _sums_oracle(torch.ones_like(logprobs), mask, cu_seqlens)
    refs = (None, None) if ref_logps is None else ref_logps.chunk(2)
    halves = [*logps.chunk(2), *refs, *lengths.detach().long().chunk(2)]
    return *dpo_loss_oracle(options, *halves), logps.detach()


def _linear_case(name, layout, options, chunk_size=None, values_only=True) -> OpCase:
    inputs = {"reference": options.loss_type not in REFERENCE_FREE}
    return OpCase(
        "linear_dpo_loss", name, partial(_linear_inputs, **inputs, **layout),
        partial(_linear_dpo_loss, options, chunk_size), partial(_linear_oracle, options, chunk_size),
        learned=("hidden", "weight"), values_only=values_only, tolerance=3e-6,
    )  # fmt: skip


EVEN = {"gaps": {"mask": "gaps", "shape": (4, 9)}, "packed": {"packed": True, "shape": (6, 9)},
        "all_masked": {"mask": "none", "shape": (4, 5)}, "no_sequences": {"shape": (0, 5)}}  # fmt: skip
LINEAR_DPO_LOSS = [
    *(_linear_case(f"{kind}_gaps", EVEN["gaps"], options_of(kind), 20, values_only=kind != "orpo") for kind in TYPES),
    *(_linear_case(name, EVEN[name], options_of("sigmoid"), values_only=name != "packed") for name in EVEN),
    _linear_case("rpo", EVEN["packed"], options_of("sigmoid", sft_coef=0.7), 20),
    _linear_case("four_products", EVEN["packed"], options_of("simpo"), 2),
    _linear_case("four_products_batch", EVEN["packed"], options_of("aot_unpaired"), 7),
]
