"""Pictures of a file of the benchmarks: `python -m benchmarks --plots DIR`, or `python -m benchmarks.plots FILE DIR`.

scaling-OP.png    time and peak memory over each size that was swept; bars from the 20 % to the 80 % quantile; a cross
                  is the last size before a provider stopped
bandwidth.png     achieved share of the copy bandwidth, of ops without matrix products
roofline.png      ops with matrix products: achieved Tflop/s over flops a compulsory byte, under both ceilings
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {
    "ours": "#d62728", "eager": "#7f7f7f", "compile": "#1f77b4", "torch": "#17becf", "trl": "#ff7f0e",
    "liger": "#2ca02c", "cce": "#9467bd", "flash_attn": "#8c564b", "verl": "#e377c2", "reference": "#bcbd22",
    "triton": "#aec7e8", "fused_fp32": "#98df8a", "products": "#000000",
}  # fmt: skip
MARKERS = dict(zip(COLOURS, "os^vD<>pPXhd*"))
UNITS = {
    "tokens": "tokens",
    "vocabulary": "vocabulary (entries)",
    "sequences": "sequences",
    "length": "tokens a sequence",
}
DPI = 110


def caption(machine: dict) -> str:
    where = f"{machine['device_name']}, {machine['threads']} CPU threads of {machine['cores']} cores, torch "
    commit = (machine["commit"] or "no commit")[:9] + (", modified" if machine["modified"] else "")
    return f"{where}{machine['torch']}, rlhf_kernels {machine['rlhf_kernels']} ({commit}), {machine['date'][:10]}"


def draw(report: dict, folder: Path) -> list[Path]:
    """Writes what the report has data for, and returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    sweeps: dict[str, list[dict]] = {}
    for sweep in filter(lambda sweep: sweep["points"], report["scaling"]):
        sweeps.setdefault(sweep["op"], []).append(sweep)
    pictures = {f"scaling-{op}.png": scaling(found) for op, found in sweeps.items()}
    bound = [result for result in report["results"] if not result["flops"]]
    products = [result for result in report["results"] if result["flops"]]
    if bound:
        pictures["bandwidth.png"] = bandwidth(bound)
    if products:
        pictures["roofline.png"] = roofline(products)
    for name, figure in pictures.items():
        figure.text(0.01, 0.005, caption(report["machine"]), fontsize=9, color="#444444", va="bottom")
        figure.savefig(folder / name, dpi=DPI)
    return [folder / name for name in pictures]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.25 / height, 1, 1 - 0.25 / height))  # room for the caption
    return figure, figure.subplots(rows, columns, squeeze=False)


def scaling(sweeps: list[dict]) -> Any:
    """A column a sweep: time above, memory below."""
    figure, axes = _figure(2, len(sweeps), 6.2 * len(sweeps), 8.2)
    for column, sweep in enumerate(sweeps):
        x_name, points = sweep["x_name"], sweep["points"]
        names = [name for name in COLOURS if any(name in point["providers"] for point in points)]
        time, memory = axes[0][column], axes[1][column]
        for name in names:
            here = [point for point in points if name in point["providers"]]
            xs = [point["sizes"][x_name] for point in here]
            found = [point["providers"][name] for point in here]
            middle = [1e3 * m["median_s"] for m in found]
            spread = [[1e3 * abs(m[q] - m["median_s"]) for m in found] for q in ("p20_s", "p80_s")]
            style = {"color": COLOURS[name], "marker": MARKERS[name], "ms": 5, "lw": 2.4 if name == "ours" else 1.3}
            time.errorbar(xs, middle, yerr=spread, capsize=3, label=name, **style)
            peaks = [m["peak_bytes"] / 1e6 for m in found]
            memory.plot(xs, peaks, label=name, **style)
            if len(here) < len(points):
                for axis, last in ((time, middle[-1]), (memory, peaks[-1])):
                    axis.plot(xs[-1], last, "x", color=COLOURS[name], ms=13, mew=2.5)
        first = points[0]["sizes"]
        fixed = ", ".join(f"{name} {size:,}" for name, size in first.items() if name != x_name)
        time.set_title(f"against {x_name}: {fixed}", fontsize=11)
        time.set_ylabel("ms a call, median and p20 to p80")
        memory.set_ylabel("peak MB over the inputs, results included")
        for axis in (time, memory):
            axis.set(xscale="log", yscale="log", xlabel=UNITS[x_name])
            axis.grid(True, which="major", alpha=0.3)
            axis.set_xticks([point["sizes"][x_name] for point in points])
            axis.set_xticklabels([f"{point['sizes'][x_name]:,}" for point in points], fontsize=9)
            axis.minorticks_off()
            axis.legend(fontsize=9)
    what = " ".join(filter(None, (sweeps[0]["op"], sweeps[0]["variant"], sweeps[0]["mode"], sweeps[0]["dtype"])))
    figure.suptitle(f"{what}      (x: the provider stopped after this size)", fontsize=12)
    return figure


