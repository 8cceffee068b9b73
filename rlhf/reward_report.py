"""How good a reward model is on rows that it has not seen: report.json, report.png and the metrics under eval/.

The rows of the held-out part are compared as in training. Standard errors take a row as the unit, since the pairs of a
ranking and the steps of a response belong together; of plain pairs this is the binomial sqrt(p (1-p) / n).
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf.bag_of_words import baseline_margins
from rlhf.comparisons import Judged, score_rows
from rlhf.config import RewardConfig
from rlhf.data import Dataset
from rlhf.evaluation import wins
from rlhf.log import say
from rlhf.model import Scorer

BINS = 10  # of confidence and of score
MARGIN_BINS = 5  # of equal weight
SCATTER = 500  # points of score against length in the picture


@dataclass(frozen=True)
class Margins:
    """P comparisons: better - worse, float64, with their weights, objectives and rows."""

    values: Tensor
    weights: Tensor
    objectives: Tensor
    rows: Tensor

    @staticmethod
    def of(rows: list[Judged], scores: list[Tensor]) -> Margins:
        """`scores` (places, heads) of every row."""
        found = []
        for number, (row, score) in enumerate(zip(rows, scores)):
            known = [*score.double().tolist(), [0.0] * score.shape[1]]  # a place that is None, made -1, scores 0
            for c in row.comparisons:
                better, worse = (known[-1 if i is None else i][c.objective] for i in (c.better, c.worse))
                found.append((better - worse, c.weight, c.objective, number))
        values, weights, objectives, numbers = zip(*found)
        floats = (torch.tensor(x, dtype=torch.float64) for x in (values, weights))
        return Margins(*floats, torch.tensor(objectives), torch.tensor(numbers))

    def only(self, kept: Tensor) -> Margins:
        return Margins(self.values[kept], self.weights[kept], self.objectives[kept], self.rows[kept])

    @property
    def hits(self) -> Tensor:
        """1 in the right order, 0 in the wrong one, a half for a tie."""
        return wins(self.values, torch.zeros_like(self.values)).double()

    def accuracy(self) -> dict[str, float]:
        mean, error = self.mean(self.hits)
        return {"accuracy": mean, "accuracy_se": error}

    def mean(self, values: Tensor) -> tuple[float, float]:  # weighted mean and its standard error by rows
        total = self.weights.sum()
        mean = (self.weights * values).sum() / total
        of_rows = torch.zeros(int(self.rows.max()) + 1, dtype=torch.float64)
        of_rows.index_add_(0, self.rows, self.weights * (values - mean))
        return float(mean), float(of_rows.square().sum().sqrt() / total)

    def confidence(self) -> Tensor:
        """The probability that the model gives to the order it prefers."""
        return torch.sigmoid(self.values.abs())


# Metrics


def evaluate(rows: list[Judged], scores: list[Tensor], config: RewardConfig) -> dict[str, float]:
    """Loss (without margins, smoothing and centring), accuracy and calibration."""
    margins = Margins.of(rows, scores)
    found = margins.accuracy() | {"ece": calibration_error(reliability(margins))}
    found |= {"loss": margins.mean(softplus(-margins.values))[0], "margin": margins.mean(margins.values)[0]}
    if config.reward_type == "process":
        found |= {"steps": len(margins.values), **step_metrics(rows, margins)}
    else:
        found["pairs"] = len(margins.values)
    for head, name in enumerate(config.objectives):
        if len(hits := margins.only(margins.objectives == head).hits):
            found[f"accuracy/{name}"] = float(hits.mean())
    return {f"eval/{name}": value for name, value in found.items()}


def step_metrics(rows: list[Judged], margins: Margins) -> dict[str, float]:
    """Of right steps against wrong ones; what needs both kinds is left out where there is one."""
    right = torch.tensor([c.worse is None for row in rows for c in row.comparisons])
    found = {"right_share": float(right.double().mean())}
    if right.all() or not right.any():
        return found
    scores = torch.where(right, margins.values, -margins.values)
    sides = [float(margins.hits[side].mean()) for side in (right, ~right)]
    return found | {"balanced_accuracy": sum(sides) / 2, "auroc": auroc(scores[right], scores[~right])}


def auroc(above: Tensor, below: Tensor) -> float:
    """The probability that one of the first is higher than one of the second; ties count half."""
    ordered = below.sort().values
    less, at_most = (torch.searchsorted(ordered, above, right=right) for right in (False, True))
    return float((less + at_most).double().mean() / (2 * len(below)))


def reliability(margins: Margins) -> list[dict[str, float]]:
    """Confidence and accuracy in equal bins of the confidence, from 1/2 to 1."""
    confidence = margins.confidence()
    numbers = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    return [_bin(margins.only(numbers == i), "confidence", confidence[numbers == i]) for i in numbers.unique()]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """Expected |accuracy - confidence| over the bins."""
    total = sum(b["weight"] for b in bins)
    return sum(b["weight"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / total


def by_margin(margins: Margins) -> list[dict[str, float]]:
    """Accuracy in bins of the margin's size, as many comparisons in each."""
    size = margins.values.abs()
    parts = size.argsort(stable=True).tensor_split(MARGIN_BINS)
    return [_bin(margins.only(part), "size", size[part]) for part in parts if len(part)]


