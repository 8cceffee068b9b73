"""Errors against float64, and the battery that an op passes before it is timed."""

from __future__ import annotations

import torch

from rlhf_kernels import testing

from .case import EAGER, Case, Inputs, Outputs

CHECKS = ("error_budget", "masked_nan")
MAX_ELEMENTS = 20_000  # of a battery case's inputs: the small ones, of every kind, in a second or two


def truth(case: Case, inputs: Inputs) -> Outputs:
    """The eager code on float64 inputs, on the leading rows if the case says so."""
    rows = {name: x[: case.truth_rows] if case.truth_rows else x for name, x in inputs.items()}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in rows.items()}
    return case.comparable((case.exact or case.providers[EAGER].run)(**exact))


def max_abs_error(outputs: Outputs, exact: Outputs) -> dict[str, float]:
    """Per output that both have; outputs with more rows than the truth are judged on its rows."""
    return {
        name: (outputs[name][: len(want)] if want.dim() else outputs[name]).double().sub(want).abs().max().item()
        for name, want in exact.items()
        if name in outputs
    }


def refusal(op: str, backends: list[str | None], device: torch.device) -> str | None:
    """Why an op is not to be timed here: the first failure of its battery on these backends (None: the default)."""
    small = [case for case in testing.cases(op) if sum(x.numel() for x in case.inputs().values()) <= MAX_ELEMENTS]
    for backend in backends:
        for case in small:
            try:
                testing.run_battery(case, backend, device.type, checks=CHECKS)
            except Exception as error:  # a kernel that raises is as red as one that is wrong
                return first_line(error)
    return None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]
