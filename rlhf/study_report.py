"""The study's picture and tables, from what study.json holds."""

from __future__ import annotations

import math
from pathlib import Path

# Okabe and Ito's colours, which colour-blind readers tell apart, and a marker each
SWEEP_STYLES = (("#D55E00", "o"), ("#E69F00", "s"), ("#56B4E9", "^"), ("#0072B2", "v"))
DPO_STYLES = (("#CC79A7", "D"), ("#009E73", "P"))
BEST_OF_N_STYLE = ("#000000", "X")
ZOOM = 1.75  # sqrt of nats: where every method but PPO without a penalty stays

Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def tables(summary: dict) -> list[Table]:
    return [of_variants(summary), of_methods(summary)]


def of_variants(summary: dict) -> Table:
    columns = ["variant", "gold", "proxy", "KL", "of optimum", "what is peculiar", "s"]
    rows = [["SFT", *_rewards(summary["sft"]), "0", "", ""]]
    for v in summary["variants"]:
        score = f"{v['score']:.3f} ±{v['score_standard_error']:.3f}" if "score" in v else "–"
        rows.append([v["name"], *_rewards(v), score, v["note"], f"{v['seconds']:.0f}"])
    return (
        f"Variants of PPO on the gold reward (the process reward model: on the proxy), {_sizes(summary)}",
        columns,
        rows,
    )


def of_methods(summary: dict) -> Table:
    columns = ["method", "gold", "best gold on the way", "proxy", "KL", "warnings", "s"]
    rows = []
    for run in summary["sweep"]:
        rows.append([f"PPO, beta {run['beta']:g}", *_on_the_way(run), warned(run), f"{run['seconds']:.0f}"])
    for point in summary["best_of_n"]:
        gold, proxy, _ = _rewards(point)
        rows.append([f"best of {point['n']}", gold, "", proxy, f"{point['kl']:.2f}", "", ""])
    for run in summary["dpo"]:
        rows.append([f"DPO, beta {run['beta']:g}", *_on_the_way(run), "", f"{run['seconds']:.0f}"])
    return f"Optimising the proxy, {_sizes(summary)}", columns, rows


def warned(run: dict) -> str:
    lines = run["warnings"]
    return f"{len(lines)}, first at step {lines[0]['step']}" if lines else "none"


def _on_the_way(run: dict) -> list[str]:
    gold, proxy, kl = _rewards(run)
    best = max(run["curve"], key=lambda point: point["gold"])
    return [gold, f"{best['gold']:.2f} at KL {best['kl']:.2f}", proxy, kl]


def _rewards(point: dict) -> list[str]:
    return [f"{point[name]:.2f} ±{point[f'{name}_se']:.2f}" for name in ("gold", "proxy", "kl")]


def _sizes(summary: dict) -> str:
    return f"mean ± standard error of {summary['samples']['final']:,} samples, KL in nats a response"


def show(summary: dict, folder: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console()
    for title, columns, rows in tables(summary):
        table = RichTable(title=title)
        for column in columns:
            name = column in ("variant", "method")
            words = name or column == "what is peculiar"
            table.add_column(column, justify="left" if words else "right", no_wrap=name)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    free = summary["sweep"][0]
    console.print(f"PPO at beta {free['beta']:g} writes: {free['sample']}", highlight=False, soft_wrap=True)
    console.print(f"{summary['seconds']:.0f} s in all. {folder}/: study.png, study.json, study.md.", highlight=False)


def markdown(summary: dict) -> str:
    best = summary["optimum"]
    lines = ["# The demo's study", ""]
    for title, columns, rows in tables(summary):
        lines += [
            f"## {title}",
            "",
            *(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)),
            "",
        ]
    lines += [
        f"The known optimum at beta {best['beta']} has gold {best['reward']:.2f} at KL {best['kl']:.2f}. "
        f"Best-of-n is the unbiased estimate from {summary['samples']['pool']:,} samples, its KL log n - (n-1)/n.",
        "",
        f"PPO at beta {summary['sweep'][0]['beta']:g} warned:",
        "",
        *(f"- {row['warning']}" for row in summary["sweep"][0]["warnings"][:4]),
        "",
        f"{summary['seconds']:.0f} s in all, seed {summary['config']['seed']}.",
    ]
    return "\n".join(lines) + "\n"


# The picture


def draw(path: Path, summary: dict) -> None:
    """Proxy (dashed) and gold (solid) over sqrt(KL), as in arXiv 2210.10760: all of it, and where most methods stay."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13, 6.4), layout="constrained")
    whole, near = figure.subplots(1, 2, width_ratios=(1, 1.25))
    curves = [(f"PPO, β = {r['beta']:g}", [*r["curve"], r], style) for r, style in zip(summary["sweep"], SWEEP_STYLES)]
    curves += [(f"DPO, β = {r['beta']:g}", [*r["curve"], r], style) for r, style in zip(summary["dpo"], DPO_STYLES)]
    curves.append(("best of 1, 2, 4, … 128", summary["best_of_n"], BEST_OF_N_STYLE))
    for panel in (whole, near):
        best = [(0.0, summary["sft"]["gold"]), *((math.sqrt(o["kl"]), o["reward"]) for o in summary["frontier"])]
        panel.plot(*zip(*best), color="0.6", linewidth=4, alpha=0.6, zorder=1)
        for _, points, style in curves:
            _draw_curve(panel, points, *style)
        panel.set_xlabel("√KL to the SFT model (√nats a response)")
        panel.grid(alpha=0.25)
    whole.set(ylabel="mean reward of a response (gold: points; proxy: deviations of reviews)", title="The whole range")
    near.set(xlim=(-0.04, ZOOM), ylim=(summary["sft"]["gold"] - 0.2, 2.05), title="Near the SFT model")
    key = [Line2D([], [], color=color, marker=marker, label=label) for label, _, (color, marker) in curves]
    key += [
        Line2D([], [], color="0.6", linewidth=4, alpha=0.6, label="best gold of any policy (known optimum)"),
        Line2D([], [], color="0.2", label="solid, filled: gold"),
        Line2D([], [], color="0.2", linestyle="--", label="dashed, hollow: proxy"),
        Line2D(
            [], [], color="0.6", linestyle="", marker="o", markersize=9, mec="black", label="large: the end of a run"
        ),
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=6, frameon=False)
    sizes = summary["samples"]
    figure.suptitle(
        f"Optimising a learned reward. Bars: ± one standard error of {sizes['point']} fresh samples a point "
        f"(best-of-n: of a pool of {sizes['pool']:,})",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def _draw_curve(panel, points: list[dict], color: str, marker: str) -> None:
    """Lines are faint: single steps of PPO and DPO go far off and come back."""
    x = [math.sqrt(max(point["kl"], 0.0)) for point in points]
    ends = "curve" in points[-1]
    for name, line, fill in (("proxy", "--", "white"), ("gold", "-", color)):
        y, error = ([point[key] for point in points] for key in (name, f"{name}_se"))
        above = 3 if name == "gold" else 2
        panel.plot(x, y, color=color, linestyle=line, linewidth=1.1, alpha=0.55, zorder=above - 1)
        shape = {"marker": marker, "color": color, "markerfacecolor": fill, "linestyle": "", "zorder": above}
        panel.errorbar(x, y, error, elinewidth=0.9, markersize=4.5, markeredgewidth=0.9, **shape)
        if ends:
            edge = "black" if name == "gold" else color
            shape |= {"markeredgecolor": edge, "markeredgewidth": 1.4, "zorder": above + 2}
            panel.plot(x[-1:], y[-1:], markersize=9, **shape)
