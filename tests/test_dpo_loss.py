"""dpo_loss and DPOStats: the battery, then closed forms in probabilities, extremes and refusals."""

import math
from types import SimpleNamespace

import mpmath
import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import DPOOptions, dpo_loss, testing
from rlhf_kernels.ops.dpo_loss import AVERAGED, OVER_THE_BATCH, REFERENCE_FREE, SMOOTHED, TYPES, dpo_loss_op


@battery("dpo_loss")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


EXACT = SimpleNamespace(exp=mpmath.exp, log=mpmath.log, sorted=lambda x: x)  # one pair, any number of digits
PLAIN = SimpleNamespace(exp=torch.exp, log=torch.log, sorted=lambda x: x.sort()[0])
INPUTS = (
    "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "chosen_lengths", "rejected_lengths",
)  # fmt: skip
SMOOTHING = {"exo_pair": 0.25, "robust": 0.125}
OPTIONS = [DPOOptions(beta=0.125, loss_type=kind, label_smoothing=SMOOTHING.get(kind, 0)) for kind in TYPES]
OPTIONS += [DPOOptions(0.5, kind, label_smoothing=0.25) for kind in SMOOTHED if kind not in SMOOTHING]
OPTIONS += [
    DPOOptions(0.5, "ipo", ipo_average=False), DPOOptions(0.5, "discopop", discopop_tau=0.75),
    DPOOptions(2.0, "simpo", simpo_gamma=1.5), DPOOptions(0.5, "cpo", cpo_alpha=0.25),
    DPOOptions(0.5, "sigmoid", sft_coef=0.75), DPOOptions(0.25, "orpo", sft_coef=0.5),
]  # fmt: skip
each_type = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.loss_type}-{o.label_smoothing}-{o.beta}")


def closed_form(o, m, pi_c, pi_j, ref_c, ref_j, n_c, n_j):
    """Of each pair, without the NLL term, as the papers have it: in probabilities, for numbers of any kind."""
    averaged = o.loss_type in AVERAGED and o.ipo_average
    c, j = ((pi_c - ref_c) / n_c, (pi_j - ref_j) / n_j) if averaged else (pi_c - ref_c, pi_j - ref_j)
    b, e, d = o.beta, o.label_smoothing, c - j
    s = lambda x: 1 / (1 + m.exp(-x))  # noqa: E731
    smooth = lambda x: -(1 - e) * m.log(s(x)) - (e * m.log(s(-x)) if e else 0)  # noqa: E731
    odds = lambda x: m.exp(x) / (1 - m.exp(x))  # noqa: E731
    g = lambda: s(b * d / o.discopop_tau)  # noqa: E731
    return {
        "sigmoid": lambda: smooth(b * d),
        "hinge": lambda: (abs(1 - b * d) + 1 - b * d) / 2,
        "ipo": lambda: (d - 1 / (2 * b)) ** 2,
        "robust": lambda: ((1 - e) * m.log(1 / s(b * d)) - e * m.log(1 / s(-b * d))) / (1 - 2 * e),
        "exo_pair": lambda: s(b * d) * m.log(s(b * d) / (1 - e)) + s(-b * d) * m.log(s(-b * d) / e),
        "nca_pair": lambda: -m.log(s(b * c)) - m.log(s(-b * c)) / 2 - m.log(s(-b * j)) / 2,
        "bco_pair": lambda: -m.log(s(b * c)) - m.log(s(-b * j)),
        "sppo_hard": lambda: (c - 1 / (2 * b)) ** 2 + (j + 1 / (2 * b)) ** 2,
        "aot": lambda: smooth(b * (m.sorted(pi_c - pi_j) - m.sorted(ref_c - ref_j))),
        "aot_unpaired": lambda: smooth(b * (m.sorted(c) - m.sorted(j))),
        "apo_zero": lambda: 1 - s(b * c) + s(b * j),
        "apo_down": lambda: s(b * c) + 1 - s(b * d),
        "discopop": lambda: -(1 - g()) * m.log(s(b * d)) + g() * m.exp(-b * d),
        "sigmoid_norm": lambda: smooth(b * d),
        "simpo": lambda: smooth(b * d - o.simpo_gamma),
        "cpo": lambda: smooth(b * (pi_c - pi_j)),
        "orpo": lambda: -b * m.log(s(m.log(odds(c) / odds(j)))),
    }[o.loss_type]()


