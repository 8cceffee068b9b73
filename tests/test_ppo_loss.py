"""ppo_loss and PPOStats: the battery, then golden values and the normaliser bugs of its peers."""

import math

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import PPOLossOptions, ppo_loss, testing

BACKENDS = testing.available_backends("ppo_loss")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rlhf_kernels.backend(request.param):
        yield request.param


@battery("ppo_loss")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def _one(log_ratio, advantage, **options):
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    loss, stats = ppo_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), options=PPOLossOptions(**options))
    loss.backward()
    return loss.item(), logprobs.grad.item(), stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_four_quadrants(backend, ratio, advantage, loss, gradient):
    """The clip holds only where it lowers the objective."""
    mine, slope, stats = _one(math.log(ratio), advantage)
    assert (mine, slope) == (pytest.approx(loss, rel=1e-6), pytest.approx(gradient, rel=1e-6))
    assert stats.clip_fraction.item() == (gradient == 0.0)


def test_dual_clip_bounds_the_loss_of_bad_actions(backend):
    mine, slope, stats = _one(math.log(10.0), -2.0, dual_clip=3.0)
    assert (mine, slope, stats.dual_clip_fraction.item()) == (pytest.approx(6.0), 0.0, 1.0)


def test_asymmetric_clip(backend):
    """DAPO's clip-higher: 1.25 is inside [0.8, 1.28]."""
    assert _one(math.log(1.25), 1.0, clip_high=0.28)[1] == pytest.approx(-1.25, rel=1e-6)


def _inputs(n=7, t=5):
    return torch.randn(n, t) * 0.1, torch.randn(n, t) * 0.1, torch.randn(n, t)


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"])
def test_accumulation_equals_one_big_batch(backend, reduction):
    """TRL#3021, #5890: a micro-batch divides by the whole step's count, not by its own."""
    logprobs, old, advantages = _inputs()
    mask = torch.rand(7, 5) < 0.6
    options = PPOLossOptions(reduction=reduction)
    whole = logprobs.clone().requires_grad_()
    loss, stats = ppo_loss(whole, old, advantages, mask, options=options)
    loss.backward()
    count = mask.sum() if reduction == "token_mean" else mask.any(-1).sum()
    parts, total, merged = logprobs.clone().requires_grad_(), 0.0, None
    for rows in (slice(0, 2), slice(2, 3), slice(3, 7)):
        part, part_stats = ppo_loss(
            parts[rows], old[rows], advantages[rows], mask[rows], options=options, denominator=count
        )
        part.backward()
        total += part.item()
        merged = part_stats if merged is None else merged + part_stats
    assert total == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-8)
    for name, value in stats.as_dict().items():
        assert merged.as_dict()[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_upstream_gradient_scales(backend):
    """quack and Liger form gradients in the forward; another upstream than 1 must be honoured."""
    logprobs, old, advantages = _inputs()
    grads = []
    for scale in (1.0, 0.25):
        leaf = logprobs.clone().requires_grad_()
        (ppo_loss(leaf, old, advantages)[0] * scale).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0] * 0.25, grads[1])


def test_loss_without_grad_is_the_loss(backend):
    """Liger#507: the loss came back as 0 when nothing required a gradient."""
    logprobs, old, advantages = _inputs()
    with torch.no_grad():
        plain, _ = ppo_loss(logprobs, old, advantages)
    learned, _ = ppo_loss(logprobs.requires_grad_(), old, advantages)
    assert plain.item() == learned.item() != 0


