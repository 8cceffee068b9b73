"""One case: its providers judged, weighed, timed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

import rlhf_kernels

from .accuracy import first_line, max_abs_error, truth
from .case import OURS, Case, Inputs, Provider, key_of, on_backend, with_other_backends
from .ceilings import COPY, COPY_BYTES, MATMUL, copier, multiplier
from .counts import Counts, count
from .timing import MIN_ROUNDS, Clock, interleave, quantile

DIGITS = 5  # of a sample in the file


@dataclass(frozen=True)
class Measurement:
    """One provider in one case; the fields are explained in the package's docstring."""

    what: str
    samples_s: list[float]
    calls: int
    p20_s: float
    median_s: float
    p80_s: float
    gb_per_s: float
    fraction_of_copy: float
    tflop_per_s: float | None
    fraction_of_matmul: float | None
    peak_bytes: int
    ops: int
    launches: int | None
    host_syncs: int
    max_abs_error: dict[str, float]


@dataclass(frozen=True)
class Result:
    """One case, measured; the fields are explained in the package's docstring."""

    op: str
    variant: str
    mode: str
    shape: list[int]
    sizes: dict[str, int]
    dtype: str
    backend: str
    bytes_moved: int
    flops: int
    input_bytes: int
    copy_gb_per_s: float
    matmul_tflop_per_s: float | None
    truth_rows: int | None
    load_average: float
    providers: dict[str, Measurement]
    speedup: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return key_of(self.op, self.variant, self.mode, self.shape, self.dtype)


def _warm_up(
    case: Case,
    providers: dict[str, Provider],
    inputs: Inputs,
    device: torch.device,
    judge: bool,
) -> tuple[dict[str, dict[str, float]], dict[str, Counts], dict[str, str]]:
    """({provider: errors}, {provider: counts}, {provider: why it cannot run}). Where errors are judged, ours must
    run."""
    exact = truth(case, inputs) if judge else {}
    errors, counts, failed = {}, {}, {}
    for name, provider in providers.items():
        if why := provider.missing(device):
            failed[name] = why
            continue
        try:
            with on_backend(provider):
                outputs = provider.run(**inputs)
                errors[name] = max_abs_error(case.comparable(outputs), exact) if judge and provider.judged else {}
                del outputs
                counts[name] = count(lambda provider=provider: provider.run(**inputs), device)
        except Exception as error:  # a rival's compiler or memory fails in ways of its own; the report says so
            if judge and name == OURS:
                raise
            failed[name] = first_line(error)
            errors.pop(name, None)
        if device.type == "cuda" and name in failed:
            torch.cuda.empty_cache()
    return errors, counts, failed


def measure(
    case: Case,
    device: torch.device,
    seconds: float,  # of timing; warm-up and compilation come on top
    only: list[str] | None = None,  # providers; eager says what is true all the same
    *,
    judge: bool = True,  # False: no errors against float64, and what ours raises is reported, too
    min_rounds: int = MIN_ROUNDS,
) -> Result:
    """Runs one case. Raises what ours raises, or the truth; other providers that fail are reported in `failed`."""
    inputs = case.inputs()
    everyone = with_other_backends(case, device) if judge else case.providers
    providers = {name: p for name, p in everyone.items() if only is None or name in only}
    with torch.no_grad():  # the providers of "forward+backward" switch gradients on
        errors, counts, failed = _warm_up(case, providers, inputs, device, judge)
        running = {name: providers[name] for name in errors}
        ceilings, product_flops = {COPY: copier(device)}, 0
        if case.flops:
            ceilings[MATMUL], product_flops = multiplier(device, case.dtype)
        samples, calls = interleave({**running, **ceilings}, inputs, Clock(device), seconds, min_rounds)
    samples = {name: [float(f"{s:.{DIGITS}g}") for s in times] for name, times in samples.items()}
    medians = {name: quantile(times, 0.5) for name, times in samples.items()}
    copy_rate = 2 * COPY_BYTES / medians[COPY] / 1e9
    matmul_rate = product_flops / medians[MATMUL] / 1e12 if case.flops else None
    found = {
        name: Measurement(
            what=provider.what,
            samples_s=samples[name],
            calls=calls[name],
            p20_s=quantile(samples[name], 0.2),
            median_s=medians[name],
            p80_s=quantile(samples[name], 0.8),
            gb_per_s=(rate := case.bytes_moved / medians[name] / 1e9),
            fraction_of_copy=rate / copy_rate,
            tflop_per_s=(flop_rate := case.flops / medians[name] / 1e12 if case.flops else None),
            fraction_of_matmul=flop_rate / matmul_rate if flop_rate else None,
            **vars(counts[name]),
            max_abs_error=errors[name],
        )
        for name, provider in running.items()
    }
    return Result(
        op=case.op,
        variant=case.variant,
        mode=case.mode,
        shape=list(case.sizes.values()),
        sizes=case.sizes,
        dtype=str(case.dtype).removeprefix("torch."),
        backend=rlhf_kernels.backends().ops[case.op][device.type],
        bytes_moved=case.bytes_moved,
        flops=case.flops,
        input_bytes=sum(x.nbytes for x in inputs.values()),
        copy_gb_per_s=copy_rate,
        matmul_tflop_per_s=matmul_rate,
        truth_rows=case.truth_rows,
        load_average=os.getloadavg()[0],
        providers=found,
        speedup={name: medians[name] / medians[OURS] for name in running if name != OURS and OURS in running},
        failed=failed,
    )