def _inputs(options, pairs=6, dtype=torch.float64):
    draw = lambda: -6 - 6 * torch.rand(pairs, dtype=dtype)  # noqa: E731
    out = {"chosen_logps": draw().requires_grad_(), "rejected_logps": draw().requires_grad_()}
    if options.loss_type not in REFERENCE_FREE:
        out |= {"ref_chosen_logps": draw(), "ref_rejected_logps": draw()}
    return out | {name: torch.randint(1, 9, (pairs,)) for name in INPUTS[4:]}


def _learned(x):
    return [x["chosen_logps"], x["rejected_logps"]]


@each_type
def test_closed_form_and_its_derivatives(options):
    x = _inputs(options)
    zeros = torch.zeros(6, dtype=torch.float64)
    expected = closed_form(options, PLAIN, *[x.get(name, zeros) for name in INPUTS]).mean()
    nll = {"cpo": options.cpo_alpha, "orpo": 1}.get(
        options.loss_type, 0
    ) + options.sft_coef  # over the chosen tokens of the batch
    expected = expected - nll * x["chosen_logps"].sum() / x["chosen_lengths"].sum()
    loss, _ = dpo_loss(**x, options=options)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-15)
    for a, b in zip(torch.autograd.grad(loss, _learned(x)), torch.autograd.grad(expected, _learned(x))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)
    function = lambda chosen, rejected: dpo_loss(**x | dict(zip(INPUTS, (chosen, rejected))), options=options)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, _learned(x))


def _in_many_digits(options, point):
    """(value, d/d chosen, d/d rejected) of one pair, with 60 digits, rounded once."""
    nll = {"cpo": options.cpo_alpha, "orpo": 1}.get(options.loss_type, 0) + options.sft_coef
    form = lambda c, j: closed_form(options, EXACT, c, j, *point[2:]) - nll * c / point[4]  # noqa: E731
    with mpmath.workdps(60):
        point = [mpmath.mpf(v) for v in point]
        found = [form(*point[:2]), *(mpmath.diff(form, tuple(point[:2]), order) for order in ((1, 0), (0, 1)))]
        return [float(v) for v in found]


def _one_pair(options, point, dtype):
    """The same in this dtype."""
    x = {name: torch.tensor([value], dtype=dtype) for name, value in zip(INPUTS, point)}
    if options.loss_type in REFERENCE_FREE:
        del x["ref_chosen_logps"], x["ref_rejected_logps"]
    for leaf in _learned(x):
        leaf.requires_grad_()
    loss, _ = dpo_loss(**x, options=options)
    return [v.item() for v in (loss, *torch.autograd.grad(loss, _learned(x)))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_type
def test_margins_of_ten_thousand(options, dtype):
    """Either side of every exponential, from the policy and from the reference: exact where exp overflows."""
    near, far = -8.0, -10008.0
    for logps in (
        (near, far, -16.0, -16.0),
        (far, near, -16.0, -16.0),
        (near, -16.0, far, near),
        (-16.0, near, near, far),
    ):
        refs = (0.0, 0.0) if options.loss_type in REFERENCE_FREE else logps[2:]
        point = (*logps[:2], *refs, 2.0, 4.0)
        expected = pytest.approx(_in_many_digits(options, point), rel=1e-6 if dtype == torch.float32 else 1e-12)
        assert _one_pair(options, point, dtype) == expected, point


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_near_certainty(dtype):
    """log(1 - exp(x)) loses every digit near 0; here the derivative grows to 2^97 and keeps them."""
    options = DPOOptions(beta=0.125, loss_type="orpo")
    means = (-(2.0**-10), -(2.0**-27), -(2.0**-67), -(2.0**-100), -2.0)
    for point in ((2 * c, 4 * j, 0.0, 0.0, 2.0, 4.0) for c in means for j in means):
        expected = _in_many_digits(options, point)
        found = _one_pair(options, point, dtype)
        assert found == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12, abs=0), point


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_at_certainty(dtype):
    """Exactly 0 was rounded to it: how steep the log-odds are there is not known, and a guess would be 1e36. Of the
    chosen answer its NLL and the slope towards a rejected one below certainty remain."""
    for c, j in ((0.0, 0.0), (0.0, -2.0), (-2.0, 0.0)):
        loss, of_chosen, of_rejected = _one_pair(DPOOptions(loss_type="orpo"), (c, j, 0.0, 0.0, 1.0, 1.0), dtype)
        assert math.isfinite(loss) and -2 < of_chosen < -0.9 and (0 < of_rejected < 1 if j else of_rejected == 0)
        assert c != j or loss == pytest.approx(0.1 * math.log(2))


