"""What the step benchmarks share: this trainer and TRL's, one after the other, each in a process of its own.

A comparison is one record, as `python -m benchmarks trainer` stores them (benchmarks/trainer.py explains its fields).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from benchmarks.files import write_json

ROOT = Path(__file__).resolve().parents[2]
FORMAT = 1
MEASURES = {  # label, unit, digits
    "step_s": ("seconds (median)", 1, 2),
    "cpu_s": ("processor's seconds", 1, 2),
    "growth_bytes": ("peak over models, MB", 1e6, 0),
    "peak_bytes": ("peak, MB", 1e6, 0),
}
TRL_PYTHON = {
    "ppo": ROOT / ".venv-trl/bin/python", "dpo": ROOT / ".venv-peers/bin/python",
    "grpo": ROOT / ".venv-peers/bin/python",
}  # fmt: skip
BULKY = ("lengths", "pair_lengths", "order")  # settings that the others determine
Check = Callable[[dict, dict], None]  # (providers, settings): raises StepError where they did other work


class StepError(RuntimeError):
    """A process that failed, or two that did different work."""


def compare(settings: dict, check: Check, rivals: bool = True) -> dict:
    """The record of one comparison. Raises what this trainer raises, and where `check` does not pass it; where TRL's is
    missing, fails or did other work this trainer stands alone, and the record says why."""
    kind, providers, failed = settings["trainer"], {}, {}
    python = TRL_PYTHON[kind]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        run(sys.executable, "-m", "benchmarks.peers.models", name, threads=settings["threads"])
        providers["rlhf"] = measured(folder, settings, sys.executable, "-m", "benchmarks.peers.rlhf_step")
        if rivals and not python.exists():
            failed["trl"] = f"no {python.relative_to(ROOT)}: `make peers` makes it"
        elif rivals:
            try:
                script = Path(__file__).with_name(f"trl_{kind}_step.py")
                providers["trl"] = measured(folder, settings, str(python), str(script))
            except StepError as error:
                failed["trl"] = str(error).strip().splitlines()[-1][:300]
    check({"rlhf": providers["rlhf"]}, settings)
    if "trl" in providers:
        try:
            check(providers, settings)
        except StepError as error:  # ours stands
            del providers["trl"]
            failed["trl"] = f"it did other work: {error}"
    return record_of(settings, providers, failed)


def record_of(settings: dict, providers: dict, failed: dict) -> dict:
    ratios = {}
    if "trl" in providers:
        ratios = {key: providers["trl"][key] / providers["rlhf"][key] for key in MEASURES}
    shown = {key: value for key, value in settings.items() if key not in BULKY}
    names = {"trainer": settings["trainer"], "name": settings["name"], "settings": shown}
    return names | {"providers": providers, "failed": failed, "trl_over_rlhf": ratios}


def measured(folder: Path, settings: dict, *command: str) -> dict:
    result = folder / "result.json"
    run(*command, str(folder), str(result), threads=settings["threads"])
    return summary(json.loads(result.read_text(encoding="utf-8")))


def run(*command: str, threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StepError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-4000:]}")


def summary(row: dict) -> dict:
    """The row of a process, with medians over the steps after the first, and the phases of the median step."""
    step, cpu = (statistics.median_low(row[name][1:]) for name in ("seconds", "cpu_seconds"))
    phases = row["phases"][row["seconds"].index(step, 1)]
    growth = row["peak_bytes"] - row["built_bytes"]
    found = {"step_s": step, "cpu_s": cpu, "phases_s": phases, "growth_bytes": growth}
    return row | found | {"load_average": os.getloadavg()[0]}


def machine(device: str, threads: int, command: str) -> dict:
    """The facts of the op benchmarks' files, and of TRL's environments."""
    import torch

    from benchmarks.report import machine

    facts = machine(torch.device(device), command.split()[3:]) | {"threads": threads, "command": command}
    return facts | {"transformers": metadata.version("transformers"), "trl": trl_versions()}


def trl_versions() -> dict[str, dict[str, str]]:
    packages = ("trl", "transformers", "torch")
    ask = f"import importlib.metadata as m; print(*(m.version(n) for n in {packages}))"
    found = {}
    for kind, python in TRL_PYTHON.items():
        if python.exists():
            done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True)
            found[kind] = dict(zip(packages, done.stdout.split()))
    return found


def table(record: dict) -> str:
    """One comparison: phases, then what is measured of the whole step."""
    providers = record["providers"]
    heads = [*providers, *(["trl / rlhf"] if len(providers) > 1 else [])]
    lines = [f"{record['trainer'].upper()} step, {record['name']}"]
    lines.append(f"{'':28}" + "".join(f"{name:>12}" for name in heads))
    for phase in providers["rlhf"]["phases_s"]:
        spent = [row["phases_s"].get(phase, 0.0) for row in providers.values()]
        ratio = f"{spent[1] / spent[0]:11.2f}x" if len(spent) > 1 and spent[0] else ""
        lines.append(f"{phase + ', s':28}" + "".join(f"{seconds:12.3f}" for seconds in spent) + ratio)
    for key, (label, unit, digits) in MEASURES.items():
        values = "".join(f"{row[key] / unit:12.{digits}f}" for row in providers.values())
        ratio = f"{record['trl_over_rlhf'][key]:11.2f}x" if record["trl_over_rlhf"] else ""
        lines.append(f"{label:28}{values}{ratio}")
    loads = "".join(f"{row['load_average']:12.1f}" for row in providers.values())
    steps = "; ".join(f"{name} {[round(s, 2) for s in row['seconds'][1:]]}" for name, row in providers.items())
    lines += [f"{'load average at the end':28}{loads}", f"timed steps, s: {steps}"]
    return "\n".join([*lines, *(f"{name} failed: {why}" for name, why in record["failed"].items())])


def write(path: Path | None, facts: dict, results: list[dict]) -> None:
    if path:
        write_json(path, {"format": FORMAT, "machine": facts, "results": results})


def arguments_of(document: str, steps: int) -> argparse.ArgumentParser:
    """Of a comparison by itself, at other sizes than those of `python -m benchmarks trainer`."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--vocab", type=int, default=32000, help="entries of the vocabulary")
    parser.add_argument("--steps", type=int, default=steps, help="timed steps, after one that is not")
    parser.add_argument("--threads", type=int, default=2, help="of both")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser


def alone(settings: dict, check: Check, path: Path | None, module: str) -> None:
    facts = machine(settings["device"], settings["threads"], " ".join(["python", "-m", module, *sys.argv[1:]]))
    record = compare(settings, check)
    print(table(record))
    write(path, facts, [record])
