"""linear_ppo_loss: the battery, then what is particular to it."""

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import PPOLossOptions, _head, linear_ppo_loss, linear_token_logprobs, ppo_loss, testing
from rlhf_kernels.ops.ppo_loss import REDUCTIONS


@battery("linear_ppo_loss")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def _inputs(shape=(3, 7), h=16, v=37, dtype=torch.float64):
    hidden, weight = torch.randn(*shape, h, dtype=dtype), torch.randn(v, h, dtype=dtype) / 4
    ids = torch.randint(0, v, shape)
    old = linear_token_logprobs(hidden, weight, ids) + 0.3 * torch.randn(shape)
    return {
        "hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "token_ids": ids,
        "old_logprobs": old, "advantages": torch.randn(shape), "mask": torch.rand(shape) < 0.7,
    }  # fmt: skip


OPTIONS = PPOLossOptions(entropy_coef=0.02, dual_clip=1.5)


def _unfused(hidden, weight, token_ids, old_logprobs, advantages, mask=None, options=OPTIONS, **more):
    logprobs, entropy = linear_token_logprobs(hidden, weight, token_ids, return_entropy=True)
    return ppo_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, options=options, **more)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_equals_ppo_loss_on_log_probs(reduction, chunk):
    """Loss and statistics are those of ppo_loss to the last bit, gradients to rounding, whatever the chunks cut."""
    x, options = _inputs(), PPOLossOptions(entropy_coef=0.02, reduction=reduction)
    loss, stats, _ = linear_ppo_loss(**x, options=options, chunk_size=chunk)
    expected, expected_stats = _unfused(**x, options=options)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(stats.sums, expected_stats.sums, rtol=1e-13, atol=1e-13)
    learned = [x["hidden"], x["weight"]]
    for a, b in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean_token_mean"])
def test_micro_batches_sum_to_one_batch(reduction):
    """trl#3021, #5890: the normaliser of a whole step, passed as denominator, makes accumulation exact."""
    x, options = _inputs((4, 7)), PPOLossOptions(entropy_coef=0.02, reduction=reduction)
    full = int(x["mask"].sum()) if reduction == "token_mean" else int(x["mask"].any(1).sum())
    whole = torch.autograd.grad(linear_ppo_loss(**x, options=options)[0], x["weight"])[0]
    parts = 0
    for rows in (slice(0, 1), slice(1, 4)):
        part = {k: v if k == "weight" else v[rows] for k, v in x.items()}
        loss, _, _ = linear_ppo_loss(**part, options=options, denominator=full)
        parts = parts + torch.autograd.grad(loss, x["weight"])[0]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)


def test_products_are_three(monkeypatch):
    """One forward, two gradients; one under no_grad."""
    monkeypatch.setattr(_head, "ONEDNN", False)
    x, calls, accumulate = _inputs(), [], _head.accumulate
    monkeypatch.setattr(_head, "accumulate", lambda *a, **k: (calls.append(1), accumulate(*a, **k)))
    loss, _, _ = linear_ppo_loss(**x)
    assert len(calls) == 3
    loss.backward()
    assert len(calls) == 3
    with torch.no_grad():
        linear_ppo_loss(**x)
    assert len(calls) == 4


@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
def test_upstream_gradient(factor):
    """Liger#272: a gradient formed in the forward must still meet the upstream one, and a second backward too."""
    x = _inputs()
    loss, _, _ = linear_ppo_loss(**x)
    learned = [x["hidden"], x["weight"]]
    one = torch.autograd.grad(loss, learned, retain_graph=True)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(factor * loss, learned, retain_graph=True), one):
            torch.testing.assert_close(a, factor * b)


def test_first_update_has_ratio_one():
    """Scoring under no_grad and training give the same bits."""
    x = _inputs(shape=(40, 9), h=64, v=5003, dtype=torch.float32)
    with torch.no_grad():
        x["old_logprobs"] = linear_token_logprobs(x["hidden"], x["weight"], x["token_ids"])
    _, stats, logprobs = linear_ppo_loss(**x)
    assert torch.equal(logprobs[x["mask"]], x["old_logprobs"][x["mask"]])
    assert stats.as_dict()["ratio_mean"] == stats.as_dict()["ratio_max"] == 1.0