def _bin(margins: Margins, name: str, values: Tensor) -> dict[str, float]:
    return {name: margins.mean(values)[0], "weight": float(margins.weights.sum()), **margins.accuracy()}


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; 0 where one of them is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else 0.0


# The report


def measure(
    model: Scorer,
    train: Dataset,
    held_out: Dataset,
    config: RewardConfig,
    metrics: dict[str, float],  # with the normalisation of scores
    state: dict,  # of the run, and a part of its checkpoints: keeps what `write` needs
) -> dict[str, float]:
    """The metrics of the last step; nothing when no row was held out."""
    rows: list[Judged] = held_out.examples
    if not rows:
        return {}
    scores = score_rows(model, rows, config)
    margins, found = Margins.of(rows, scores), evaluate(rows, scores, config)
    words = replace(margins, values=baseline_margins(train.examples, rows, model.tokenizer))
    baseline = words.accuracy()
    gain, gain_se = margins.mean(margins.hits - words.hits)
    rewards = [one_reward(score, config, metrics) for score in scores]
    lengths = [torch.tensor([token + 1.0 for _, token in row.places]) for row in rows]
    found |= {f"eval/baseline_{name}": value for name, value in baseline.items()}
    found["eval/length_correlation"] = correlation(torch.cat(rewards), torch.cat(lengths))
    state["report"] = {
        "reward_type": config.reward_type,
        "rows": {"trained": len(train), "held_out": len(rows)},
        "comparisons": len(margins.values),
        **{name.removeprefix("eval/"): value for name, value in found.items()},
        "gain_over_baseline": gain,
        "gain_over_baseline_se": gain_se,
        "by_margin": by_margin(margins),
        "reliability": reliability(margins),
        **_lengths(rows, margins, lengths),
        **_sides(rows, rewards),
        "scatter": _scatter(rewards, lengths),
    }
    return found


def one_reward(
    score: Tensor, config: RewardConfig, metrics: dict[str, float]
) -> Tensor:  # (places, heads) to (places,)
    """As the model gives it once it is loaded: normalised, weighted, summed."""
    names = [f"/{name}" for name in config.objectives] or [""]
    weights = config.objective_weights or [1.0] * len(names)
    return sum(
        w * (x - metrics.get(f"reward_mean{name}", 0.0)) / metrics.get(f"reward_std{name}", 1.0)
        for w, x, name in zip(weights, score.unbind(1), names)
    )


def _lengths(rows: list[Judged], margins: Margins, lengths: list[Tensor]) -> dict[str, float]:
    """How often the longer response is preferred, by those who judged and by the model."""
    pairs = [(lengths[i], c) for i, row in enumerate(rows) for c in row.comparisons]
    if any(None in (c.better, c.worse) for _, c in pairs):
        return {}
    longer = torch.tensor([float(tokens[c.better] - tokens[c.worse]) for tokens, c in pairs])
    differ = margins.only(longer != 0)
    if not len(differ.values):
        return {}
    judged, of_model = (longer[longer != 0] > 0).double(), (differ.values * longer[longer != 0] > 0).double()
    return {
        "longer_preferred_by_judges": differ.mean(judged)[0],
        "longer_preferred_by_judges_se": differ.mean(judged)[1],
        "longer_preferred_by_model": differ.mean(of_model)[0],
        "longer_preferred_by_model_se": differ.mean(of_model)[1],
        "difference_correlation": correlation(margins.values, longer),
    }