def test_all_masked(backend):
    """OpenRLHF and Liger divide 0 by 0 there."""
    logprobs, old, _ = _inputs()
    leaf = logprobs.requires_grad_()
    nan = torch.full_like(old, float("nan"))
    loss, stats = ppo_loss(leaf, nan, nan, torch.zeros(7, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not leaf.grad.any()
    assert all(value == 0 for value in stats.as_dict().values())


def test_a_term_without_weight_cannot_poison(backend):
    """prime-rl#2085: k3 is inf for a token that the reference finds impossible; a statistic must not reach the loss."""
    logprobs, old, advantages = _inputs()
    ref, entropy = old.clone(), torch.ones(7, 5)
    ref[0, 0], entropy[1, 1] = 200.0, float("nan")
    options = PPOLossOptions(value_coef=0.0)
    leaf, values = logprobs.clone().requires_grad_(), torch.zeros(7, 5, requires_grad=True)
    terms = {"values": values, "old_values": old, "returns": torch.full((7, 5), float("inf"))}
    loss, stats = ppo_loss(leaf, old, advantages, ref_logprobs=ref, entropy=entropy, options=options, **terms)
    loss.backward()
    plain = logprobs.clone().requires_grad_()
    expected, _ = ppo_loss(plain, old, advantages)
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(leaf.grad, plain.grad) and not values.grad.any()
    assert stats.kl == math.inf and stats.entropy.isnan()


def test_nan_in_a_counted_token_shows(backend):
    """A clip or a minimum must not swallow it."""
    for name in (
        "logprobs",
        "old_logprobs",
        "advantages",
        "values",
        "old_values",
        "returns",
        "entropy",
        "ref_logprobs",
    ):
        tensors = {n: torch.randn(3, 5) * 0.1 for n in ("logprobs", "old_logprobs", "advantages", "values")}
        tensors |= {n: torch.randn(3, 5) * 0.1 for n in ("old_values", "returns", "entropy", "ref_logprobs")}
        tensors[name][1, 2] = float("nan")
        options = PPOLossOptions(kl_coef=0.1, entropy_coef=0.1, log_ratio_clamp=5.0, kl_clamp=5.0, dual_clip=3.0)
        assert ppo_loss(**tensors, options=options)[0].isnan(), name
    inputs = _inputs()
    assert ppo_loss(*inputs, denominator=torch.tensor(float("nan")))[0].isnan()


def test_first_step_statistics(backend):
    """Before the first update the ratio is exactly 1 and every divergence exactly 0."""
    logprobs, _, advantages = _inputs()
    stats = ppo_loss(logprobs, logprobs.clone(), advantages)[1].as_dict()
    assert stats["ratio_mean"] == stats["ratio_max"] == 1
    assert stats["approx_kl"] == stats["approx_kl_k3"] == stats["clip_fraction"] == 0


def test_stats_has_no_unknown_view():
    stats = ppo_loss(*_inputs())[1]
    with pytest.raises(AttributeError, match="no view 'clipfrac'; it has policy_loss"):
        _ = stats.clipfrac


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"old_logprobs": torch.zeros(2, 2)}, r"old_logprobs: expected the shape \(2, 3\)"),
        ({"values": torch.zeros(2, 3)}, "returns: expected a tensor because values is given"),
        ({"values": torch.zeros(2, 3), "returns": torch.zeros(2, 3)}, r"old_values: .*value_clip=None"),
        ({"options": PPOLossOptions(kl_coef=0.1)}, "ref_logprobs: expected a tensor because kl_coef is 0.1"),
        ({"options": PPOLossOptions(entropy_coef=0.1)}, "entropy: expected a tensor because entropy_coef is 0.1"),
        ({"denominator": torch.ones(2)}, "denominator: expected a number or a 0-dim tensor"),
        ({"denominator": 0}, "denominator: expected a number above 0"),
        (
            {"denominator": 3, "options": PPOLossOptions(reduction="sum")},
            "denominator: expected None with reduction='sum'",
        ),
    ],
)
def test_bad_input(change, words):
    arguments = {name: torch.zeros(2, 3) for name in ("logprobs", "old_logprobs", "advantages")}
    with pytest.raises(ValueError, match=words):
        ppo_loss(**{**arguments, **change})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "mean"}, "reduction: expected one of token_mean, .* got 'mean'"),
        ({"dual_clip": 0.5}, "dual_clip: expected a number above 1"),
        ({"clip_low": 1.5}, r"clip_low: expected a number in \[0, 1\]"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of"),
        ({"value_clip": -0.2}, "value_clip: expected a number above 0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        PPOLossOptions(**options)
