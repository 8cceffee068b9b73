"""The picture of the trainer benchmark: a step's seconds by phase, ours above TRL's, a panel for each comparison."""

from __future__ import annotations

from pathlib import Path

COLOURS = {
    "generation": "#4477aa",
    "scoring": "#66ccee",
    "advantages": "#aa3377",
    "update": "#228833",
    "reference": "#66ccee",
    "gradient": "#228833",
    "optimizer": "#ccbb44",
    "rest": "#bbbbbb",
}
NAMES = {"rlhf": "ours", "trl": "TRL"}


def plot(results: list[dict], facts: dict, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {}  # {trainer: its comparisons, the smallest vocabulary first}
    for record in reversed(results):
        if record["providers"]:
            rows.setdefault(record["trainer"], []).append(record)
    rows = {trainer: rows[trainer] for trainer in sorted(rows, reverse=True)}
    columns = max(map(len, rows.values()), default=1)
    size = (0.8 + 3.6 * columns, 0.9 + 2.0 * max(1, len(rows)))
    figure, grid = pyplot.subplots(max(1, len(rows)), columns, figsize=size, squeeze=False, layout="constrained")
    for axes, (trainer, records) in zip(grid, rows.items()):
        for axis, record in zip(axes, records):
            _panel(axis, record)
        for axis in axes[len(records) :]:
            axis.axis("off")
        phases = list(records[0]["providers"]["rlhf"]["phases_s"])
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[phase]) for phase in phases]
        axes[0].set_ylabel(trainer.upper(), fontsize=12, fontweight="bold")
        axes[0].legend(handles, phases, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, fontsize=8)
    figure.suptitle(f"seconds of a step by phase\n{facts['device_name']}, {facts['date'][:10]}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _panel(axis, record: dict) -> None:
    bars = {NAMES[name]: row["phases_s"] for name, row in record["providers"].items()}
    totals = {NAMES[name]: row["step_s"] for name, row in record["providers"].items()}
    for name, found in record.get("published", {}).items():
        if isinstance(found, dict):
            bars[name] = {"generation": found["generation_s"], "rest": found["step_s"] - found["generation_s"]}
            totals[name] = found["step_s"]
    for place, (name, phases) in enumerate(bars.items()):
        left = 0.0
        for phase, seconds in sorted(phases.items(), key=lambda item: list(COLOURS).index(item[0])):
            axis.barh(place, seconds, left=left, color=COLOURS[phase], height=0.65)
            left += seconds
        axis.text(left, place, f" {totals[name]:.2f} s", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), bars)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.28 * max(totals.values()))
    axis.set_title(record["name"], fontsize=10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
