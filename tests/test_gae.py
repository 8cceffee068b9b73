"""gae: the battery, then closed forms and the bug families of its peers."""

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import gae, testing

BACKENDS = testing.available_backends("gae")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rlhf_kernels.backend(request.param):
        yield request.param


@battery("gae")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def test_lambda_1_is_return_minus_value(backend):
    rewards, values = torch.randn(3, 11), torch.randn(3, 11)
    advantages, returns = gae(rewards, values, lam=1.0, gamma=1.0)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(returns, to_go, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(advantages, to_go - values, rtol=1e-5, atol=1e-5)


def test_lambda_0_is_the_td_error(backend):
    rewards, values = torch.randn(3, 11), torch.randn(3, 11)
    next_values = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    torch.testing.assert_close(gae(rewards, values, lam=0.0, gamma=0.9)[0], rewards + 0.9 * next_values - values)


def test_gaps_are_skipped(backend):
    """miles#1827: tool output between two response tokens is no step of time."""
    mask = torch.tensor([[True, False, False, True, True, False]])
    rewards, values = torch.randn(1, 6), torch.randn(1, 6)
    advantages, returns = gae(rewards, values, mask, gamma=0.9)
    dense = gae(rewards[mask][None], values[mask][None], gamma=0.9)
    torch.testing.assert_close(advantages[mask], dense[0][0])
    torch.testing.assert_close(returns[mask], dense[1][0])


def test_gap_zero_is_a_loop_over_zeros(backend):
    """OpenRLHF multiplies rewards and values by the mask and runs over every position."""
    mask = torch.tensor([[False, True, False, False, True, True, False]])
    rewards, values = torch.randn(1, 7), torch.randn(1, 7)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8, gap="zero")
    dense, _ = gae(rewards * mask, values * mask, gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages[mask], dense[mask])


def test_packed_equals_padded(backend):
    lengths = [5, 0, 1, 9, 3]
    bounds = torch.tensor([0, 5, 5, 6, 15, 18], dtype=torch.int32)
    rewards, values = torch.randn(18), torch.randn(18)
    packed, _ = gae(rewards, values, cu_seqlens=bounds, gamma=0.95)
    for b, n in enumerate(lengths):
        part = slice(int(bounds[b]), int(bounds[b]) + n)
        alone, _ = gae(rewards[None, part], values[None, part], gamma=0.95)
        torch.testing.assert_close(packed[part], alone[0])


def test_bootstrap_continues_a_truncated_sequence(backend):
    """Cutting a sequence and bootstrapping with its next value gives, at lam=0, what the whole gives."""
    rewards, values = torch.randn(2, 8), torch.randn(2, 8)
    whole, _ = gae(rewards, values, gamma=0.9, lam=0.0)
    cut, _ = gae(rewards[:, :5], values[:, :5], bootstrap_values=values[:, 5], gamma=0.9, lam=0.0)
    torch.testing.assert_close(cut, whole[:, :5])


def test_bad_bounds(backend):
    if backend == "triton":
        pytest.skip("a GPU kernel does not look at the bounds")
    for bounds in ([0, 4, 3, 6], [0, 3, 5], [1, 6]):
        with pytest.raises(ValueError, match="cu_seqlens: expected bounds that rise from 0 to 6"):
            gae(torch.zeros(6), torch.zeros(6), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"values": torch.zeros(2, 4)}, ValueError, r"values: expected the shape \(2, 3\) of rewards, got \(2, 4\)"),
        (
            {"rewards": torch.zeros(3)},
            ValueError,
            r"rewards: expected \(B, T\), got \(3,\); packed \(N,\) tokens need cu_seqlens",
        ),
        ({"rewards": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "rewards: expected float32"),
        ({"mask": torch.ones(2, 3)}, TypeError, r"mask: expected bool.*\.bool\(\)"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "mask: expected the shape"),
        ({"values": torch.zeros(2, 3, device="meta")}, ValueError, "values: expected device cpu"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, r"rewards: expected packed \(N,\)"),
        ({"bootstrap_values": torch.zeros(3)}, ValueError, r"bootstrap_values: expected the shape \(2,\)"),
        ({"gamma": 1.5}, ValueError, r"gamma: expected a number in \[0, 1\], got 1.5"),
        ({"lam": float("inf")}, ValueError, "lam: expected a finite int or float"),
        ({"gap": "drop"}, ValueError, "gap: expected one of skip, zero, got 'drop'"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=words):
        gae(**arguments)


def test_int64_bounds_are_refused():
    with pytest.raises(TypeError, match=r"cu_seqlens: expected int32, got torch.int64; convert it with .int\(\)"):
        gae(torch.zeros(3), torch.zeros(3), cu_seqlens=torch.tensor([0, 3]))
