"""verl's and OpenRLHF's meanings on our ops, against loops and closed forms. Beside the libraries themselves:
tests/test_peers.py, cases compat-...; TRL's: tests/test_compat_trl.py."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rlhf_kernels.compat import openrlhf, verl

MASK = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 0, 0, 0, 0], [0] * 8])
NAN = float("nan")


def values(seed):
    torch.manual_seed(seed)
    return torch.randn(3, 8, dtype=torch.float64)


def under_nan(x):
    return torch.where(MASK.bool(), x, NAN)


def gae_by_hand(rewards, values, mask, gamma, lam, gap):
    """Advantages of each row's counted tokens, by the words of each library."""
    out = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        counted = [t for t in range(rewards.shape[1]) if mask[b, t]]
        steps = counted if gap == "skip" else list(range(counted[-1] + 1)) if counted else []
        running, following = 0.0, 0.0
        for t in reversed(steps):
            reward, value = (rewards[b, t], values[b, t]) if mask[b, t] else (0.0, 0.0)
            running = reward + gamma * following - value + gamma * lam * running
            following = value
            out[b, t] = running if mask[b, t] else 0.0
    return out


def test_gap_is_no_step_in_verl_and_a_step_of_zeros_in_openrlhf():
    rewards, critic = values(0), values(1)
    skipped = gae_by_hand(rewards, critic, MASK, 0.9, 0.8, "skip")
    zeros = gae_by_hand(rewards, critic, MASK, 0.9, 0.8, "zero")
    assert (skipped - zeros).abs().max() > 0.05
    whitened, returns = verl.compute_gae_advantage_return(under_nan(rewards), under_nan(critic), MASK, 0.9, 0.8)
    torch.testing.assert_close(returns, torch.where(MASK.bool(), skipped + critic, 0.0))
    counted = skipped[MASK.bool()]
    expected = (counted - counted.mean()) * torch.rsqrt(counted.var() + 1e-8)
    torch.testing.assert_close(whitened[MASK.bool()], expected)
    assert (whitened[MASK == 0] == 0).all()
    advantages, returns = openrlhf.get_advantages_and_returns(
        None, under_nan(critic), under_nan(rewards), MASK, 0.9, 0.8
    )
    torch.testing.assert_close(advantages, zeros)
    torch.testing.assert_close(returns, torch.where(MASK.bool(), zeros + critic, 0.0))


AGGREGATES = {
    "token-mean": lambda x, m: (x * m).sum() / m.sum(),
    "token-sum": lambda x, m: (x * m).sum(),
    "seq-mean-token-sum": lambda x, m: (x * m).sum(-1)[:2].mean(),
    "seq-mean-token-sum-norm": lambda x, m: (x * m).sum(-1)[:2].mean() / 8,
    "seq-mean-token-mean": lambda x, m: ((x * m).sum(-1)[:2] / m.sum(-1)[:2]).mean(),
}


@pytest.mark.parametrize("mode", AGGREGATES)
def test_agg_loss(mode):
    losses = values(2).requires_grad_()
    found = verl.agg_loss(under_nan(losses), MASK, mode)
    torch.testing.assert_close(found, AGGREGATES[mode](losses, MASK))
    gradient = torch.autograd.grad(found, losses)[0]
    assert (gradient[MASK == 0] == 0).all() and (gradient[MASK == 1] != 0).all()


def test_agg_loss_of_a_part_of_a_step():
    """Parts with the totals of the step, each of one of two ranks, add up to twice the step's: DDP takes the mean."""
    losses, mask = values(2), MASK.clone()
    mask[2, 3] = 1
    whole = verl.agg_loss(losses, mask, "seq-mean-token-mean")
    parts = sum(
        verl.agg_loss(losses[i : i + 1], mask[i : i + 1], "seq-mean-token-mean", dp_size=2, global_batch_size=3)
        for i in range(3)
    )
    torch.testing.assert_close(parts, 2 * whole)


def test_agg_loss_says_what_is_missing():
    with pytest.raises(ValueError, match="batch_num_tokens is required when dp_size > 1"):
        verl.agg_loss(values(2), MASK, "token-mean", dp_size=2)
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
        verl.agg_loss(values(2), MASK, "mean")