def test_nan_under_the_mask_and_in_sight():
    """OpenRLHF#1240: NaN in a masked token changes nothing; in a counted one it shows in loss and gradient."""
    x = _inputs()
    clean = linear_ppo_loss(**x)[0]
    hidden = x["hidden"].detach().clone()
    hidden[~x["mask"]] = float("nan")
    old = x["old_logprobs"].masked_fill(~x["mask"], float("nan"))
    torch.testing.assert_close(linear_ppo_loss(**{**x, "hidden": hidden, "old_logprobs": old})[0], clean)
    hidden[x["mask"]] = float("nan")
    loss, _, _ = linear_ppo_loss(**{**x, "hidden": hidden})
    assert loss.isnan() and torch.autograd.grad(loss, x["weight"])[0].isnan().any()


def test_ids_under_the_mask_may_be_anything():
    x = _inputs()
    ids = x["token_ids"].masked_fill(~x["mask"], -100)
    assert torch.equal(linear_ppo_loss(**{**x, "token_ids": ids})[0], linear_ppo_loss(**x)[0])
    ids[x["mask"]] = 37
    with pytest.raises(ValueError, match=r"token_ids: expected ids in \[0, 37\), got 37 at position"):
        linear_ppo_loss(**{**x, "token_ids": ids})


@pytest.mark.parametrize("upstream", [1.0, 2.0**16])
def test_gradients_of_16_bits_are_rounded_after_the_upstream_gradient(upstream):
    """Loss scaling exists so that small gradients survive float16: rounded before it, 40 % of these were 0."""
    n, vocab = 512, 300
    x = {"hidden": torch.randn(1, n, 32).half(), "weight": (torch.randn(vocab, 32) / 32**0.5).half()}
    x |= {"token_ids": torch.randint(vocab, (1, n)), "advantages": torch.randn(1, n) * 1e-3}
    x["old_logprobs"] = torch.full((1, n), -5.7)

    def gradients(**x):
        leaves = [x[name].requires_grad_() for name in ("hidden", "weight")]
        return torch.autograd.grad(linear_ppo_loss(**x)[0], leaves, torch.tensor(upstream, dtype=x["advantages"].dtype))

    exact = gradients(**{k: v.double() if v.is_floating_point() else v for k, v in x.items()})
    for ours, true in zip(gradients(**x), exact):
        assert ours.dtype == torch.float16
        torch.testing.assert_close(ours.double(), true.half().double(), rtol=2e-3, atol=1.2e-7)


def test_training_lowers_the_loss():
    """Twenty steps of plain gradient descent on the head move the loss by what a first-order step must."""
    x = {k: v.detach() for k, v in _inputs().items()}
    weight, losses = x.pop("weight").requires_grad_(), []
    for _ in range(20):
        loss, _, _ = linear_ppo_loss(weight=weight, **x)
        losses.append(loss.item())
        (grad,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.05 * grad).detach().requires_grad_()
    assert losses[-1] < losses[0] - 0.5 * 20 * 0.05 * 0.5 * grad.square().sum().item()


def test_bad_input():
    x = _inputs()
    bad = [
        ({"advantages": None}, TypeError, "advantages: expected a tensor, got NoneType"),
        ({"advantages": x["advantages"][:2]}, ValueError, r"advantages: expected the shape \(3, 7\) of token_ids"),
        ({"mask": x["mask"].int()}, TypeError, "mask: expected bool"),
        ({"options": PPOLossOptions(kl_coef=0.1)}, ValueError, "ref_logprobs: expected a tensor because kl_coef"),
        ({"denominator": 0.0}, ValueError, "denominator: expected a number above 0"),
        ({"denominator": x["advantages"]}, ValueError, "denominator: expected a number or a 0-dim tensor"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"token_ids: expected packed \(N,\) because cu_seqlens"),
        ({"weight": x["weight"][:, :3]}, ValueError, r"hidden: expected \(\.\.\., 3\)"),
    ]
    for change, error, message in bad:
        with pytest.raises(error, match=message):
            linear_ppo_loss(**{**x, **change})
    flat = {k: v if k == "weight" else v.flatten(0, 1) for k, v in x.items()}
    with pytest.raises(ValueError, match="cu_seqlens: expected bounds that rise from 0 to 21"):
        linear_ppo_loss(**flat, cu_seqlens=torch.tensor([0, 5, 20], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="linear_ppo_loss is differentiable once"):
        torch.autograd.grad(linear_ppo_loss(**x)[0], x["hidden"], create_graph=True)