@each_type
def test_nan_shows(options):
    """trl#878: no clamp, sort or comparison swallows it."""
    for name in INPUTS[:4]:
        x = _inputs(options)
        if name in x:
            x[name] = x[name].detach().clone().index_fill_(0, torch.tensor([2]), float("nan")).requires_grad_()
            loss, stats = dpo_loss(**x, options=options)
            assert loss.isnan() and stats.margins.isnan(), name
            assert any(g.isnan().any() for g in torch.autograd.grad(loss, _learned(x), allow_unused=True)), name


@each_type
def test_no_pairs(options):
    x = _inputs(options, pairs=0)
    loss, stats = dpo_loss(**x, options=options)
    assert loss.item() == 0 and all(v == 0 for v in stats.as_dict().values())
    assert [g.shape for g in torch.autograd.grad(loss, _learned(x))] == [(0,), (0,)]


@each_type
def test_upstream_gradient(options):
    x = _inputs(options)
    loss, _ = dpo_loss(**x, options=options)
    one = torch.autograd.grad(loss, _learned(x), retain_graph=True)
    for a, b in zip(torch.autograd.grad(-2.5 * loss, _learned(x)), one):
        torch.testing.assert_close(a, -2.5 * b)


def test_only_needed_gradients():
    """What is not asked for is not kept; a reference that requires a gradient gets none; there is one derivative."""
    options = DPOOptions()
    x = _inputs(options)
    fixed = [*(x[name].detach() for name in INPUTS), None]
    shapes = [
        [g.shape[0] for g in dpo_loss_op(*fixed, *options.codes(), *wants)[2:]] for wants in ((1, 0), (0, 1), (0, 0))
    ]
    assert shapes == [[6, 0], [0, 6], [0, 0]]
    x["ref_chosen_logps"].requires_grad_()
    loss, _ = dpo_loss(**x)
    assert torch.autograd.grad(loss, x["ref_chosen_logps"], retain_graph=True, allow_unused=True) == (None,)
    with torch.no_grad():
        assert torch.equal(dpo_loss(**x)[0], loss) and not dpo_loss(**x)[0].requires_grad
    with pytest.raises(RuntimeError, match="dpo_loss is differentiable once"):
        torch.autograd.grad(loss, x["chosen_logps"], create_graph=True)


@each_type
def test_statistics(options):
    """trl#5079: rewards are the policy's, whatever the loss; those of simpo and orpo are of means. `+` merges."""
    x = _inputs(options)
    _, stats = dpo_loss(**x, options=options)
    rewards = []
    for side in ("chosen", "rejected"):
        ratio = x[f"{side}_logps"].detach() - x.get(f"ref_{side}_logps", 0)
        rewards.append(
            options.beta * (ratio / x[f"{side}_lengths"] if options.loss_type in ("simpo", "orpo") else ratio)
        )
    found = stats.as_dict()
    assert found == pytest.approx({
        "chosen_rewards": rewards[0].mean().item(), "rejected_rewards": rewards[1].mean().item(),
        "margins": (rewards[0] - rewards[1]).mean().item(), "accuracy": (rewards[0] > rewards[1]).sum().item() / 6,
        "logps_chosen": x["chosen_logps"].mean().item(), "logps_rejected": x["rejected_logps"].mean().item(),
        "pairs": 6,
    })  # fmt: skip
    assert stats.accuracy.item() == found["accuracy"] and stats.margins.dim() == 0
    parts = [dpo_loss(**{k: v[at] for k, v in x.items()}, options=options)[1] for at in (slice(0, 2), slice(2, 6))]
    assert (parts[0] + parts[1]).as_dict() == pytest.approx(found, rel=1e-14)
    with pytest.raises(AttributeError, match="no view 'rewards'; it has chosen_rewards"):
        _ = stats.rewards


@pytest.mark.parametrize("as_tensor", [False, True])
@each_type
def test_parts_of_a_step_add_up(options, as_tensor):
    """TRL#2615: with the step's denominators the parts are its loss and gradients, the NLL over tokens included."""
    if options.loss_type in OVER_THE_BATCH:
        return
    x = _inputs(options)
    loss, _ = dpo_loss(**x, options=options)
    whole = (6, int(x["chosen_lengths"].sum()))
    whole = torch.tensor(whole) if as_tensor else whole
    cut = ({k: v[at] for k, v in x.items()} for at in (slice(0, 1), slice(1, 4), slice(4, 6)))
    parts = sum(dpo_loss(**part, options=options, denominators=whole)[0] for part in cut)
    torch.testing.assert_close(parts, loss, rtol=1e-14, atol=0)
    for a, b in zip(torch.autograd.grad(parts, _learned(x)), torch.autograd.grad(loss, _learned(x))):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_a_tie_is_not_a_win():
    x = torch.full((2,), -4.0)
    _, stats = dpo_loss(x, x, x, x)
    assert stats.accuracy == stats.margins == 0