def _sides(rows: list[Judged], rewards: list[Tensor]) -> dict[str, dict]:
    """Histograms of the one reward on both sides of the comparisons."""
    sides = {"better": [], "worse": []}
    for row, reward in zip(rows, rewards):
        for c in row.comparisons:
            for name in sides:
                if (place := getattr(c, name)) is not None:
                    sides[name].append(float(reward[place]))
    every = torch.cat(rewards).double()
    edges = torch.linspace(float(every.min()), float(every.max()) + 1e-6, 2 * BINS + 1, dtype=torch.float64)
    count = {
        name: torch.histogram(torch.tensor(values, dtype=torch.float64), edges).hist.long().tolist()
        for name, values in sides.items()
    }
    return {"histogram": {"edges": edges.tolist(), **count}}


def _scatter(rewards: list[Tensor], lengths: list[Tensor]) -> list[list[float]]:
    """(tokens, reward) of scores spread evenly over all."""
    points = list(zip(torch.cat(lengths).tolist(), torch.cat(rewards).tolist()))
    return [list(point) for point in points[:: math.ceil(len(points) / SCATTER)]]


def write(folder: Path, state: dict) -> None:
    """report.json, and report.png where matplotlib is installed."""
    if not (report := state.get("report")):
        return
    names = ("step", "loss", "rewards/accuracies", "eval/loss", "eval/accuracy", "eval/accuracy_se")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    report = report | {"curve": [{name: s[name] for name in names if name in s} for s in steps]}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    say(f"held out: {summary(report)}")
    if importlib.util.find_spec("matplotlib"):
        draw(folder / "report.png", report)
    else:
        say("report.png is left out: pip install matplotlib")


def summary(report: dict) -> str:
    def of(name: str) -> str:
        return f"{report[name]:.3f} ± {report[name + '_se']:.3f}"

    unit = "steps" if report["reward_type"] == "process" else "pairs"
    return (
        f"accuracy {of('accuracy')} on {report['comparisons']:,} {unit}, a bag of words {of('baseline_accuracy')}, "
        f"difference {of('gain_over_baseline')}, calibration error {report['ece']:.3f}, correlation with length "
        f"{report['length_correlation']:.2f}"
    )


# The picture


def draw(path: Path, report: dict) -> None:
    from matplotlib.figure import Figure

    process = report["reward_type"] == "process"
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    panels = figure.subplots(2, 3)
    _draw_curve(panels[0, 0], report["curve"])
    _draw_shares(panels[0, 1], report)
    _draw_margins(panels[0, 2], report)
    _draw_reliability(panels[1, 0], report)
    _draw_histogram(
        panels[1, 1], report["histogram"], ("right steps", "wrong steps") if process else ("better", "worse")
    )
    x, y = zip(*report["scatter"])
    of = "of the response up to the step's end" if process else "of the response"
    panels[1, 2].plot(x, y, ".", color="#0072B2", alpha=0.5, markersize=5)
    panels[1, 2].set(xlabel=f"length {of} (tokens)", ylabel="reward (deviations, once normalised)")
    panels[1, 2].set_title(f"Reward against length: correlation {report['length_correlation']:.2f}")
    for panel in panels.flat:
        panel.grid(alpha=0.25)
    rows, unit = report["rows"], "steps" if process else "pairs"
    figure.suptitle(
        f"Reward model on {rows['held_out']:,} held-out rows ({report['comparisons']:,} {unit}); trained on "
        f"{rows['trained']:,}. Bars: ± one standard error"
    )
    figure.savefig(path, dpi=110)


