"""Seconds a call: the clock, and rounds in which the providers of a case take turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from .case import Inputs, Provider, on_backend

MIN_ROUNDS, MAX_ROUNDS, MIN_SLOW_ROUNDS = 7, 31, 3
MIN_SAMPLE_SECONDS, MAX_CALLS = 0.02, 200  # a sample repeats a call for so long, or so often
SLOW_SECONDS = 0.3
FLUSH_BYTES = 2**28  # more than any L2 holds


class Clock:
    """Seconds a call, of `calls` calls in a row: wall time on the CPU, events around each call on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        # Filling it also keeps the device busy while the host launches, for about a tenth of a millisecond: a call that
        # the host needs longer to launch is charged with the gaps.
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object], calls: int) -> float:
        if self.cuda:
            return self._cuda(run, calls)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def _cuda(self, run: Callable[[], object], calls: int) -> float:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, end in pairs:
            self.flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3


def quantile(samples: list[float], q: float) -> float:
    """Between the two nearest, in proportion; of one sample itself."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def interleave(
    providers: dict[str, Provider],
    inputs: Inputs,
    clock: Callable[[Callable[[], object], int], float],
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """({name: samples}, {name: calls a sample}) of min_rounds to 31 interleaved rounds.

    Providers share the time equally. One whose call lasts over SLOW_SECONDS sits rounds out, evenly, down to 3 samples
    (or min_rounds, where that is fewer). A sample starts with an untimed call: with a 311 MB gradient a call took
    0.15 s in memory that the same provider had just freed, and mostly 0.7 to 0.9 s in memory that another had (a
    virtual machine, 1 thread).
    """

    def sample(provider: Provider, calls: int) -> float:
        with on_backend(provider):
            provider.run(**inputs)
            return clock(lambda: provider.run(**inputs), calls)

    once = {name: sample(provider, 1) for name, provider in providers.items()}
    calls = {name: min(MAX_CALLS, math.ceil(MIN_SAMPLE_SECONDS / t)) for name, t in once.items()}
    share = seconds / len(providers)
    fits = {name: int(share / ((calls[name] + 1) * t)) for name, t in once.items()}
    rounds = min(MAX_ROUNDS, max(min_rounds, *fits.values()))
    fewest = min(MIN_SLOW_ROUNDS, min_rounds)
    slow = {name for name, t in once.items() if t > SLOW_SECONDS}
    stride = {name: max(1, rounds // max(fewest, fits[name])) if name in slow else 1 for name in providers}
    samples: dict[str, list[float]] = {name: [] for name in providers}
    deadline = time.perf_counter() + 2 * seconds  # a machine that became busy does not keep us for long
    for i in range(rounds):
        enough = i >= min_rounds and min(map(len, samples.values())) >= fewest
        if enough and time.perf_counter() > deadline:
            break
        for name, provider in providers.items():
            if i % stride[name] == 0:
                samples[name].append(sample(provider, calls[name]))
    return samples, calls
