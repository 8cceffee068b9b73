"""`make bench-check`: no op became slower against eager than it was. Not part of `make test`.

regressions.py says what is judged, and what keeps noise from failing it. pytest-benchmark shows the times of ours, and
stores and compares them if asked to (--benchmark-autosave, --benchmark-compare).
"""

from __future__ import annotations

import os

import pytest
import torch

import rlhf_kernels
from benchmarks import regressions, report
from benchmarks.__main__ import OPS
from benchmarks.case import OURS

CPU = torch.device("cpu")
CASES = [case for op in OPS for case in regressions.checked_cases(op, CPU)]


@pytest.fixture(scope="module")
def machine():
    """One thread: what other programs take from a second one would be noise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield f"{report.cpu_model()}, {rlhf_kernels.backends().cpu_isa}, 1 thread"
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=[case.key for case in CASES])
def test_ours_is_no_slower_against_eager_than_it_was(case, benchmark, machine):
    if benchmark.disabled:
        pytest.skip("timings belong to `make bench-check`")
    stored = regressions.load(machine).get(case.key)
    if stored is None and not os.environ.get("STORE_RATIOS"):
        pytest.fail(
            f"no ratio of {machine}: `make bench-check STORE=1` stores what the ops are like now", pytrace=False
        )
    if stored is None:
        ratio = regressions.measured(case, CPU)
        regressions.store(machine, case.key, ratio)
        slower, found = False, [ratio]
    else:
        slower, found = regressions.check(stored, lambda: regressions.measured(case, CPU))
    benchmark.extra_info["ours over eager"] = found[-1].p50
    inputs, ours = case.inputs(), case.providers[OURS].run
    with torch.no_grad():
        benchmark.pedantic(ours, kwargs=inputs, rounds=3, warmup_rounds=1)
    assert not slower, f"{case.key}: ours over eager was {stored}, now {found}"
