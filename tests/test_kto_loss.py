"""kto_loss and KTOStats: the battery, then the closed form in probabilities, parts of a step and refusals."""

import math

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import kto_loss, testing
from rlhf_kernels.ops.kto_loss import TYPES


@battery("kto_loss")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def _inputs(kind="kto", count=7):
    x = {name: -6 - 6 * torch.rand(count, dtype=torch.float64) for name in ("logps", "ref_logps")}
    x["logps"].requires_grad_()
    x["labels"] = torch.arange(count) % 3 > 0
    return x | ({"kl": torch.tensor(0.5, dtype=torch.float64)} if kind == "kto" else {})


OPTIONS = {"beta": 0.25, "desirable_weight": 1.5, "undesirable_weight": 0.5}


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("kind", TYPES)
def test_closed_form(kind):
    """Equation 7 of arXiv 2402.01306 (and of 2408.06266, unpaired), a sequence at a time, and its derivative."""
    x = _inputs(kind)
    loss, _ = kto_loss(**x, **OPTIONS, loss_type=kind)
    values, slopes = [], []
    for logp, ref, good in zip(x["logps"].tolist(), x["ref_logps"].tolist(), x["labels"].tolist()):
        gain = logp - ref - (0.5 if kind == "kto" else 0.0)
        weight = 1.5 if good else 0.5
        p = _sigmoid(0.25 * gain if good else -0.25 * gain)
        values.append(weight * (1 - p))
        slopes.append((-1 if good else 1) * weight * 0.25 * p * (1 - p) / 7)
    assert loss.item() == pytest.approx(sum(values) / 7, rel=1e-14)
    (grad,) = torch.autograd.grad(loss, x["logps"], retain_graph=True)
    assert grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda logps: kto_loss(**x | {"logps": logps}, **OPTIONS, loss_type=kind)[0], x["logps"]
    )


def test_kl_below_zero_counts_as_zero_and_has_no_gradient():
    x = _inputs()
    zero, below = (kto_loss(**x | {"kl": kl})[0] for kl in (0.0, -3.0))
    assert zero == below
    kl = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss, _ = kto_loss(**x | {"kl": kl})
    assert torch.autograd.grad(loss, kl, allow_unused=True) == (None,)
    assert loss == kto_loss(**x)[0] != zero


@pytest.mark.parametrize("denominator", [7, torch.tensor(7)])
@pytest.mark.parametrize("kind", TYPES)
def test_parts_of_a_step_add_up(kind, denominator):
    x = _inputs(kind)
    loss, stats = kto_loss(**x, **OPTIONS, loss_type=kind)
    cut = ({k: v if k == "kl" else v[at] for k, v in x.items()} for at in (slice(0, 1), slice(1, 3), slice(3, 7)))
    parts, found = zip(*(kto_loss(**p, **OPTIONS, loss_type=kind, denominator=denominator) for p in cut))
    torch.testing.assert_close(sum(parts), loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(y, x["logps"])[0] for y in (sum(parts), loss)))
    assert (found[0] + found[1] + found[2]).as_dict() == pytest.approx(stats.as_dict(), rel=1e-14)


def test_statistics():
    x = _inputs()
    found = kto_loss(**x, beta=0.25)[1]
    rewards, good = 0.25 * (x["logps"] - x["ref_logps"]).detach(), x["labels"]
    assert found.as_dict() == pytest.approx({
        "chosen_rewards": rewards[good].mean().item(), "rejected_rewards": rewards[~good].mean().item(),
        "logps_chosen": x["logps"][good].mean().item(), "logps_rejected": x["logps"][~good].mean().item(),
        "chosen": 4, "rejected": 3,
    })  # fmt: skip
    assert found.chosen.item() == 4 and not found.sums.requires_grad
    with pytest.raises(AttributeError, match="no view 'margins'; it has chosen_rewards"):
        _ = found.margins


@pytest.mark.parametrize("good", [True, False])
def test_sequences_of_one_kind(good):
    """TRL#5662: no mean of nothing. What has no sequences has the mean 0."""
    x = _inputs() | {"labels": torch.full((7,), good)}
    loss, stats = kto_loss(**x)
    (grad,) = torch.autograd.grad(loss, x["logps"])
    assert loss.isfinite() and grad.isfinite().all() and (grad < 0).all() == good
    assert stats.as_dict()["logps_rejected" if good else "logps_chosen"] == 0


def test_extremes():
    """Log-ratios of ten thousand either side: 0 and 1, no NaN."""
    logps = torch.tensor([0.0, -1e4, 0.0, -1e4], requires_grad=True)
    ref, labels = torch.tensor([-1e4, 0.0, -1e4, 0.0]), torch.tensor([True, True, False, False])
    loss, _ = kto_loss(logps, ref, labels, 0.0)
    assert loss.item() == 0.5 and not torch.autograd.grad(loss, logps)[0].any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loss_type": "dpo"}, ValueError, "loss_type: expected one of kto, apo_zero_unpaired, got 'dpo'"),
        ({"beta": 0.0}, ValueError, "beta: expected a number above 0"),
        ({"desirable_weight": -1.0}, ValueError, "desirable_weight: expected a number >= 0"),
        ({"undesirable_weight": math.nan}, ValueError, "undesirable_weight: expected a finite"),
        ({"denominator": 0}, ValueError, "denominator: expected a number above 0"),
        (
            {"denominator": torch.ones(1)},
            ValueError,
            r"denominator: expected a number or a 0-dim tensor, got shape \(1,\)",
        ),
        ({"kl": None}, ValueError, "kl: expected the mean log-ratio of mismatched sequences with loss_type='kto'"),
        ({"loss_type": "apo_zero_unpaired"}, ValueError, "kl: expected None with loss_type='apo_zero_unpaired'"),
        ({"kl": torch.zeros(2)}, ValueError, r"kl: expected a number or a 0-dim tensor, got shape \(2,\)"),
        ({"kl": math.inf}, ValueError, "kl: expected a finite"),
        ({"logps": torch.zeros(2, 1)}, ValueError, r"logps: expected \(B,\), got \(2, 1\); see sequence"),
        ({"logps": torch.zeros(2).long()}, TypeError, "logps: expected float32"),
        ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps: expected the shape \(2,\) of logps"),
        ({"ref_logps": None}, TypeError, "ref_logps: expected a tensor"),
        ({"labels": torch.ones(2)}, TypeError, "labels: expected bool, True on desirable .* got torch.float32"),
        ({"labels": torch.ones(3).bool()}, ValueError, r"labels: expected the shape \(2,\) of logps"),
    ],
)
def test_bad_input(change, error, words):
    good = {"logps": torch.zeros(2), "ref_logps": torch.zeros(2), "labels": torch.ones(2).bool(), "kl": 0.0}
    with pytest.raises(error, match=words):
        kto_loss(**good | change)
