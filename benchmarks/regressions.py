"""What `make bench-check` judges: is ours still as much faster than eager as it was?

Both run in the same rounds, so that neither a slower machine nor what else runs on it is taken for a regression. A
case is slower where the 20 % quantile of ours over eager lies above the stored 80 % quantile by more than MARGIN, in
each of ATTEMPTS measurements. Ratios are stored by machine in regressions.json, by `make bench-check STORE=1`, which
adds what is missing there: deleting an entry and storing anew accepts a slower op.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import ops
from .case import EAGER, OURS, Case
from .timing import Clock, interleave, quantile

STORE = Path(__file__).with_suffix(".json")
MARGIN = 0.3  # of a ratio
ATTEMPTS = 3
SECONDS = 1.0  # of timing an attempt
DIGITS = 4


@dataclass(frozen=True)
class Ratio:
    """Time of ours over the median of eager."""

    p20: float
    p50: float
    p80: float

    def slower_than(self, stored: Ratio, margin: float = MARGIN) -> bool:
        return self.p20 > stored.p80 * (1 + margin)


def checked_cases(op: str, device: torch.device) -> list[Case]:
    """The op's first size in each mode and variant, in its default dtype."""
    module = ops.bench(op)
    found = list(module.cases(device, ops.dtypes(module, None, device)[0], False))
    return [case for case in found if case.sizes == found[0].sizes]


def measured(case: Case, device: torch.device, seconds: float = SECONDS) -> Ratio:
    both = {name: case.providers[name] for name in (OURS, EAGER)}
    with torch.no_grad():
        samples, _ = interleave(both, case.inputs(), Clock(device), seconds)
    unit = quantile(samples[EAGER], 0.5)
    return Ratio(*(float(f"{quantile(samples[OURS], q) / unit:.{DIGITS}g}") for q in (0.2, 0.5, 0.8)))


def check(stored: Ratio, measure: Callable[[], Ratio], margin: float = MARGIN) -> tuple[bool, list[Ratio]]:
    """(it is slower, every measurement). One that is within the bounds settles it."""
    found = []
    for _ in range(ATTEMPTS):
        found.append(measure())
        if not found[-1].slower_than(stored, margin):
            return False, found
    return True, found


def load(machine: str, path: Path = STORE) -> dict[str, Ratio]:
    """The ratios of a machine by case."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {key: Ratio(**ratio) for key, ratio in kept.get(machine, {}).items()}


def store(machine: str, key: str, ratio: Ratio, path: Path = STORE) -> None:
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept.setdefault(machine, {})[key] = asdict(ratio)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
