"""What a case is: an op at a size, and everybody who computes it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels

Inputs = dict[str, Tensor]
Outputs = dict[str, Any]  # of tensors, where Case.comparable does not turn them into tensors
OURS, EAGER = "ours", "eager"
NOT_INSTALLED = "is not installed"


@dataclass(frozen=True)
class Provider:
    """One implementation: a function of the case's inputs by name to its outputs by name."""

    what: str
    run: Callable[..., Outputs]
    backend: str | None = None  # of our ops while it runs; None is the dispatcher's choice
    judged: bool = True  # False: it computes a part, whose time is of interest
    package: str | None = None  # that it is imported from, of another project
    needs_cuda: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} {NOT_INSTALLED}"
        return "its kernels need a GPU" if self.needs_cuda and device.type != "cuda" else None


@dataclass(frozen=True)
class Case:
    """One line of the benchmark."""

    op: str
    mode: str  # "forward" or "forward+backward"
    sizes: dict[str, int]  # by name, as {"tokens": 512, "vocabulary": 151936}
    dtype: torch.dtype
    inputs: Callable[[], Inputs]
    providers: dict[str, Provider]  # has "ours" and "eager"; eager in float64 is the truth
    bytes_moved: int
    variant: str = ""  # what the op computes here, where it has several cases of a size
    flops: int = 0  # of the matrix products that the results need
    truth_rows: int | None = None  # only where rows are independent of each other
    comparable: Callable[[Outputs], Outputs] = dict  # outputs as the error compares them; untimed
    exact: Callable[..., Outputs] | None = None  # eager in less memory, for float64 at sizes where eager does not fit

    @property
    def key(self) -> str:
        """Names the case in tables and between files."""
        dtype = str(self.dtype).removeprefix("torch.")
        return key_of(self.op, self.variant, self.mode, list(self.sizes.values()), dtype)


def key_of(op: str, variant: str, mode: str, shape: list[int], dtype: str) -> str:
    return " ".join(filter(None, (op, variant, mode, str(shape), dtype)))


def response_mask(
    batch: int,
    length: int,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:  # (batch, length) bool
    """Right-padded responses of uniform length in [length / 2, length]: the layout that every peer handles."""
    lengths = torch.randint(length // 2, length + 1, (batch, 1), device=device, generator=generator)
    return torch.arange(length, device=device) < lengths


def masked(outputs: Outputs) -> Outputs:
    """Zeros under the mask, where a provider gives it."""
    mask = outputs.get("mask")
    return outputs if mask is None else {name: x * mask for name, x in outputs.items() if name != "mask"}


def compiled(forward: Callable, dynamic: bool | None = False) -> Callable:
    """torch.compile: one graph, shapes known, no CUDA graphs. A sweep over sizes passes None and compiles twice."""
    return torch.compile(forward, fullgraph=True, dynamic=dynamic)


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
