"""The measurements as rows in Liger's columns, so that what draws and compares its benchmarks reads ours.

A row is one metric of one provider: `speed` in ms or `memory` in MB (the peak over the inputs, the same in every run).
`y_value_50`, `_20`, `_80` are quantiles over the samples. x is the number of tokens, or what the op counts in their
place; of a sweep it is what varies. The other sizes, the dtype and the variant are JSON in
`extra_benchmark_config_str`. Mode `full` is forward and backward. `liger_version` names the package that was measured,
`rlhf_kernels` and its version.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label",
    "x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp",
    "liger_version",
)  # fmt: skip
MODES = {"forward": "forward", "forward+backward": "full"}


def rows(report: dict) -> Iterator[dict]:
    for result in report["results"]:
        yield from _rows(result, *x_of(result["sizes"]), report["machine"])
    for sweep in report["scaling"]:
        for result in sweep["points"]:
            x_name = sweep["x_name"]
            yield from _rows(result, x_name, result["sizes"][x_name], report["machine"])


def x_of(sizes: dict[str, int]) -> tuple[str, int]:
    """Tokens where the case has them, else its first size."""
    if "length" in sizes:
        return "tokens", sizes["sequences"] * sizes["length"]
    return ("tokens", sizes["tokens"]) if "tokens" in sizes else next(iter(sizes.items()))


def _rows(result: dict, x_name: str, x: int, machine: dict) -> Iterator[dict]:
    others = {name: size for name, size in result["sizes"].items() if name != x_name}
    extra = others | {"dtype": result["dtype"]} | ({"variant": result["variant"]} if result["variant"] else {})
    for provider, m in result["providers"].items():
        speed = [m[name] * 1e3 for name in ("median_s", "p20_s", "p80_s")]
        for metric, unit, values in (("speed", "ms", speed), ("memory", "MB", [m["peak_bytes"] / 1e6] * 3)):
            figures = [
                result["op"], provider, MODES[result["mode"]], metric, unit, x_name, x_name, x,
                *(f"{value:.6g}" for value in values), json.dumps(extra),
                machine["device_name"], machine["date"], f"rlhf_kernels {machine['rlhf_kernels']}",
            ]  # fmt: skip
            yield dict(zip(COLUMNS, figures))


def write(report: dict, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(report))
