"""The facts about the machine, and the table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import rlhf_kernels

from .case import NOT_INSTALLED
from .measure import Result

PEERS = ("trl", "liger_kernel", "verl", "cut-cross-entropy", "flash-attn")


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; None outside of one."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device, argv: list[str]) -> dict:
    """The `machine` entry of the JSON file."""
    backends = rlhf_kernels.backends()
    changes = _git("status", "--porcelain", "--", ":/!benchmarks/results", ":/!docs")  # runs write there
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": {name: _version(name) for name in PEERS if _version(name)},
        "rlhf_kernels": rlhf_kernels.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "modified": None if changes is None else bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "argv": argv,
        "cpu_isa": backends.cpu_isa,
        "backends": backends.ops,
        "unavailable": backends.unavailable,
    }


def machine_line(facts: dict) -> str:
    versions = f"torch {facts['torch']}, python {facts['python']}, rlhf_kernels {facts['rlhf_kernels']}"
    return f"{facts['device_name']}, {facts['threads']} threads of {facts['cores']} cores; {versions}"


def _error(errors: dict[str, float]) -> str:
    return " ".join(f"{name} {error:.0e}" for name, error in errors.items())


def table(result: Result) -> str:
    """One case, a line a provider; "ours is 2x" on a provider's line says that its median is twice ours."""
    ceilings = f"copy {result.copy_gb_per_s:.1f} GB/s"
    if result.flops:
        ceilings += f", {result.flops / 1e9:.1f} Gflop to multiply, product {result.matmul_tflop_per_s:.3g} Tflop/s"
    lines = [
        f"{result.key}, ours on {result.backend}; {result.bytes_moved / 1e6:.1f} MB to move, {ceilings}, "
        f"load {result.load_average:.1f}",
        f"{'':<14}{'p20':>10}{'p50':>10}{'p80 ms':>10}{'rounds':>7}{'GB/s':>8}{'of copy':>8}{'of mm':>7}"
        f"{'peak MB':>9}{'ops':>6}{'launch':>7}{'syncs':>6}{'ours is':>9}  max |error|",
    ]
    for name, m in result.providers.items():
        speedup = f"{result.speedup[name]:.2f}x" if name in result.speedup else ""
        launches = "" if m.launches is None else m.launches
        product = f"{m.fraction_of_matmul:.2f}" if m.fraction_of_matmul else ""
        lines.append(
            f"  {name:<12}{m.p20_s * 1e3:>10.3f}{m.median_s * 1e3:>10.3f}{m.p80_s * 1e3:>10.3f}{len(m.samples_s):>7}"
            f"{m.gb_per_s:>8.2f}{m.fraction_of_copy:>8.2f}{product:>7}{m.peak_bytes / 1e6:>9.1f}{m.ops:>6}"
            f"{launches:>7}{m.host_syncs:>6}{speedup:>9}  {_error(m.max_abs_error)}"
        )
    absent = [name for name, why in result.failed.items() if why.endswith(NOT_INSTALLED)]
    lines += [f"  {name:<12}failed: {why}" for name, why in result.failed.items() if name not in absent]
    return "\n".join(lines + ([f"  not installed: {', '.join(absent)}"] if absent else []))


def sweep_table(sweep: dict) -> str:
    """A line a size, median ms and peak MB of each provider, or why it stopped."""
    points = sweep["points"]
    names = list(dict.fromkeys(name for point in points for name in (*point["providers"], *point["failed"])))
    lines = [f"{sweep['op']} {sweep['mode']} against {sweep['x_name']}, {sweep['dtype']}: median ms, peak MB"]
    lines.append(f"{'':>10}" + "".join(f"{name:>20}" for name in names))
    for point in points:
        found = (point["providers"].get(name) for name in names)
        cells = (f"{m['median_s'] * 1e3:.2f}, {m['peak_bytes'] / 1e6:.1f}" if m else "-" for m in found)
        lines.append(f"{point['sizes'][sweep['x_name']]:>10}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join([*lines, *(f"  {name} stopped: {why}" for name, why in sweep["stopped"].items())])


def text(report: dict) -> str:
    """JSON with a list of numbers on one line."""
    numbers = re.compile(r"\[\s+((?:[-+.\deE]+,\s+)*[-+.\deE]+)\s+\]")
    return numbers.sub(lambda m: f"[{' '.join(m[1].split())}]", json.dumps(report, indent=1)) + "\n"