def test_bfloat16_losses_are_added_in_float32():
    losses = torch.full((1, 4097), 1.0, dtype=torch.bfloat16)
    assert verl.agg_loss(losses, torch.ones(1, 4097), "token-sum").item() == 4097


class Config(SimpleNamespace):
    def get(self, name, default):
        return getattr(self, name, default)


def test_policy_loss_of_single_tokens():
    """Unclipped, clipped above, dual-clipped at verl's 3 and at our own bound."""
    ratio = torch.tensor([[1.1, 2.0, 9.0, 0.5]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 2.0, -1.0, 1.0]], dtype=torch.float64)
    old, mask = torch.zeros_like(ratio), torch.tensor([[1, 1, 1, 0]])
    config = Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.3, global_batch_info={})
    loss, metrics = verl.compute_policy_loss_vanilla(old, ratio.log(), advantages, mask, config=config)
    assert loss.item() == pytest.approx((-1.1 - 2 * 1.3 + 3.0) / 3)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(1 / 3)
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(1 / 3)
    assert metrics["actor/ppo_kl"] == pytest.approx(-sum(map(math.log, (1.1, 2.0, 9.0))) / 3)
    config.clip_ratio_c = 5.0
    loss, _ = verl.compute_policy_loss_vanilla(old, ratio.log(), advantages, mask, config=config)
    assert loss.item() == pytest.approx((-1.1 - 2 * 1.3 + 5.0) / 3)
    found = openrlhf.PolicyLoss(0.2, 0.3)(ratio.log(), old, advantages, mask)
    assert found[0].item() == pytest.approx((-1.1 - 2 * 1.3 + 9.0) / 3), "no dual clip unless asked for"
    assert found[3] is None and found[4] is None


def test_masks_may_hide_nan():
    new, old, advantages = (under_nan(values(i)) for i in (3, 4, 5))
    new = new.requires_grad_()
    config = Config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, global_batch_info={})
    loss, metrics = verl.compute_policy_loss_vanilla(old, new, advantages, MASK, "seq-mean-token-mean", config)
    gradient = torch.autograd.grad(loss, new)[0]
    assert gradient.isfinite().all() and all(math.isfinite(x) for x in metrics.values())
    loss = verl.compute_value_loss(new, old, advantages, MASK, 0.2, "seq-mean-token-sum")[0]
    assert torch.autograd.grad(loss, new)[0].isfinite().all()
    for kind in ("ppo", "gspo"):
        loss = openrlhf.PolicyLoss(policy_loss_type=kind)(new, old, advantages, MASK)[0]
        assert loss.isfinite() and torch.autograd.grad(loss, new)[0].isfinite().all()


def test_a_token_that_both_find_impossible_is_filtered():
    """Trainer and sampler give -inf, their ratio is NaN: OpenRLHF's mask drops the token."""
    old = torch.tensor([[-1.0, -math.inf]])
    loss = openrlhf.PolicyLoss(is_correction_level="token", is_correction_mode="mask")
    new = torch.tensor([[-1.1, -2.0]], requires_grad=True)
    found = loss(
        new, torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[-1.0, math.nan]])
    )
    assert found[0].item() == pytest.approx(-math.exp(-0.1) / 2) and found[4].item() == 0.5
    weights, share = loss._correction(old, old, torch.ones(1, 2, dtype=torch.bool))
    assert weights.tolist() == [[1.0, 0.0]] and share.item() == 0.5


def test_kl_is_clamped_by_value_in_openrlhf_and_k3_alone_in_verl():
    far, zero = torch.tensor([25.0, -25.0]), torch.zeros(2)
    assert openrlhf.compute_approx_kl(far, zero).tolist() == [10.0, -10.0]
    assert openrlhf.compute_approx_kl(far, zero, kl_estimator="k3").tolist() == [10.0, 10.0]
    assert verl.kl_penalty(far, zero, "k1").tolist() == [25.0, -25.0]
    assert verl.kl_penalty(far, zero, "low_var_kl").tolist() == [10.0, 10.0]
    with pytest.raises(NotImplementedError, match="got full"):
        verl.kl_penalty(far, zero, "full")
    with pytest.raises(ValueError, match="Unknown kl_estimator: k4"):
        openrlhf.compute_approx_kl(far, zero, kl_estimator="k4")


