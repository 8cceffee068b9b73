"""What a call allocates, dispatches, launches and waits for. Exact: the same in every run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunch", "cuLaunch", "hipLaunch", "hipModuleLaunch", "hipExtLaunch", "hipExtModuleLaunch")
# The profiler itself ends with cudaDeviceSynchronize, so that one tells nothing.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "hipStreamSynchronize", "hipEventSynchronize")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim")


@dataclass(frozen=True)
class Counts:
    peak_bytes: int  # most memory that torch had allocated during the call, over its inputs; results included
    ops: int  # operators that went through the dispatcher, those inside others too; compiled code calls few
    launches: int | None  # of kernels, on CUDA
    host_syncs: int  # waits for a stream on CUDA; on a CPU the operators that would have to wait on a device


def count(run: Callable[[], object], device: torch.device) -> Counts:
    """Of one call, which should not be the first.

    On the CPU the profiler logs every allocation of torch. What a kernel takes from malloc itself is not seen.
    """
    cuda = device.type == "cuda"
    peak = _peak_on_device(run) if cuda else 0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=not cuda) as profiled:
        outputs = run()
        if cuda:
            torch.cuda.synchronize()
    del outputs
    events = list(profiled.profiler.kineto_results.events())
    names = [event.name() for event in events]
    if not cuda:
        changes = (event.nbytes() for event, name in zip(events, names) if name == "[memory]")
        peak = max(itertools.accumulate(changes, initial=0))
    return Counts(
        peak_bytes=peak,
        ops=sum("::" in name and not name.startswith("autograd::") for name in names),
        launches=sum(name.startswith(LAUNCHES) for name in names) if cuda else None,
        host_syncs=sum(name.startswith(WAITS) for name in names) if cuda else sum(name in READS for name in names),
    )


def _peak_on_device(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    del outputs
    return torch.cuda.max_memory_allocated() - before