def bandwidth(results: list[dict]) -> Any:
    """A row a case."""
    figure, ((axis,),) = _figure(1, 1, 10.5, 1.6 + 0.42 * len(results))
    shown = list(reversed(results))
    used = [name for name in COLOURS if any(name in result["providers"] for result in shown)]
    for name in used:
        rows = [i for i, result in enumerate(shown) if name in result["providers"]]
        found = [shown[i]["providers"][name] for i in rows]
        middle = [m["fraction_of_copy"] for m in found]
        spread = [[x * abs(m["median_s"] / m[q] - 1) for x, m in zip(middle, found)] for q in ("p80_s", "p20_s")]
        size = 9 if name == "ours" else 6
        axis.errorbar(
            middle, rows, xerr=spread, fmt=MARKERS[name], ms=size, color=COLOURS[name], capsize=2, label=name, alpha=0.9
        )
    axis.axvline(1, color="black", lw=1, ls="--", label="copy of 256 MiB;\nbeyond it: a cache")
    axis.set_yticks(range(len(shown)), [_label(result) for result in shown], fontsize=9)
    axis.set(xscale="log", xlabel="compulsory bytes a second, as a share of the copy's in the same rounds")
    axis.set_title("Ops without matrix products: achieved bandwidth, median and p20 to p80", fontsize=12)
    axis.grid(True, axis="both", alpha=0.3)
    axis.set_ylim(-0.7, len(shown) - 0.3)
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _label(result: dict) -> str:
    mode = "fwd+bwd" if result["mode"] == "forward+backward" else "fwd"
    shape = "x".join(map(str, result["shape"]))
    return " ".join(filter(None, (result["op"], result["variant"], mode, shape, result["dtype"])))


def roofline(results: list[dict]) -> Any:
    """A panel an op, so that providers can be told apart."""
    from matplotlib.lines import Line2D

    panels: dict[str, list[dict]] = {}
    for result in results:
        panels.setdefault(result["op"], []).append(result)
    rows = (len(panels) + 1) // 2
    figure, axes = _figure(rows, min(2, len(panels)), 6.0 * min(2, len(panels)) + 1.6, 4.4 * rows + 0.6)
    for axis, (op, found) in zip(axes.flat, panels.items()):
        _roof(axis, op, found)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    used = [name for name in COLOURS if any(name in result["providers"] for result in results)]
    handles = [Line2D([], [], ls="", marker=MARKERS[name], color=COLOURS[name], label=name) for name in used]
    figure.legend(handles=[Line2D([], [], color="black", label="ceiling"), *handles], loc="outside right center")
    figure.suptitle("Ops with matrix products, each size and mode, under the ceilings of the same rounds", fontsize=12)
    return figure


def _roof(axis: Any, op: str, results: list[dict]) -> None:
    from matplotlib.ticker import NullFormatter

    intensities = [result["flops"] / result["bytes_moved"] for result in results]
    copy, product = (
        [result[name] for result in results if result[name]] for name in ("copy_gb_per_s", "matmul_tflop_per_s")
    )
    bandwidth, peak = sorted(copy)[len(copy) // 2] * 1e9, sorted(product)[len(product) // 2]
    ridge = peak * 1e12 / bandwidth
    xs = [min(*intensities, ridge) / 10, ridge, max(*intensities, ridge) * 10]
    axis.plot(xs, [min(peak, x * bandwidth / 1e12) for x in xs], "k-", lw=1.5)
    for x, result in zip(intensities, results):
        for name, m in result["providers"].items():
            size = 9 if name == "ours" else 6
            axis.plot(x, m["tflop_per_s"], MARKERS[name], color=COLOURS[name], ms=size, alpha=0.9)
    axis.set(xscale="log", yscale="log", xlabel="needed flops a compulsory byte", ylabel="needed Tflop/s achieved")
    axis.set_title(f"{op}: copy {bandwidth / 1e9:.3g} GB/s, product {peak:.3g} Tflop/s", fontsize=11)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which="both", alpha=0.25)


if __name__ == "__main__":
    print("\n".join(map(str, draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))))