def _draw_curve(panel, curve: list[dict]) -> None:
    steps, losses = zip(*((p["step"], p["loss"]) for p in curve if p.get("loss") is not None))
    window = max(1, len(losses) // 20)
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(1).tolist()
    panel.plot(steps, losses, color="#56B4E9", linewidth=0.7, alpha=0.6, label="training, one step")
    panel.plot(steps[window - 1 :], smooth, color="#0072B2", label=f"training, mean of {window} steps")
    if points := [(p["step"], p["eval/loss"]) for p in curve if p.get("eval/loss") is not None]:
        panel.plot(*zip(*points), "o--", color="#D55E00", label="held out")
    panel.axhline(math.log(2), color="0.4", linestyle=":", label="chance, log 2")
    panel.set(xlabel="optimizer step", ylabel="loss (nats a comparison)", title="Learning")
    panel.legend(fontsize=8)


def _draw_shares(panel, report: dict) -> None:
    bars = [("accuracy:\nmodel", "accuracy", "#0072B2"), ("accuracy:\nbag of words", "baseline_accuracy", "#999999")]
    if "longer_preferred_by_model" in report:
        bars += [
            ("prefers longer:\nmodel", "longer_preferred_by_model", "#E69F00"),
            ("prefers longer:\njudges", "longer_preferred_by_judges", "#F0E442"),
        ]
    boxed = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}, "zorder": 3}
    for at, (_, name, color) in enumerate(bars):
        value, error = report[name], report[f"{name}_se"]
        panel.bar(at, value, yerr=error, color=color, width=0.6, capsize=5, edgecolor="0.3")
        panel.text(at, value + error + 0.02, f"{value:.3f} ± {error:.3f}", ha="center", fontsize=9, **boxed)
    panel.axhline(0.5, color="0.4", linestyle=":")
    panel.set(ylim=(0, 1.12), ylabel="share of comparisons", title="Accuracy and preference for length")
    panel.set_xticks(range(len(bars)), [label for label, *_ in bars])


def _draw_margins(panel, report: dict) -> None:
    bins = report["by_margin"]
    x, y, error = ([b[name] for b in bins] for name in ("size", "accuracy", "accuracy_se"))
    panel.errorbar(x, y, error, fmt="o-", color="#0072B2", capsize=4, label=f"a {len(bins)}th of the comparisons each")
    most = max(x)
    line = [most * i / 50 for i in range(51)]
    panel.plot(line, [1 / (1 + math.exp(-v)) for v in line], color="0.4", linestyle=":", label="what the model claims")
    panel.set(xlabel="size of the score difference (log odds)", ylabel="accuracy", title="Accuracy by margin")
    panel.set_ylim(min(0.4, *y), 1.05)
    panel.legend(fontsize=8, loc="lower right")


def _draw_reliability(panel, report: dict) -> None:
    bins = report["reliability"]
    x, y, error = ([b[name] for b in bins] for name in ("confidence", "accuracy", "accuracy_se"))
    panel.plot([0.5, 1], [0.5, 1], color="0.4", linestyle=":", label="perfect calibration")
    panel.errorbar(x, y, error, fmt="o", color="#0072B2", capsize=4, label="bins of confidence (number in them)")
    for a, b, e, found in zip(x, y, error, bins):
        panel.annotate(
            f"{found['weight']:.0f}", (a, b + e), (0, 4), textcoords="offset points", ha="center", fontsize=8
        )
    panel.set(xlim=(0.48, 1.02), ylim=(min(0.3, *(b - e for b, e in zip(y, error))), 1.28))
    panel.set(xlabel="confidence, sigmoid of |difference|", ylabel="accuracy")
    panel.set_title(f"Calibration: expected error {report['ece']:.3f}")
    panel.legend(fontsize=8, loc="upper left")


def _draw_histogram(panel, histogram: dict, labels: tuple[str, str]) -> None:
    for name, label, color in zip(("better", "worse"), labels, ("#009E73", "#CC79A7")):
        panel.stairs(histogram[name], histogram["edges"], fill=True, alpha=0.5, color=color, label=label)
    panel.set(xlabel="reward (deviations, once normalised)", ylabel="comparisons", title="Rewards of both sides")
    panel.legend(fontsize=8)
