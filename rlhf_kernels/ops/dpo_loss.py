"""Direct preference losses from sequence log-probabilities, their gradients and statistics.

c, j are the log-ratios to the reference of chosen and rejected, d = c - j; C, J are divided by the token counts, M is
their difference; for types without a reference they are log-probabilities. s is the sigmoid, e label_smoothing. The
loss is the mean over pairs.

    sigmoid        -(1-e) log s(beta d) - e log s(-beta d)                 arXiv 2305.18290; e > 0 is cDPO
    hinge          max(0, 1 - beta d)                                      arXiv 2309.06657
    ipo            (M - 1/(2 beta))^2, of d if not ipo_average             arXiv 2310.12036
    robust         (-(1-e) log s(beta d) + e log s(-beta d)) / (1 - 2e)    arXiv 2403.00409
    exo_pair       KL(s(beta d) || 1-e)                                    arXiv 2402.00856
    nca_pair       -log s(beta c) - log s(-beta c) / 2 - log s(-beta j) / 2    arXiv 2402.05369
    bco_pair       -log s(beta c) - log s(-beta j)                         arXiv 2404.04656, without its running mean
    sppo_hard      (c - 1/(2 beta))^2 + (j + 1/(2 beta))^2                 arXiv 2405.00675
    aot            sigmoid of sorted policy margins less sorted reference margins    arXiv 2406.05882
    aot_unpaired   sigmoid of sorted c less sorted j
    apo_zero       1 - s(beta c) + s(beta j)                               arXiv 2408.06266
    apo_down       s(beta c) + 1 - s(beta d)
    discopop       (1-g) (-log s(beta d)) + g exp(-beta d), g = s(beta d / tau)      arXiv 2406.08414
    sigmoid_norm   sigmoid of beta M                                       arXiv 2411.15124
    simpo          sigmoid of beta M - gamma                               arXiv 2405.14734
    cpo            sigmoid of beta (chosen - rejected), plus cpo_alpha NLL           arXiv 2401.08417
    orpo           NLL - beta log s(log-odds of C less log-odds of J)      arXiv 2403.07691

NLL is the mean over all chosen tokens of the batch; without token counts, as the paper of cpo has it, over sequences.
Every type takes sft_coef NLL beside (RPO, arXiv 2404.19733, which averages over tokens of a sequence first).
Small vectors: plain torch is the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _checks as check
from .._layout import compute_dtype
from .._library import call, define, once_differentiable
from ..stats import DPOStats

TYPES = (
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "simpo", "cpo", "orpo",
)  # fmt: skip
REFERENCE_FREE = ("simpo", "cpo", "orpo")
AVERAGED = ("ipo", "sigmoid_norm", "simpo", "orpo")
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "sigmoid_norm", "simpo", "cpo")
OVER_THE_BATCH = ("aot", "aot_unpaired")  # a pair's loss depends on the other pairs

OPTIONS_SCHEMA = (
    "int loss_type, float beta, float label_smoothing, float simpo_gamma, float cpo_alpha, float discopop_tau, "
    "bool ipo_average, float sft_coef"
)
# stats is (7,) float64, DPO_FIELDS; a gradient that is not asked for is empty.
SCHEMA = (
    "dpo_loss(Tensor chosen_logps, Tensor rejected_logps, Tensor? ref_chosen_logps, Tensor? ref_rejected_logps, "
    f"Tensor? chosen_lengths, Tensor? rejected_lengths, Tensor? denominators, {OPTIONS_SCHEMA}, "
    "bool grad_chosen, bool grad_rejected) -> (Tensor loss, Tensor stats, Tensor d_chosen, Tensor d_rejected)"
)
N_OPTIONS, N_ARGUMENTS = 8, 17


@dataclass(frozen=True)
class DPOOptions:
    """Options of `dpo_loss` and `linear_dpo_loss`."""

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    discopop_tau: float = 0.05
    ipo_average: bool = True  # False: ipo compares sums over a sequence, not means
    sft_coef: float = 0.0  # of the NLL of the chosen sequences, beside what cpo and orpo have of it

    def __post_init__(self) -> None:
        check.one_of("loss_type", self.loss_type, TYPES)
        check.number("beta", self.beta, above=0)
        check.number("label_smoothing", self.label_smoothing, 0, 1)
        check.number("simpo_gamma", self.simpo_gamma)
        check.number("cpo_alpha", self.cpo_alpha)
        check.number("discopop_tau", self.discopop_tau, above=0)
        check.number("sft_coef", self.sft_coef, 0)
        smoothing = (
            f"label_smoothing: expected a number %s with loss_type={self.loss_type!r}, got {self.label_smoothing}"
        )
        if self.loss_type not in SMOOTHED and self.label_smoothing:
            raise ValueError(smoothing % "0")
        if self.loss_type == "robust" and self.label_smoothing >= 0.5:
            raise ValueError(smoothing % "in [0, 0.5)")
        if self.loss_type == "exo_pair" and not 0 < self.label_smoothing < 1:
            raise ValueError(smoothing % "in (0, 1)")

    def codes(self) -> tuple:
        """As the schema takes them."""
        values = [getattr(self, f.name) for f in fields(self)]
        head = (TYPES.index(self.loss_type), float(values[0]), *map(float, values[2:6]))
        return (*head, self.ipo_average, float(self.sft_coef))

    @classmethod
    def from_codes(cls, loss_type: int, beta: float, *rest) -> DPOOptions:
        return cls(beta, TYPES[loss_type], *rest)

    @property
    def averaged(self) -> bool:
        """Whether the loss compares means over tokens."""
        return self.loss_type in AVERAGED and (self.loss_type != "ipo" or self.ipo_average)

    @property
    def nll_coef(self) -> float:
        """Weight of the NLL term."""
        return {"cpo": self.cpo_alpha, "orpo": 1.0}.get(self.loss_type, 0.0) + self.sft_coef


# Functions of one margin: (value, slope)


def _smoothed(x: Tensor, e: float) -> tuple[Tensor, Tensor]:
    value, slope = -(1 - e) * logsigmoid(x), -(1 - e) * torch.sigmoid(-x)
    return (value - e * logsigmoid(-x), slope + e * torch.sigmoid(x)) if e else (value, slope)


def _robust(x: Tensor, e: float) -> tuple[Tensor, Tensor]:
    value = -(1 - e) * logsigmoid(x) + (e * logsigmoid(-x) if e else 0)
    return value / (1 - 2 * e), (-(1 - e) * torch.sigmoid(-x) - e * torch.sigmoid(x)) / (1 - 2 * e)


def _exo(x: Tensor, e: float) -> tuple[Tensor, Tensor]:
    p, q, e = torch.sigmoid(x), torch.sigmoid(-x), torch.tensor(e, dtype=torch.float64)
    log_keep, log_flip = float(torch.log1p(-e)), float(e.log())
    value = p * (logsigmoid(x) - log_keep) + q * (logsigmoid(-x) - log_flip)
    return value, p * q * (x - log_keep + log_flip)


def _discopop(x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    g, rest = torch.sigmoid(x / tau), torch.sigmoid(-x / tau)
    blown = torch.exp(logsigmoid(x / tau) - x)  # g exp(-x), where exp(-x) alone overflows
    value = -rest * logsigmoid(x) + blown
    return value, g * rest / tau * logsigmoid(x) - rest * torch.sigmoid(-x) + blown * (rest / tau - 1)


def _margin(kind: str, options: DPOOptions) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """The types that are a function of the margin alone: of M or d, beta included."""
    beta, e = options.beta, options.label_smoothing

    def scaled(f: Callable) -> Callable:
        def of_margin(d: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = f(beta * d)
            return value, beta * slope

        return of_margin

    return {
        "hinge": scaled(lambda x: (torch.relu(1 - x), -torch.where(x < 1, 1.0, torch.where(x.isnan(), x, 0.0)))),
        "ipo": lambda d: ((d - 0.5 / beta) ** 2, 2 * (d - 0.5 / beta)),
        "robust": scaled(lambda x: _robust(x, e)),
        "exo_pair": scaled(lambda x: _exo(x, e)),
        "discopop": scaled(lambda x: _discopop(x, options.discopop_tau)),
        "simpo": scaled(lambda x: _smoothed(x - options.simpo_gamma, e)),
        **{name: scaled(lambda x: _smoothed(x, e)) for name in ("sigmoid", "sigmoid_norm", "cpo")},
    }.get(kind)


def _sorted(chosen: Tensor, rejected: Tensor, ref: tuple[Tensor, Tensor], options: DPOOptions):
    """aot: the loss of each rank, and slopes put back where their values came from."""
    beta, e = options.beta, options.label_smoothing
    if options.loss_type == "aot":
        margins, order = torch.sort(chosen - rejected)
        value, slope = _smoothed(beta * (margins - torch.sort(ref[0] - ref[1])[0]), e)
        slope = torch.zeros_like(chosen).scatter(0, order, beta * slope)
        return value, slope, -slope
    (c, from_c), (j, from_j) = torch.sort(chosen - ref[0]), torch.sort(rejected - ref[1])
    value, slope = _smoothed(beta * (c - j), e)
    slope = beta * slope
    return value, torch.zeros_like(c).scatter(0, from_c, slope), torch.zeros_like(c).scatter(0, from_j, -slope)


def _apart(kind: str, c: Tensor, j: Tensor, options: DPOOptions) -> tuple[Tensor, Tensor, Tensor]:
    """The types that look at chosen and rejected apart: value, slope of c, slope of j."""
    beta, s = options.beta, torch.sigmoid
    x, y = beta * c, beta * j
    bell = lambda u: beta * s(u) * s(-u)  # noqa: E731
    if kind == "nca_pair":
        value = -logsigmoid(x) - 0.5 * logsigmoid(-x) - 0.5 * logsigmoid(-y)
        return value, beta * (0.5 * s(x) - s(-x)), 0.5 * beta * s(y)
    if kind == "bco_pair":
        return -logsigmoid(x) - logsigmoid(-y), -beta * s(-x), beta * s(y)
    if kind == "sppo_hard":
        up, down = c - 0.5 / beta, j + 0.5 / beta
        return up * up + down * down, 2 * up, 2 * down
    if kind == "apo_zero":
        return s(-x) + s(y), -bell(x), bell(y)
    if kind == "apo_down":
        return s(x) + s(y - x), bell(x) - bell(x - y), bell(x - y)
    # orpo: c and j are mean log-probabilities; the derivatives in a form that lives at probabilities near 1. What is 0
    # was rounded to it: how near to certainty it is, and so the slope there, is not known.
    limit = -torch.finfo(c.dtype).tiny
    certain, both = j == 0, (c == 0) & (j == 0)
    c, j = c.clamp(max=limit), j.clamp(max=limit)
    u, v = -torch.expm1(c), -torch.expm1(j)
    below = u + torch.exp(c - j) * v
    value = -beta * logsigmoid(c - j - u.log() + v.log())
    return value, (-beta / below).masked_fill(both, 0), (beta * (u / v / below)).masked_fill(certain, 0)


def pair_terms(
    chosen: Tensor,  # (B,) float, as all below
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    options: DPOOptions,
    pairs: float | Tensor,  # () what the sum over pairs is divided by
    chosen_tokens: float | Tensor,  # () and the sum of the NLL
) -> tuple[Tensor, Tensor, Tensor]:
    """(what each pair adds to the loss, d loss / d chosen, d loss / d rejected), (B,) each."""
    kind, ones = options.loss_type, torch.ones_like(chosen)
    n_chosen, n_rejected = ones, ones
    if options.averaged:
        n_chosen, n_rejected = chosen_lengths.clamp(min=1), rejected_lengths.clamp(min=1)
    ref = (ref_chosen, ref_rejected) if kind not in REFERENCE_FREE else (0, 0)
    c, j = (chosen - ref[0]) / n_chosen, (rejected - ref[1]) / n_rejected
    if kind in OVER_THE_BATCH:
        value, d_chosen, d_rejected = _sorted(chosen, rejected, ref, options)
    elif margin := _margin(kind, options):
        value, d_chosen = margin(c - j)
        d_rejected = -d_chosen
    else:
        value, d_chosen, d_rejected = _apart(kind, c, j, options)
    value, d_chosen, d_rejected = value / pairs, d_chosen / n_chosen / pairs, d_rejected / n_rejected / pairs
    if options.nll_coef:
        per_logp = options.nll_coef / chosen_tokens
        value, d_chosen = value - chosen * per_logp, d_chosen - per_logp
    return value, d_chosen, d_rejected


def divisors_of(
    denominators: Tensor | None,  # (2,)
    pairs: int,
    chosen_lengths: Tensor | None,  # (B,)
) -> tuple[float | Tensor, float | Tensor]:
    """Of the sum over pairs and of that of the NLL: what the caller says, or else of this batch."""
    if denominators is not None:
        return denominators[0], denominators[1]
    pairs = max(pairs, 1)
    return pairs, pairs if chosen_lengths is None else chosen_lengths.sum().clamp(min=1)


def dpo_loss_reference(
    chosen_logps: Tensor,  # (B,) float32 or float64, as all below
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    denominators: Tensor | None,  # (2,)
    *rest,  # the options' codes, grad_chosen, grad_rejected
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options, wants = DPOOptions.from_codes(*rest[:-2]), rest[-2:]
    refs, lengths = (ref_chosen_logps, ref_rejected_logps), (chosen_lengths, rejected_lengths)
    divisors = divisors_of(denominators, chosen_logps.shape[0], chosen_lengths)
    value, *slopes = pair_terms(chosen_logps, rejected_logps, *refs, *lengths, options, *divisors)
    rewards = []
    for logps, ref, length in zip((chosen_logps, rejected_logps), refs, lengths):
        ratio = logps if options.loss_type in REFERENCE_FREE else logps - ref
        ratio = ratio / length.clamp(min=1) if options.loss_type in ("simpo", "orpo") else ratio
        rewards.append(options.beta * ratio.double())
    margins = rewards[0] - rewards[1]
    columns = (*rewards, margins, margins > 0, chosen_logps, rejected_logps, torch.ones_like(margins))
    stats = torch.stack([x.double().sum() for x in columns])
    grads = (slope if want else slope.new_empty(0) for slope, want in zip(slopes, wants))
    return value.sum(), stats, *grads


def _fake(chosen, rejected, *rest):
    empty = lambda wanted: torch.empty_like(chosen) if wanted else chosen.new_empty(0)  # noqa: E731
    return chosen.new_empty(()), chosen.new_empty(7, dtype=torch.float64), *map(empty, rest[-2:])


def _setup_context(ctx, inputs, output):
    _, stats, *gradients = output
    ctx.wants = inputs[-2:]
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(stats, *gradients)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    once_differentiable("dpo_loss")
    given = grad_loss is not None
    grads = (d * grad_loss if want and given else None for d, want in zip(ctx.saved_tensors, ctx.wants))
    return *grads, *[None] * (N_ARGUMENTS - 2)


dpo_loss_op = define(
    SCHEMA, dpo_loss_reference, _fake, setup_context=_setup_context, backward=_backward, kernel="torch (by design)"
)


def check_reference(options: DPOOptions, names: str, given: bool) -> None:
    needed = options.loss_type not in REFERENCE_FREE
    if given != needed:
        expected, got = ("a tensor", "None") if needed else ("None", "a tensor")
        way_out = "pass the reference's log-probabilities" if needed else "this type has no reference"
        raise ValueError(f"{names}: expected {expected} with loss_type={options.loss_type!r}, got {got}; {way_out}")


def check_denominators(value: tuple[float, float] | Tensor | None, options: DPOOptions, like: Tensor) -> Tensor | None:
    """As the schema takes them."""
    if value is None:
        return None
    if options.loss_type in OVER_THE_BATCH:
        raise ValueError(
            f"denominators: expected None with loss_type={options.loss_type!r}, where a pair's loss depends on the "
            "others: it is no sum over parts of a batch"
        )
    if isinstance(value, Tensor):
        check.same_shape("denominators", value, "pairs and chosen tokens", (2,))
        check.same_device("denominators", value, "the log-probabilities", like)
        return value
    if len(value) != 2:
        raise ValueError(f"denominators: expected pairs and chosen tokens, got {value!r}")
    for number in value:
        check.number("denominators", number, above=0)
    return torch.tensor(value, dtype=torch.float64).to(like.device, non_blocking=True)


def _options(options: DPOOptions | None, **given) -> DPOOptions:
    if options is None:
        return DPOOptions(**given)
    check.options(options, DPOOptions)
    for name, value in given.items():
        if value != getattr(DPOOptions, name):
            raise ValueError(
                f"{name}: expected its default because options is given, got {value!r}; set options.{name}"
            )
    return options


def dpo_loss(
    chosen_logps: Tensor,  # (B,) float, sums over each sequence; as all below
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,  # (B,) counted tokens, of any dtype
    rejected_lengths: Tensor | None = None,
    options: DPOOptions | None = None,  # in place of the three above, with the rarer ones
    denominators: tuple[float, float] | Tensor | None = None,  # (2,) pairs and chosen tokens of a step, this a part
) -> tuple[Tensor, DPOStats]:
    """(loss, stats): the mean over pairs, float32 (float64 for float64 inputs), and sums on the device.

    Differentiable once, in chosen_logps and rejected_logps. ipo (unless options.ipo_average is False), sigmoid_norm,
    simpo and orpo need the token counts; simpo, cpo and orpo take no reference, the others need one. A batch without
    pairs gives 0. With the `denominators` of a whole step the losses of its parts add up to its own. Raises TypeError
    or ValueError for wrong dtypes, shapes, devices and options.
    """
    options = _options(options, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing)
    check.is_float("chosen_logps", chosen_logps)
    if chosen_logps.dim() != 1:
        raise ValueError(f"chosen_logps: expected (B,), got {tuple(chosen_logps.shape)}; see sequence_logprobs")
    check.is_tensor("rejected_logps", rejected_logps)
    refs = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    for name, x in {"rejected_logps": rejected_logps, **refs}.items():
        check.like(name, x, "chosen_logps", chosen_logps)
    for name, x in refs.items():
        check_reference(options, name, x is not None)
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    for name, x in lengths.items():
        if x is not None:
            check.is_tensor(name, x)
            check.same_shape(name, x, "chosen_logps", chosen_logps.shape)
            check.same_device(name, x, "chosen_logps", chosen_logps)
        elif options.averaged or lengths != dict.fromkeys(lengths):
            raise ValueError(f"{name}: expected token counts (B,) with loss_type={options.loss_type!r}, got None")
    dtype = compute_dtype(chosen_logps, rejected_logps, *refs.values())
    whole = check_denominators(denominators, options, chosen_logps)
    constant = [None if x is None else x.detach().to(dtype) for x in (*refs.values(), *lengths.values(), whole)]
    wants = [torch.is_grad_enabled() and x.requires_grad for x in (chosen_logps, rejected_logps)]
    loss, stats, *_ = call(
        dpo_loss_op, chosen_logps.to(dtype), rejected_logps.to(dtype), *constant, *options.codes(), *wants
    )
    return loss, DPOStats(stats.detach())
