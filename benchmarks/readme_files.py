"""What README's figures are read from: the files in benchmarks/results, and how numbers and tables are written."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Table = list[list[str]]  # rows of cells, the heads first


@dataclass(frozen=True)
class Results:
    """One file, or one part of a file of `make gpu`."""

    path: Path
    machine: dict
    results: list[dict]
    command: str
    refused: dict[str, str]  # ops whose tests failed there: they have no results

    @property
    def date(self) -> str:
        return self.machine["date"]

    @property
    def device(self) -> str:
        return self.machine.get("device", "cpu")


# Reading


def read(folder: Path) -> list[Results]:
    """All files that are shown, the newest first."""
    found = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        parts = [report]
        if "steps" in report:  # of make gpu, whose parts are whole reports; without a GPU it is a trial at tiny sizes
            names = ("ops", "ops_compile", "trainer") if report["device"] == "cuda" else ()
            parts = [report.get(name) for name in names]
        parts = [
            part | {"results": [*(part.get("results") or []), *(part.get("scaling") or [])]} for part in parts if part
        ]
        parts = [part for part in parts if part["results"] and kind_of(part["results"][0])]
        if not parts and "steps" not in report:
            print(f"{path.name}: holds nothing that README shows", file=sys.stderr)
        command = "make gpu" if "steps" in report else None
        found += [
            Results(path, p["machine"], p["results"], command or command_of(p["machine"]), p.get("refused", {}))
            for p in parts
        ]
    return sorted(found, key=lambda file: file.date, reverse=True)


def command_of(machine: dict) -> str:
    return machine.get("command") or shlex.join(["python", "-m", "benchmarks", *machine["argv"]])


def kind_of(result: dict) -> str | None:
    for kind, names in {
        "op": {"op", "providers"},
        "scaling": {"op", "x_name", "points"},
        "trainer": {"trainer", "providers"},
        "layout": {"layout", "peak_bytes"},
        "ranking": {"way", "accuracies"},
    }.items():
        if names <= result.keys():
            return kind
    return None


def newest(
    files: list[Results], kind: str, device: str, name: Callable[[dict], object]
) -> Iterator[tuple[Results, list[dict]]]:
    """Files with those of their results whose name no newer file has."""
    seen = set()
    for file in files:
        if file.device != device:
            continue
        found = [result for result in file.results if kind_of(result) == kind and name(result) not in seen]
        if found:
            yield file, found
        seen |= {name(result) for result in found}


# Numbers and tables


def milliseconds(value: float) -> str:
    return digits(value * 1e3)


def digits(value: float) -> str:
    """Three of them."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.{2 if value < 9.995 else 1}f}"


def seconds(value: float) -> str:
    return f"{value:.3f}" if value < 0.9995 else digits(value)


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def markdown(rows: Table) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(file: Results, results: list[dict]) -> str:
    """Where figures come from, in one sentence."""
    machine = file.machine
    versions = [f"torch {machine['torch']}", f"Python {machine['python']}"]
    versions += [f"{name} {machine[name]}" for name in ("triton", "transformers") if isinstance(machine.get(name), str)]
    isa = f" ({machine['cpu_isa']})" if machine.get("cpu_isa") and machine.get("device") == "cpu" else ""
    place = f"{machine['device_name']}{isa}, {machine['threads']} of {machine['cores']} cores"
    loads = [result["load_average"] for result in results if "load_average" in result]
    loads += [row["load_average"] for r in results if kind_of(r) == "trainer" for row in r["providers"].values()]
    loads += [point["load_average"] for r in results for point in r.get("points", [])]
    load = f", load average at most {max(loads):.1f}" if loads else ""
    link = f"[file](benchmarks/results/{file.path.name})"
    return f"{place}; {', '.join(versions)}; {machine['date'][:10]}{load}; `{file.command}` ({link})."
