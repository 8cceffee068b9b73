"""What a case is, and how its providers are timed, weighed and judged."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels

Inputs = dict[str, Tensor]
Outputs = dict[str, Any]  # of tensors, where Case.comparable does not turn them into tensors
COPY_BYTES = 2**28
MIN_ROUNDS, MAX_ROUNDS, MIN_SLOW_ROUNDS = 7, 31, 3
MIN_SAMPLE_SECONDS, MAX_CALLS = 0.02, 200  # a sample repeats a call for so long, or so often
SLOW_SECONDS = 1.0
OURS, EAGER, COPY = "ours", "eager", "copy"


@dataclass(frozen=True)
class Provider:
    """One implementation: a function of the case's inputs by name to its outputs by name."""

    what: str
    run: Callable[..., Outputs]
    backend: str | None = None  # of our ops while it runs; None is the dispatcher's choice
    judged: bool = True  # False: it computes a part, whose time is of interest


@dataclass(frozen=True)
class Case:
    """One line of the benchmark: an op at a size, with everybody who computes it."""

    op: str
    mode: str  # "forward" or "forward+backward"
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[[], Inputs]
    providers: dict[str, Provider]  # has "ours" and "eager"; eager in float64 is the truth
    bytes_moved: int
    truth_rows: int | None = None  # only where rows are independent of each other
    comparable: Callable[[Outputs], Outputs] = dict  # outputs as the error compares them; untimed


@dataclass(frozen=True)
class Measurement:
    """One provider in one case; the fields are explained in the package's docstring."""

    what: str
    samples_s: list[float]
    calls: int
    median_s: float
    iqr_s: float
    gb_per_s: float
    fraction_of_copy: float
    peak_bytes: int
    max_abs_error: dict[str, float]


@dataclass(frozen=True)
class Result:
    """One case, measured; the fields are explained in the package's docstring."""

    op: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    backend: str
    bytes_moved: int
    copy_gb_per_s: float
    truth_rows: int | None
    load_average: float
    providers: dict[str, Measurement]
    speedup: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)


