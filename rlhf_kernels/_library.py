"""The one file that touches torch.library: an op is defined once here and the dispatcher picks its kernel.

An op has one schema, one fake, one autograd formula and up to four kernels:

    reference   plain torch, any device; the specification of the op and the oracle of its tests
    cpu         C++ from _C_cpu.so, registered under the key CPU
    triton      from rlhf_kernels/triton, registered under the key CUDA (NVIDIA and AMD)
    cuda        CUDA C++ from _C_cuda.so, registered under the key CUDA, where it replaces Triton

Libraries are loaded before Python kernels are registered, because the last registration for a key wins and one from a
library is not seen by `allow_override=False`. `backend(name)` registers on top and takes its registrations back.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

NAMESPACE = "rlhf_kernels"
BACKENDS = ("reference", "cpu", "triton", "cuda")
_FOLDER = Path(__file__).parent
_DEVICE_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_INVALID = "invalid value: "  # what a kernel's message starts with when the caller's data is at fault


@dataclass(frozen=True)
class Op:
    """One op: its overload and its reference; `kernel` says what serves it where no backend registered a kernel, and
    `composite` that autograd and the compiler see through it."""

    overload: torch._ops.OpOverload
    reference: Callable
    composite: bool = False
    kernel: str = "reference"


OPS: dict[str, Op] = {}
_library = torch.library.Library(NAMESPACE, "DEF")
_override: torch.library.Library | None = None  # registrations of the active `backend(name)`
_active: str | None = None
_failures: dict[str, str] = {}  # backend -> why it is not available
_served: dict[tuple[str, str], str] = {}  # (op, device) -> backend that registered a kernel


def define(
    schema: str,  # "name(Tensor x, ...) -> Tensor"
    reference: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    kernel: str = "reference",  # what the reference is, where it is the kernel by decision
) -> torch._ops.OpOverload:
    """Defines an op with kernels. Without `backward` it is not differentiable, on any backend: the reference runs
    under no_grad."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if backward is None:
        reference = torch.no_grad()(reference)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if backward is None:
        # Without this the dispatcher's fallback marks outputs as requiring a gradient that nothing can give.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)
    overload = getattr(torch.ops.rlhf_kernels, name).default
    OPS[name] = Op(overload, reference, kernel=kernel)
    return overload


def define_composite(schema: str, reference: Callable) -> torch._ops.OpOverload:
    """Defines an op whose reference is its only kernel: autograd and the compiler see through it, so small vectors
    fuse with their neighbours."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeImplicitAutograd")
    overload = getattr(torch.ops.rlhf_kernels, name).default
    OPS[name] = Op(overload, reference, composite=True, kernel="torch (by design)")
    return overload


def call(op: torch._ops.OpOverload, *args):
    """Calls an op; a kernel's complaint about the caller's data (an id out of range) comes back as ValueError."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        _, found, text = str(error).partition(_INVALID)
        if not found:
            raise
        raise ValueError(text.strip().partition("\n")[0]) from None


def once_differentiable(op: str) -> None:
    """For the top of a backward: a kernel forms the gradient, so under create_graph it would be a silent constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} is differentiable once: create_graph=True would treat its gradient as a constant")


def invalid(text: str) -> RuntimeError:
    """What a reference kernel raises over the caller's data, as the C++ kernels do; `call` turns it into ValueError."""
    return RuntimeError(_INVALID + text)


def _reason(error: BaseException) -> str:
    """The innermost message: torch.ops.load_library hides the linker's words in __cause__."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return str(error).strip().replace("\n", " ")[:400]


def _build_record(library: str) -> str:
    """Why a library is not in the package, from the record that the build left."""
    try:
        record = json.loads((_FOLDER / "_build.json").read_text())[library]
    except (OSError, KeyError, ValueError):
        return "not built: install with a C++ compiler on PATH, for example `pip install .`"
    return f"not built: {record.get('reason', 'the file is missing')}"


def _load(backend: str, library: str) -> None:
    """Loads _C_cpu.so or _C_cuda.so and notes which ops it serves, or why it does not."""
    path, device = _FOLDER / f"{library}.so", backend
    if not path.exists():
        _failures[backend] = _build_record(library)
        return
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        _failures[backend] = f"{path.name} does not load: {_reason(error)}"
        return
    for name in OPS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", _DEVICE_KEYS[device]):
            _served[name, device] = backend
    if backend not in _served.values():
        _failures[backend] = f"{path.name} loads but holds no kernel: build it again"


def triton_kernels() -> dict[str, Callable]:
    """Launchers by op name; each takes the arguments of its op's schema."""
    return importlib.import_module(f"{NAMESPACE}.triton").KERNELS


