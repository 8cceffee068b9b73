"""The facts about the machine, and the table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import rlhf_kernels

from .harness import Result


def _cpu_model() -> str:
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
    changes = _git("status", "--porcelain")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": _version("triton"),
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
    moved = f"{result.bytes_moved / 1e6:.1f} MB to move, copy {result.copy_gb_per_s:.1f} GB/s"
    case = f"{result.op} {result.mode} {list(result.shape)} {result.dtype}"
    lines = [
        f"{case}, ours on {result.backend}; {moved}, load {result.load_average:.1f}",
        "             median ms   iqr ms  rounds    GB/s  of copy   peak MB   ours is  max |error|",
    ]
    for name, m in result.providers.items():
        times = f"{result.speedup[name]:.2f}x" if name in result.speedup else ""
        lines.append(
            f"  {name:<10}{m.median_s * 1e3:>11.3f}{m.iqr_s * 1e3:>9.3f}{len(m.samples_s):>8}{m.gb_per_s:>8.2f}"
            f"{m.fraction_of_copy:>9.2f}{m.peak_bytes / 1e6:>10.1f}{times:>10}  {_error(m.max_abs_error)}"
        )
    lines += [f"  {name:<10}failed: {why}" for name, why in result.failed.items()]
    return "\n".join(lines)