def response_mask(
    batch: int,
    length: int,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:  # (batch, length) bool
    """Right-padded responses of uniform length in [length / 2, length]: the layout that every peer handles."""
    lengths = torch.randint(length // 2, length + 1, (batch, 1), device=device, generator=generator)
    return torch.arange(length, device=device) < lengths


def compiled(forward: Callable) -> Callable:
    """torch.compile at its best: one graph, shapes known."""
    return torch.compile(forward, fullgraph=True, dynamic=False)


def with_backward(
    forward: Callable[..., Outputs],
    wrt: tuple[str, ...],  # inputs
    through: tuple[str, ...],  # outputs; the upstream gradient of x is the input grad_x, 1 where there is none
) -> Callable[..., Outputs]:
    """Outputs of `forward`, and the gradient of each input in `wrt` under the name d_<input>."""

    def run(**inputs: Tensor) -> Outputs:
        upstream = [inputs.pop(f"grad_{name}", None) for name in through]
        leaves = {name: inputs.pop(name).detach().requires_grad_() for name in wrt}
        with torch.enable_grad():
            outputs = forward(**inputs, **leaves)
            gradients = torch.autograd.grad([outputs[name] for name in through], list(leaves.values()), upstream)
        return {**outputs, **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}}

    return run


class Clock:
    """Seconds a call, of `calls` calls in a row: wall time on the CPU, events around each call on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        # More than any L2 holds. Filling it also keeps the device busy while the host launches: short ops are timed on
        # the device, not by their launch.
        self.flush = torch.empty(COPY_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

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


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory that torch had allocated while `run` ran, over what it had before: exact and the same in every run.

    On the CPU the profiler logs every allocation. What a kernel takes from malloc itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        torch.cuda.synchronize()
        del outputs
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        outputs = run()
    del outputs
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def truth(case: Case, inputs: Inputs) -> Outputs:
    """The eager code on float64 inputs, on the leading rows if the case says so."""
    rows = {name: x[: case.truth_rows] if case.truth_rows else x for name, x in inputs.items()}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in rows.items()}
    return case.comparable(case.providers[EAGER].run(**exact))


def max_abs_error(outputs: Outputs, exact: Outputs) -> dict[str, float]:
    """Per output; outputs with more rows than the truth are judged on its rows."""
    return {
        name: (outputs[name][: len(want)] if want.dim() else outputs[name]).double().sub(want).abs().max().item()
        for name, want in exact.items()
    }


def with_other_backends(case: Case, device: torch.device) -> dict[str, Provider]:
    """The providers of a case, and ours again on every other backend that has the op on this device."""
    providers, mine = dict(case.providers), rlhf_kernels.backends()
    for name in ("reference", "triton") if device.type == "cuda" else ("reference",):
        if name in mine.unavailable or name == mine.ops[case.op][device.type]:
            continue
        with rlhf_kernels.backend(name):
            if rlhf_kernels.backends().ops[case.op][device.type] == name:
                providers[name] = Provider(f"ours on the {name} backend", case.providers[OURS].run, name)
    return providers


def on_backend(provider: Provider) -> contextlib.AbstractContextManager:
    return rlhf_kernels.backend(provider.backend) if provider.backend else contextlib.nullcontext()


def _warm_up(
    case: Case,
    providers: dict[str, Provider],
    inputs: Inputs,
    device: torch.device,
) -> tuple[dict[str, dict[str, float]], dict[str, int], dict[str, str]]:
    """({provider: errors}, {provider: peak bytes}, {provider: why it cannot run}); ours and eager must run."""
    exact = truth(case, inputs)
    errors, peaks, failed = {}, {}, {}
    for name, provider in providers.items():
        try:
            with on_backend(provider):
                outputs = case.comparable(provider.run(**inputs))
                errors[name] = max_abs_error(outputs, exact) if provider.judged else {}
                del outputs
                peaks[name] = peak_bytes(lambda provider=provider: provider.run(**inputs), device)
        except Exception as error:  # a rival's compiler or memory fails in ways of its own; the report says so
            if name in (OURS, EAGER):
                raise
            failed[name] = f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]
    return errors, peaks, failed


def _copier(device: torch.device) -> Provider:
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.ones_like(source)
    return Provider("copy_ of 256 MiB", lambda **_: {"target": target.copy_(source)})


def interleave(
    providers: dict[str, Provider],
    inputs: Inputs,
    clock: Clock,
    seconds: float,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """({name: samples}, {name: calls a sample}) of 7 to 31 interleaved rounds.

    Providers share the time equally. One whose sample lasts over a second sits rounds out, evenly, down to 3 samples.
    A sample starts with an untimed call: with a 311 MB gradient a call took 0.15 s in memory that the same provider had
    just freed, and mostly 0.7 to 0.9 s in memory that another had (a virtual machine, 1 thread).
    """

    def sample(provider: Provider, calls: int) -> float:
        with on_backend(provider):
            provider.run(**inputs)
            return clock(lambda: provider.run(**inputs), calls)

    once = {name: sample(provider, 1) for name, provider in providers.items()}
    calls = {name: min(MAX_CALLS, math.ceil(MIN_SAMPLE_SECONDS / t)) for name, t in once.items()}
    share = seconds / len(providers)
    fits = {name: int(share / ((calls[name] + 1) * t)) for name, t in once.items()}
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, *fits.values()))
    slow = {name for name, t in once.items() if t > SLOW_SECONDS}
    stride = {name: max(1, rounds // max(MIN_SLOW_ROUNDS, fits[name])) if name in slow else 1 for name in providers}
    samples: dict[str, list[float]] = {name: [] for name in providers}
    deadline = time.perf_counter() + 2 * seconds  # a machine that became busy does not keep us for long
    for i in range(rounds):
        enough = i >= MIN_ROUNDS and min(map(len, samples.values())) >= MIN_SLOW_ROUNDS
        if enough and time.perf_counter() > deadline:
            break
        for name, provider in providers.items():
            if i % stride[name] == 0:
                samples[name].append(sample(provider, calls[name]))
    return samples, calls


def measure(
    case: Case,
    device: torch.device,
    seconds: float,  # of timing; warm-up and compilation come on top
    only: list[str] | None = None,  # providers; eager says what is true all the same
) -> Result:
    """Runs one case. Raises what ours or eager raise; other providers that fail are reported in `failed`."""
    torch._dynamo.reset()
    inputs = case.inputs()
    providers = {name: p for name, p in with_other_backends(case, device).items() if only is None or name in only}
    with torch.no_grad():  # the providers of "forward+backward" switch gradients on
        errors, peaks, failed = _warm_up(case, providers, inputs, device)
        running = {name: providers[name] for name in errors}
        samples, calls = interleave({**running, COPY: _copier(device)}, inputs, Clock(device), seconds)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    copy_rate = 2 * COPY_BYTES / medians[COPY] / 1e9
    measurements = {}
    for name, provider in running.items():
        low, _, high = statistics.quantiles(samples[name], n=4, method="inclusive")
        rate = case.bytes_moved / medians[name] / 1e9
        measurements[name] = Measurement(
            what=provider.what,
            samples_s=samples[name],
            calls=calls[name],
            median_s=medians[name],
            iqr_s=high - low,
            gb_per_s=rate,
            fraction_of_copy=rate / copy_rate,
            peak_bytes=peaks[name],
            max_abs_error=errors[name],
        )
    return Result(
        op=case.op,
        mode=case.mode,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        backend=rlhf_kernels.backends().ops[case.op][device.type],
        bytes_moved=case.bytes_moved,
        copy_gb_per_s=copy_rate,
        truth_rows=case.truth_rows,
        load_average=os.getloadavg()[0],
        providers=measurements,
        speedup={name: medians[name] / medians[OURS] for name in running if name != OURS and OURS in running},
        failed=failed,
    )
