"""Best-of-n: the unbiased estimate against all subsets and closed forms, its KL, the curve and the picture."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from rlhf.best_of_n import best_of_n_kl, curve, draw, expected_best


@pytest.mark.parametrize("n", range(1, 9))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    generator = torch.Generator().manual_seed(n)
    proxy, gold = torch.randn(2, 8, generator=generator)
    best = [gold[list(rows)][proxy[list(rows)].argmax()] for rows in combinations(range(8), n)]
    assert expected_best(proxy, gold, n).item() == pytest.approx(torch.stack(best).double().mean().item(), rel=1e-6)


def test_best_of_n_of_uniform_samples():
    """The best of n of U(0, 1) has mean n / (n + 1)."""
    pool = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for n in (1, 4, 128):
        error = 1 / math.sqrt(len(pool)) * (1 if n == 1 else 4)
        assert expected_best(pool, pool, n).item() == pytest.approx(n / (n + 1), abs=error)


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_best_of_n_kl_is_that_of_uniform_ranks(n):
    """The best of n has density n u^(n-1) over the quantile u: KL = integral of it times its logarithm."""
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    density = n * u ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx(float(torch.special.xlogy(density, density).mean()), abs=1e-4)


def test_rows_of_samples_are_estimated_each_by_itself():
    proxy, rewards = torch.randn(2, 3, 5, 6)
    found = expected_best(proxy, rewards, 3)
    assert found.shape == (3, 5)
    assert found[2, 4].item() == pytest.approx(expected_best(proxy[2, 4], rewards[2, 4], 3).item(), rel=1e-12)


def test_a_curve_goes_up_to_all_samples_in_powers_of_two():
    """Its error is that over prompts: those of a prompt depend on each other."""
    scores = torch.randn(50, 6) + 3 * torch.randn(50, 1)
    points = curve(scores)
    assert [point["n"] for point in points] == [1, 2, 4]
    of_prompts = torch.stack([scores[:, list(rows)].amax(1) for rows in combinations(range(6), 4)]).double().mean(0)
    assert points[2]["score"] == pytest.approx(of_prompts.mean().item(), rel=1e-6)
    assert points[2]["score_se"] == pytest.approx(of_prompts.std().item() / math.sqrt(50), rel=1e-6)
    assert points[0]["score"] == pytest.approx(scores.double().mean().item(), rel=1e-6) and points[0]["kl"] == 0.0
    assert [point["n"] for point in curve(scores[:, :4])] == [1, 2, 4]


def test_a_curve_of_one_prompt_has_no_error_and_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    points = curve(torch.tensor([[1.0, 3.0]]))
    assert [point["score"] for point in points] == pytest.approx([2.0, 3.0]) and math.isnan(points[0]["score_se"])
    draw(tmp_path / "curve.png", points)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