def test_shorthand_equals_options():
    x = _inputs(DPOOptions())
    loss, _ = dpo_loss(**x, beta=0.3, loss_type="robust", label_smoothing=0.2)
    assert torch.equal(loss, dpo_loss(**x, options=DPOOptions(0.3, "robust", 0.2))[0])


@pytest.mark.parametrize("kind", TYPES)
def test_types_say_what_they_need(kind):
    free = kind in REFERENCE_FREE
    options = DPOOptions(loss_type=kind, label_smoothing=SMOOTHING.get(kind, 0.0))
    x = _inputs(options)
    for name in INPUTS[2:4]:
        wrong = {**x, name: torch.zeros(6)} if free else {k: v for k, v in x.items() if k != name}
        words = f"{name}: expected {'None' if free else 'a tensor'} with loss_type='{kind}'"
        with pytest.raises(ValueError, match=words):
            dpo_loss(**wrong, options=options)
    bare = {k: v for k, v in x.items() if "lengths" not in k}
    if kind in AVERAGED:
        with pytest.raises(ValueError, match=f"chosen_lengths: expected token counts .* loss_type='{kind}'"):
            dpo_loss(**bare, options=options)
    else:
        assert dpo_loss(**bare, options=options)[0].isfinite()
    with pytest.raises(ValueError, match="rejected_lengths: expected token counts"):
        dpo_loss(**bare, chosen_lengths=x["chosen_lengths"], options=options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "dpo"}, "loss_type: expected one of sigmoid, .* got 'dpo'"),
        ({"beta": 0.0}, "beta: expected a number above 0"),
        ({"sft_coef": -0.1}, "sft_coef: expected a number >= 0"),
        ({"beta": math.nan}, "beta: expected a finite"),
        ({"discopop_tau": 0}, "discopop_tau: expected a number above 0"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\]"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing: .* \[0, 0.5\) with loss_type='robust'"),
        ({"loss_type": "exo_pair"}, r"label_smoothing: .* \(0, 1\) with loss_type='exo_pair', got 0"),
        ({"loss_type": "exo_pair", "label_smoothing": 1}, r"label_smoothing: .* \(0, 1\) with loss_type='exo_pair'"),
        *(
            (
                {"loss_type": kind, "label_smoothing": 0.1},
                f"label_smoothing: expected a number 0 with loss_type='{kind}'",
            )
            for kind in TYPES
            if kind not in SMOOTHED
        ),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        DPOOptions(**options)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"beta": 0.2, "options": DPOOptions()}, ValueError, "beta: expected its default .* got 0.2; set options.beta"),
        ({"loss_type": "ipo", "options": DPOOptions()}, ValueError, "loss_type: expected its default .* got 'ipo'"),
        ({"label_smoothing": 0.1, "options": DPOOptions()}, ValueError, "label_smoothing: expected its default"),
        ({"chosen_logps": torch.zeros(2, 3)}, ValueError, r"chosen_logps: expected \(B,\), got \(2, 3\); see sequence"),
        ({"chosen_logps": torch.zeros(2).long()}, TypeError, "chosen_logps: expected float32"),
        ({"rejected_logps": None}, TypeError, "rejected_logps: expected a tensor, got NoneType"),
        ({"rejected_logps": torch.zeros(3)}, ValueError, r"rejected_logps: expected the shape \(2,\) of chosen_logps"),
        ({"ref_chosen_logps": torch.zeros(2, 1)}, ValueError, r"ref_chosen_logps: expected the shape \(2,\)"),
        ({"ref_rejected_logps": torch.zeros(2, device="meta")}, ValueError, "ref_rejected_logps: expected device cpu"),
        ({"denominators": (2,)}, ValueError, r"denominators: expected pairs and chosen tokens, got \(2,\)"),
        ({"denominators": (2, 0)}, ValueError, "denominators: expected a number above 0, got 0"),
        ({"denominators": torch.ones(())}, ValueError, r"denominators: expected the shape \(2,\) of pairs and chosen"),
        ({"denominators": (2, 9), "loss_type": "aot"}, ValueError, "denominators: expected None with loss_type='aot'"),
        ({"chosen_lengths": [3, 4]}, TypeError, "chosen_lengths: expected a tensor, got list"),
        ({"chosen_lengths": torch.ones(3)}, ValueError, r"chosen_lengths: expected the shape \(2,\) of chosen_logps"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        dpo_loss(**{name: torch.zeros(2) for name in INPUTS[:4]} | change)
