"""The op benchmarks at fixed sizes: each op's battery first, then its cases, compared with an earlier file if there is
one."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import ModuleType

import torch

from . import compare
from .accuracy import first_line, refusal
from .case import OURS, Case, with_other_backends
from .measure import Result, measure
from .report import table

REPEATS = 2  # measurements anew of a case that looks slower than it was
QUICK_SECONDS = 0.5


@dataclass
class Outcome:
    """What a run found; entries as in the JSON file."""

    results: list[dict] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # op or case: why
    verdicts: list[compare.Verdict] = field(default_factory=list)


def bench(op: str) -> ModuleType:
    return importlib.import_module(f".bench_{op}", __package__)


def dtypes(module: ModuleType, named: list[str] | None, device: torch.device) -> list[torch.dtype]:
    """Those asked for that the op takes; else float32, and bfloat16 on CUDA for ops with logits or a head."""
    default = "bfloat16" if device.type == "cuda" and getattr(module, "HALF_ON_CUDA", False) else "float32"
    return [getattr(torch, name) for name in named or [default] if name in module.DTYPES]


def backends(case: Case, device: torch.device) -> list[str | None]:
    """Those that this case times; None is the dispatcher's choice."""
    return [p.backend for name, p in with_other_backends(case, device).items() if name == OURS or p.backend]


def cases(args: argparse.Namespace, device: torch.device, refused: dict[str, str]) -> Iterator[Case]:
    """Of ops whose battery passes here. Graphs compiled for one case are forgotten before the next."""
    tried: set[str] = set()
    for op in args.ops:
        module = bench(op)
        for dtype in dtypes(module, args.dtype, device):
            for case in module.cases(device, dtype, args.quick):
                if case.op not in tried:
                    if why := refusal(case.op, backends(case, device), device):
                        refused[case.op] = why
                        print(f"\n{case.op} refused, its battery fails: {why}", flush=True)
                    tried.add(case.op)
                if case.op not in refused:
                    torch._dynamo.reset()
                    yield case


def run(args: argparse.Namespace, old: dict | None, facts: dict, outcome: Outcome, save: Callable[[], None]) -> None:
    """Fills `outcome`, and saves after each case: a long run that is killed has not run for nothing."""
    device, seconds = torch.device(args.device), QUICK_SECONDS if args.quick else args.seconds
    before = {compare.key(result): result for result in old["results"]} if old else {}
    same = old is not None and compare.same_machine(old["machine"], facts)
    for case in cases(args, device, outcome.refused):
        try:
            result = measure(case, device, seconds, args.providers)
            if old is not None:
                result, verdict = confirmed(case, result, before.get(case.key), same, device, seconds, args.providers)
                outcome.verdicts.append(verdict)
        except Exception as error:  # ours raised: the other cases are of interest all the same
            outcome.refused[case.key] = first_line(error)
            print(f"\n{case.key} failed: {outcome.refused[case.key]}", flush=True)
            continue
        print("\n" + table(result), flush=True)
        outcome.results.append(asdict(result))
        save()
    if outcome.verdicts:
        print("\n" + compare.table(outcome.verdicts, same), flush=True)


def confirmed(
    case: Case,
    result: Result,
    before: dict | None,
    same: bool,
    device: torch.device,
    seconds: float,
    only: list[str] | None = None,
) -> tuple[Result, compare.Verdict]:
    """A case that looks slower is measured anew: a busy machine is seldom busy three times."""
    verdict = compare.judge(before, asdict(result), same)
    for _ in range(REPEATS):
        if not verdict.slower:
            break
        result = measure(case, device, seconds, only)
        verdict = compare.judge(before, asdict(result), same)
    return result, verdict