def test_logits_are_left_alone():
    """verl's backward and OpenRLHF's temperature write into them."""
    logits = torch.randn(2, 3, 11)
    kept, leaf = logits.clone(), logits.requires_grad_()
    ids = torch.randint(11, (2, 3))
    verl.logprobs_from_logits(leaf, ids, inplace_backward=True).sum().backward()
    openrlhf.log_probs_from_logits(leaf.detach(), ids, 0.5)
    assert torch.equal(leaf.detach(), kept)


@pytest.mark.parametrize(("reduction", "reduce"), [("none", lambda x: x), ("sum", torch.sum), ("mean", torch.mean)])
def test_linear_cross_entropy(reduction, reduce):
    hidden, weight = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    labels = torch.randint(9, (2, 3))
    logp = (hidden @ weight.T / 0.7).log_softmax(-1)
    logprobs, entropy = verl.linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
    torch.testing.assert_close(logprobs, reduce(logp.gather(-1, labels[..., None]).flatten()))
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1).flatten())
    with pytest.raises(ValueError, match="Invalid reduction: max"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "max")


def test_head_split_over_ranks_goes_to_verls_kernel(monkeypatch):
    """Which needs GPUs: what is asked of it is seen here."""
    name, seen = "verl.utils.kernel.linear_cross_entropy", []
    kernel = SimpleNamespace(apply=lambda *arguments: seen.extend(arguments) or ("logprobs", "entropy"))
    for parent in ("verl", "verl.utils", "verl.utils.kernel"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(LinearCrossEntropy=kernel))
    monkeypatch.setattr(torch.distributed, "get_world_size", {"alone": 1, "pair": 2}.get)
    hidden, weight, labels = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 8, 2])
    assert verl.linear_cross_entropy(hidden, weight, labels, 0.7, "none", "pair") == ("logprobs", "entropy")
    assert seen == [hidden, weight, labels, 0.7, "none", "pair"]
    assert verl.linear_cross_entropy(hidden, weight, labels, 0.7, "none", "alone")[0].shape == (3,)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend: cute"):
        verl.FusedLinearForPPO(impl_backend="cute")


def test_labels_of_another_shape():
    """Both libraries flatten what they give to flash-attention."""
    logits, ids = torch.randn(6, 11), torch.randint(11, (1, 6))
    for found in (verl.logprobs_from_logits(logits, ids), openrlhf.log_probs_from_logits(logits, ids)):
        torch.testing.assert_close(found, logits.log_softmax(-1).gather(-1, ids.view(6, 1))[:, 0])


def test_lower_bound_of_the_ratio_below_zero_binds_nothing():
    new, old, advantages = (values(i) for i in (3, 4, 5))
    config = Config(clip_ratio=0.2, clip_ratio_low=10.0, clip_ratio_high=0.2, clip_ratio_c=1e9, global_batch_info={})
    loss, _ = verl.compute_policy_loss_vanilla(old, new, advantages, MASK, "token-mean", config)
    ratio = (new - old).exp()
    expected = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(max=1.2))
    torch.testing.assert_close(loss, AGGREGATES["token-mean"](expected, MASK))
    torch.testing.assert_close(openrlhf.PolicyLoss(10.0, 0.2)(new, old, advantages, MASK)[0], loss)


def test_whitening_refuses_a_gradient():
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="expected a constant"):
        verl.masked_whiten(x, torch.ones(4))
    with torch.no_grad():
        assert verl.masked_whiten(x, torch.ones(4)).std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_correction_level": "batch"}, "off/token/seq"),
        ({"is_correction_mode": "drop"}, "mask/clip"),
        ({"is_correction_gating": "kl"}, "ratio/binary_kl/tv"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "requires is_correction_level=token"),
        ({"is_correction_level": "seq", "is_correction_gating": "tv"}, "upper bound only"),
    ],
)
def test_policy_loss_refuses_what_openrlhf_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        openrlhf.PolicyLoss(**options)