def load_kernels() -> None:
    """Loads every library that this machine can use; called once, after all ops are defined."""
    _load("cpu", "_C_cpu")
    gpu = torch.cuda.is_available()
    if not gpu:
        _failures["cuda"] = (
            _build_record("_C_cuda")
            if not (_FOLDER / "_C_cuda.so").exists()
            else "built, but torch sees no CUDA device"
        )
    elif torch.version.cuda is None:
        _failures["cuda"] = "torch is built for ROCm, where the Triton kernels run"
    else:
        _load("cuda", "_C_cuda")
    if importlib.util.find_spec("triton") is None:
        _failures["triton"] = "triton is not installed: pip install triton"
    elif gpu:
        _register_triton()
    elif os.environ.get("TRITON_INTERPRET") != "1":
        _failures["triton"] = "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    requested = os.environ.get("RLHF_KERNELS_BACKEND")
    if requested:
        _select(requested)


def _register_triton() -> None:
    """Serves with Triton what no CUDA C++ kernel serves; another release of Triton may refuse our kernels at import."""
    try:
        kernels = triton_kernels()
    except Exception as error:
        _failures["triton"] = f"the kernels cannot be imported: {_reason(error)}"
        return
    for name, kernel in kernels.items():
        if (name, "cuda") not in _served:
            _library.impl(name, kernel, "CUDA")
            _served[name, "cuda"] = "triton"


def _registrations(name: str) -> Iterator[tuple[str, str, Callable]]:
    """(op, device, kernel) that forcing a backend puts on top of what is loaded."""
    if name == "reference":
        yield from ((op, device, OPS[op].reference) for op, device in _served)
    elif name == "triton":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield from ((op, device, kernel) for op, kernel in triton_kernels().items())


def _select(name: str | None) -> None:
    """Makes `name` the backend of every op that has it; None is the dispatcher's own choice."""
    global _override, _active
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name in _failures:
        raise RuntimeError(f"backend {name!r} was asked for and cannot load: {_failures[name]}")
    registrations = [] if name is None else list(_registrations(name))
    if _override is not None:
        _override._destroy()
    _override, _active = None, name
    if name is not None:
        _override = torch.library.Library(NAMESPACE, "IMPL")
        with warnings.catch_warnings():  # overriding is what was asked for
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid")
            for op, device, kernel in registrations:
                _override.impl(op, kernel, _DEVICE_KEYS[device])


def active() -> str | None:
    """The backend that was asked for, if any."""
    return _active


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the block with one backend: "reference", "cpu", "triton" or "cuda"; ops that lack it keep their own choice.

    For comparing and debugging: the choice is one for the whole process. Environment: RLHF_KERNELS_BACKEND sets it
    for a run. Raises RuntimeError, saying why, when that backend cannot load here.
    """
    previous = _active
    _select(name)
    try:
        yield
    finally:
        _select(previous)


@dataclass(frozen=True)
class Backends:
    """What `backends()` returns; printing it gives a table."""

    ops: dict[str, dict[str, str]]  # op -> device -> the backend that runs there
    unavailable: dict[str, str] = field(default_factory=dict)  # backend -> why it is not here
    cpu_isa: str | None = None  # the instruction set that the C++ kernels chose
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(map(len, self.ops))
        lines = [
            f"{op:<{width}}  " + "  ".join(f"{device}: {name}" for device, name in row.items())
            for op, row in self.ops.items()
        ]
        lines += [f"{name} is not available: {why}" for name, why in self.unavailable.items()]
        lines += [f"cpu instruction set: {self.cpu_isa}"] if self.cpu_isa else []
        return "\n".join([*lines, *self.notes])


def backends() -> Backends:
    """Which kernel serves each op on each device here, and why the other backends do not."""
    served = dict(_served)
    if _active is not None:
        served.update({(op, device): _active for op, device, _ in _registrations(_active)})
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    table = {name: {device: served.get((name, device), op.kernel) for device in devices} for name, op in OPS.items()}
    notes = ("No GPU has timed the Triton and CUDA kernels yet: benchmarks/results holds no GPU file.",)
    return Backends(table, dict(_failures), host_cpu_isa() if "cpu" not in _failures else None, notes)


def host_cpu_isa() -> str | None:
    """The instruction set in use ("baseline", "avx2", "avx512"), or None where the pybind11 module was not built."""
    try:
        from . import _host
    except ImportError:
        return None
    return _host.cpu_isa()
