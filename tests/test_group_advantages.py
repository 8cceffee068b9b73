"""group_advantages: the battery, then what is particular to it."""

import math

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import group_advantages, testing
from rlhf_kernels.ops.group_advantages import KINDS


@battery("group_advantages")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


IDS = torch.tensor([2, 0, 2, 4, 0, 2])  # groups of two, three and one, out of order, with ids that no sample has
SCORES = torch.tensor([1.0, 10.0, 2.0, 7.0, 14.0, 6.0])
STD = math.sqrt(7)  # of 1, 2, 6


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", [-2 / (STD + 0.5), -2 / (8**0.5 + 0.5), -1 / (STD + 0.5), 0, 2 / (8**0.5 + 0.5), 3 / (STD + 0.5)]),
        ("grpo_no_std", [-2.0, -2.0, -1.0, 0.0, 2.0, 3.0]),
        ("rloo", [-3.0, -4.0, -1.5, 0.0, 4.0, 4.5]),
    ],
)
def test_by_hand(kind, expected):
    """rloo: 1 less the mean of 2 and 6. A group of one gets 0."""
    for dtype in (torch.float32, torch.float64):
        found = group_advantages(SCORES.to(dtype), IDS, kind=kind, eps=0.5)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype), rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_score_stays_in_its_group(kind, bad):
    clean = group_advantages(SCORES, IDS, kind=kind)
    for at in range(len(IDS)):
        scores = SCORES.clone()
        scores[at] = bad
        found, same = group_advantages(scores, IDS, kind=kind), IDS[at] == IDS
        assert torch.equal(found[~same], clean[~same])
        assert not found[at].isfinite(), "a score that is no number must show, in a group of one too"


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_changes_nothing(kind):
    """A reward and the same reward plus a constant rank alike; 2^14 keeps these scores exact in float32."""
    plain = group_advantages(SCORES, IDS, kind=kind)
    shifted = group_advantages(SCORES + 2**14, IDS, kind=kind)
    assert torch.equal(shifted, plain)


@pytest.mark.parametrize("offset", [0.1, 3.3, 10000.1])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_give_zero(kind, offset):
    """The mean of equal numbers is rounded: what is left must not be scaled up to an advantage."""
    for size in (2, 3, 5, 7, 11):
        found = group_advantages(torch.full((size,), offset), torch.zeros(size, dtype=torch.int64), kind=kind)
        assert not found.any(), (size, found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_samples_is_free(kind):
    """The same samples shuffled keep their advantages, whichever ids name the groups."""
    shuffle, names = torch.randperm(len(IDS)), torch.randperm(len(IDS))
    plain = group_advantages(SCORES.double(), IDS, kind=kind)
    shuffled = group_advantages(SCORES.double()[shuffle], names[IDS][shuffle], kind=kind)
    torch.testing.assert_close(shuffled, plain[shuffle], rtol=1e-14, atol=1e-14)


def test_is_not_differentiable():
    assert not group_advantages(SCORES.clone().requires_grad_(), IDS).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"group_ids": IDS + 2}, ValueError, r"group_ids: expected ids in \[0, 6\), got 2 to 6"),
        ({"group_ids": IDS - 1}, ValueError, r"group_ids: expected ids in \[0, 6\), got -1 to 3"),
        ({"group_ids": IDS.int()}, TypeError, r"group_ids: expected int64, got torch.int32; convert it with .long\(\)"),
        ({"group_ids": IDS[:3]}, ValueError, r"group_ids: expected the shape \(6,\) of scores, got \(3,\)"),
        ({"group_ids": IDS.to("meta")}, ValueError, "group_ids: expected device cpu, that of scores, got meta"),
        ({"scores": SCORES.long()}, TypeError, "scores: expected float32"),
        ({"scores": SCORES.view(2, 3)}, ValueError, r"scores: expected \(B,\), got \(2, 3\)"),
        ({"kind": "dr_grpo"}, ValueError, "kind: expected one of grpo, grpo_no_std, rloo, got 'dr_grpo'"),
        ({"eps": -1e-4}, ValueError, "eps: expected a number >= 0"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        group_advantages(**{"scores": SCORES, "group_ids": IDS, **change})
