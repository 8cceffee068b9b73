"""Is ours slower than it was? Two files of the op benchmarks, case by case.

A case is slower where two things agree, each by more than the margin and the spread of the samples: the time of ours,
and that time over a yardstick of the same rounds, which is eager, or a large copy where eager did not run. A machine
that became slower, or busier, slows the yardstick as well. Files of different machines are compared by the ratio to
eager alone. `python -m benchmarks --compare OLD.json` measures a slower case anew before it says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from .case import EAGER, OURS, key_of
from .timing import quantile

MARGIN = 0.15  # of a time; the spread of both files comes on top
MACHINE = ("device_name", "cores", "threads", "cpu_isa")  # what makes times comparable


@dataclass(frozen=True)
class Verdict:
    """What became of one case."""

    key: str
    verdict: str  # "slower", "faster", "same", "new"
    time: float | None = None  # new median over old; None between machines
    against_eager: float | None = None  # the same of the ratio to eager

    @property
    def slower(self) -> bool:
        return self.verdict == "slower"


def same_machine(old: dict, new: dict) -> bool:
    """Of the `machine` entries of two files."""
    return all(old.get(name) == new.get(name) for name in MACHINE)


def key(result: dict) -> str:
    return key_of(*(result[name] for name in ("op", "variant", "mode", "shape", "dtype")))


def judge(old: dict | None, new: dict, same: bool, margin: float = MARGIN) -> Verdict:
    """Both are entries of `results`; `same` says that one machine measured them."""
    if old is None or any(OURS not in result["providers"] for result in (old, new)):
        return Verdict(key(new), "new")
    by_eager = all(EAGER in result["providers"] for result in (old, new))
    units = [(1.0, 1.0)] if same else []
    if by_eager:
        units.append(tuple(result["providers"][EAGER]["median_s"] for result in (old, new)))
    elif same:
        units.append(tuple(1 / result["copy_gb_per_s"] for result in (old, new)))
    if not units:
        return Verdict(key(new), "new")
    before, after = (result["providers"][OURS]["samples_s"] for result in (old, new))
    times = [([x / was for x in before], [x / now for x in after]) for was, now in units]
    ratios = [quantile(now, 0.5) / quantile(was, 0.5) for was, now in times]
    if all(_above(now, was, margin) for was, now in times):
        verdict = "slower"
    elif all(_above(was, now, margin) for was, now in times):
        verdict = "faster"
    else:
        verdict = "same"
    return Verdict(key(new), verdict, ratios[0] if same else None, ratios[-1] if by_eager else None)


def _above(samples: list[float], others: list[float], margin: float) -> bool:
    return quantile(samples, 0.2) > quantile(others, 0.8) * (1 + margin)


def table(verdicts: list[Verdict], same: bool) -> str:
    lines = ["case                                                          time  to eager"]
    for v in verdicts:
        figures = (f"{'' if x is None else f'{x:.2f}x':>10}" for x in (v.time, v.against_eager))
        lines.append(f"{v.key:<56}{''.join(figures)}  {v.verdict}")
    if not same:
        lines.append(
            f"Other machines, by {', '.join(MACHINE)}: judged by the ratio to eager of each run alone. "
            "A difference may be the machine's."
        )
    return "\n".join(lines)
