"""Time and memory over sizes: against tokens, vocabulary, sequences, length, each provider until it stops.

Before a size is run, what each provider would need there is drawn on the line through its last two sizes: the peak over
the inputs, and the seconds of a call. One that would not fit into what is free stops, and says what it would have
needed; so does a rival that would take too long, and one that fails. Errors are judged at the fixed sizes of the op
benchmarks, not here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch

from . import bench_gae, bench_linear_ppo_loss, bench_linear_token_logprobs, bench_ppo_advantages, bench_token_logprobs
from .accuracy import first_line
from .case import OURS, Case
from .measure import Result, measure
from .report import sweep_table

MAX_CALL_SECONDS = {"cpu": 20.0, "cuda": 3.0}  # of rivals; on a CPU as long as they take to fill 24 GB
POINT_SECONDS, QUICK_SECONDS = 1.0, 0.2  # of timing a size
MIN_ROUNDS = 3
USABLE = 0.9  # of the memory that is free
LEFT_OUT = ("products",)


@dataclass(frozen=True)
class Sweep:
    """One curve of each provider."""

    x_name: str  # of Case.sizes
    xs: tuple[int, ...]
    case: Callable[[int], Case]


@dataclass
class History:
    """What the sizes so far tell of the next."""

    sizes: list[int] = field(default_factory=list)
    needs: dict[str, list[float]] = field(default_factory=dict)  # of each provider, peak bytes over the inputs
    seconds: dict[str, list[float]] = field(default_factory=dict)
    inputs: list[float] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)

    def add(self, x: int, result: Result) -> None:
        self.sizes.append(x)
        self.inputs.append(result.input_bytes)
        self.stopped |= result.failed
        for name, m in result.providers.items():
            self.needs.setdefault(name, []).append(m.peak_bytes)
            self.seconds.setdefault(name, []).append(m.median_s)

    def at(self, x: int, values: list[float]) -> float:
        """On the line through the last two sizes, or through the origin and the only one."""
        sizes = self.sizes[-len(values) :]
        if len(values) == 1:
            return values[0] * x / sizes[0]
        slope = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
        return max(values[-1], values[-1] + slope * (x - sizes[-1]))

    def why_not(self, name: str, x: int, free: float, max_seconds: float) -> str | None:
        """Why a provider does not run at the next size."""
        if name in self.stopped:
            return self.stopped[name]
        if name not in self.needs:
            return None
        need = self.at(x, self.needs[name]) + self.at(x, self.inputs)
        if need > free:
            return f"would need {need / 1e9:.3g} GB of {free / 1e9:.3g} GB"
        seconds = self.at(x, self.seconds[name])
        return f"would take {seconds:.1f} s a call" if seconds > max_seconds and name != OURS else None


def free_bytes(device: torch.device, cap_gb: float | None) -> float:
    """What may be filled, of the device or the machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    else:
        with open("/proc/meminfo", encoding="utf-8") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return min(USABLE * free, cap_gb * 1e9 if cap_gb else float("inf"))


def sweep(curve: Sweep, args: argparse.Namespace, device: torch.device) -> dict:
    """An entry of `scaling` in the JSON file."""
    torch._dynamo.reset()  # once: later sizes use the graph with dynamic shapes
    history, points = History(), []
    for x in curve.xs:
        case, free = curve.case(x), free_bytes(device, args.memory_gb)
        wanted = [n for n in case.providers if n not in LEFT_OUT and (not args.providers or n in args.providers)]
        for name in wanted:
            if why := history.why_not(name, x, free, MAX_CALL_SECONDS[device.type]):
                history.stopped[name] = why
        running = {name: case.providers[name] for name in wanted if name not in history.stopped}
        if not running:
            break
        seconds = QUICK_SECONDS if args.quick else POINT_SECONDS
        try:
            result = measure(replace(case, providers=running), device, seconds, judge=False, min_rounds=MIN_ROUNDS)
        except torch.OutOfMemoryError as error:  # of the inputs, or of a call that ran before
            history.stopped |= dict.fromkeys(running, first_line(error))
            break
        history.add(x, result)
        points.append(asdict(replace(result, failed=dict(history.stopped))))
    dtype = str(case.dtype).removeprefix("torch.")
    identity = {"op": case.op, "variant": case.variant, "mode": case.mode, "dtype": dtype}
    return identity | {"x_name": curve.x_name, "stopped": history.stopped, "points": points}


def sweeps(device: torch.device, dtype: torch.dtype | None, quick: bool) -> list[Sweep]:
    """A wide vocabulary over a narrow head: what the logits take shows before the products take all the time."""
    cuda = device.type == "cuda"
    of_logits = dtype or (torch.bfloat16 if cuda else torch.float32)
    of_tokens = torch.float32
    width, vocab, rows = (4096, 128256, 8192) if cuda else (64, 128256, 128)
    tokens = (1024, 4096, 16384, 65536, 131072) if cuda else (64, 256, 1024, 4096, 16384)
    of_rows = (1024, 4096, 16384, 65536) if cuda else (64, 256, 1024, 4096, 16384)
    vocabularies = (8000, 32000, 64000, 128256, 256000) if cuda else (8000, 32000, 128256, 256000)
    sequences, length = ((64, 512, 4096, 32768), 512) if cuda else ((8, 64, 512, 4096), 512)
    lengths, batch = ((128, 1024, 8192, 32768), 512) if cuda else ((64, 256, 1024, 4096), 64)
    if quick:
        width, vocab, rows, tokens, of_rows, vocabularies = 16, 500, 16, (8, 16), (8, 16), (500, 1000)
        sequences, length, lengths, batch = (2, 4), 16, (8, 16), 4
    linear = bench_linear_token_logprobs.case, bench_linear_ppo_loss.case
    of = partial(dict, dtype=of_logits, device=device, dynamic=None)
    found = [
        Sweep("tokens", of_rows, lambda n: bench_token_logprobs.case((n, vocab), **of())),
        Sweep("vocabulary", vocabularies, lambda v: bench_token_logprobs.case((rows, v), **of())),
    ]
    for case in linear:
        found.append(Sweep("tokens", tokens, lambda n, case=case: case((n, width, vocab), **of())))
        found.append(Sweep("vocabulary", vocabularies, lambda v, case=case: case((rows, width, v), **of())))
    for case in (bench_gae.case, bench_ppo_advantages.case):
        given = {"dtype": of_tokens, "device": device, "dynamic": None}
        found.append(Sweep("sequences", sequences, lambda n, case=case, given=given: case((n, length), **given)))
        found.append(Sweep("length", lengths, lambda n, case=case, given=given: case((batch, n), **given)))
    return found


def run(args: argparse.Namespace, found: list[dict], save: Callable[[], None]) -> None:
    """Appends entries of `scaling`, of the ops named, and saves after each."""
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype[0]) if args.dtype else None
    for curve in sweeps(device, dtype, args.quick):
        if curve.case(curve.xs[0]).op in args.ops:
            found.append(sweep(curve, args, device))
            save()
            print("\n" + sweep_table(found[-1]), flush=True)
