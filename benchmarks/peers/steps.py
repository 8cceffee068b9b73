"""What the step benchmarks share: this trainer and TRL's, one after the other, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEASURES = {  # label, unit, digits
    "step_s": ("seconds (median)", 1, 2),
    "cpu_s": ("processor's seconds", 1, 2),
    "growth_bytes": ("peak over models, MB", 1e6, 0),
    "peak_bytes": ("peak of the process, MB", 1e6, 0),
}


def arguments_of(document: str, steps: int, trl_python: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32000, help="entries of the vocabulary")
    parser.add_argument("--steps", type=int, default=steps, help="timed steps, after one that is not")
    parser.add_argument("--threads", type=int, default=2, help="of both")
    parser.add_argument("--trl-python", type=Path, default=trl_python, help="interpreter that has TRL")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if not arguments.trl_python.exists():
        parser.error(f"{arguments.trl_python} is not there: run `make peers`")
    return arguments


def compare(kind: str, settings: dict, trl_python: Path, check: Callable[[dict, dict], None]) -> dict:
    """What was measured of both trainers by rlhf_<kind>_step.py and trl_<kind>_step.py, once `check` has passed it.
    This process stays small: a child's ru_maxrss starts from its parent's."""
    commands = {
        "rlhf": (sys.executable, "-m", f"benchmarks.peers.rlhf_{kind}_step"),
        "trl": (str(trl_python), str(Path(__file__).with_name(f"trl_{kind}_step.py"))),
    }
    results = measure(commands, settings, before=(sys.executable, "-m", "benchmarks.peers.models"))
    check(results, settings)
    return results


def measure(commands: dict[str, tuple[str, ...]], settings: dict, before: tuple[str, ...] = ()) -> dict:
    """{name: summary} of commands that take a folder with settings.json, and the file for their figures; `before` takes
    the folder and makes what they read."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        if before:
            run(*before, folder, threads=settings["threads"])
        for name, command in commands.items():
            result = Path(folder) / f"{name}.json"
            run(*command, folder, str(result), threads=settings["threads"])
            results[name] = summary(json.loads(result.read_text(encoding="utf-8")))
    return results


def run(*command: str, threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-4000:]}")


def summary(row: dict) -> dict:
    medians = {name: statistics.median(row[key][1:]) for name, key in (("step_s", "seconds"), ("cpu_s", "cpu_seconds"))}
    return row | medians | {"growth_bytes": row["peak_bytes"] - row["built_bytes"], "load_average": os.getloadavg()[0]}


def ratios(results: dict, over: str, under: str) -> dict[str, float]:
    return {key: results[over][key] / results[under][key] for key in MEASURES}


def machine(trl_python: Path) -> dict:
    models = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    version = "import importlib.metadata as m; print(*(m.version(n) for n in ('trl', 'transformers', 'torch')))"
    trl = subprocess.run([str(trl_python), "-c", version], capture_output=True, text=True, check=True).stdout.split()
    return {
        "cpu": models[0].partition(": ")[2] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "rlhf": {name: metadata.version(name) for name in ("rlhf-kernels", "transformers", "torch")},
        "trl": dict(zip(("trl", "transformers", "torch"), trl)),
    }


def show(title: str, report: dict, ratio: str) -> None:
    """`ratio` is the report's key of the ratios: what stands over what."""
    results, trl = report["results"], report["machine"]["trl"]["trl"]
    print(f"{title}, {report['settings']['threads']} threads, {report['machine']['cpu']}")
    names = "".join(f"{'trl ' + trl if name == 'trl' else name:>12}" for name in results)
    print(f"{'':28}{names}{ratio.replace('_over_', ' / '):>16}")
    for key, (label, unit, digits) in MEASURES.items():
        values = "".join(f"{row[key] / unit:12.{digits}f}" for row in results.values())
        print(f"{label:28}{values}{report[ratio][key]:15.2f}x")
    loads = "".join(f"{row['load_average']:12.1f}" for row in results.values())
    print(f"{'load average at the end':28}{loads}")
    print("timed steps, s: " + "; ".join(f"{n} {[round(s, 2) for s in r['seconds'][1:]]}" for n, r in results.items()))


def write(path: Path | None, report: dict) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
