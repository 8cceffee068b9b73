"""Best-of-n: the reward of the sample that a proxy likes best of n, estimated from N samples; its KL; the picture."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from rlhf.evaluation import standard_error


def expected_best(
    proxy: Tensor,  # (..., N)
    rewards: Tensor,  # (..., N)
    n: int,
) -> Tensor:  # (...) float64
    """The mean reward of the sample with the highest proxy, over all subsets of n: the unbiased estimate from N samples
    (arXiv 2112.09332, appendix I). In order of the proxy, sample i is the best of C(i, n-1) of C(N, n) subsets."""
    order, count = proxy.argsort(dim=-1, stable=True), proxy.shape[-1]
    below = torch.arange(n - 1, count, dtype=torch.float64)

    def log_choose(total: Tensor, chosen: int) -> Tensor:
        return (total + 1).lgamma() - math.lgamma(chosen + 1) - (total - chosen + 1).lgamma()

    weights = (log_choose(below, n - 1) - log_choose(torch.tensor(float(count), dtype=torch.float64), n)).exp()
    return (weights * rewards.gather(-1, order)[..., n - 1 :].double()).sum(-1)


def best_of_n_kl(n: int) -> float:
    """In nats; exact where no two samples share a proxy, else a bound."""
    return math.log(n) - (n - 1) / n


def curve(scores: Tensor) -> list[dict[str, float]]:  # (P, N), of N samples to each of P prompts
    """The expected score of the best of 1, 2, 4, ... up to N, with its standard error over prompts and the KL."""
    points = []
    for n in (2**i for i in range(scores.shape[1].bit_length())):
        best = expected_best(scores, scores, n)
        points.append({"n": n, "kl": best_of_n_kl(n), "score": float(best.mean()), "score_se": standard_error(best)})
    return points


def draw(path: Path, points: list[dict[str, float]]) -> None:
    """The curve over n, and above it the KL; needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.subplots()
    n, score, error = ([point[name] for point in points] for name in ("n", "score", "score_se"))
    panel.errorbar(n, score, None if math.isnan(error[0]) else error, color="#0072B2", marker="o", capsize=3)
    panel.set_xscale("log", base=2)
    panel.set_xticks(n, n)
    panel.set(xlabel="n, samples to choose from", ylabel="expected score of the best")
    panel.grid(alpha=0.25)
    above = panel.secondary_xaxis("top")
    above.set_xticks(n, [f"{point['kl']:.2f}" for point in points])
    above.set_xlabel("KL to the policy, at most (nats a response)")
    above.xaxis.set_minor_locator(NullLocator())
    figure.suptitle("Best of n; bars: ± one standard error over prompts", fontsize=11)
    figure.savefig(path, dpi=130)
