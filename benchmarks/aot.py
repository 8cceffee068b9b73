"""Ahead-of-time compilation of the Triton kernels without a GPU: exactly what the launchers would launch.

`recorded_launches` runs the real launchers on CPU tensors with the launch itself replaced by a recorder, so that
argument types, None arguments, specialisations (1, and multiples of 16) and warps are the launcher's own.
`compile_launch` builds one for a target, and `resources` reads registers, spills and load widths from the result.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass, field

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

NVIDIA = ("cuda:80", "cuda:90", "cuda:100")
AMD = "hip:gfx942"


@dataclass(frozen=True)
class Launch:
    """A kernel launch: types of its arguments, what is fixed at compile time, which arguments are multiples of 16."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[int, ...]
    options: dict[str, object] = field(compare=False)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def _describe(parameter, value) -> tuple[str, bool]:
    """(type in Triton's words, whether it is a multiple of 16), by the rules of triton.runtime.jit."""
    if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if parameter.annotation_type:
        return parameter.annotation_type, False
    if isinstance(value, torch.Tensor):
        return mangle_type(value), value.data_ptr() % 16 == 0
    return mangle_type(value), isinstance(value, int) and value % 16 == 0


@contextlib.contextmanager
def recorded_launches():
    """Yields a list that fills with the launches of the block; nothing runs."""
    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **meta):
        options = {name: meta.pop(name) for name in ("num_warps", "enable_fp_fusion") if name in meta}
        values = {**dict(zip(kernel.arg_names, args)), **meta}
        types = {p.name: _describe(p, values[p.name]) for p in kernel.params}
        signature = {name: kind for name, (kind, _) in types.items()}
        constants = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
        aligned = tuple(i for i, (_, multiple) in enumerate(types.values()) if multiple)
        launches.append(Launch(kernel, signature, constants, aligned, options))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, target: str):
    """(compiled kernel, what the assembler reported on NVIDIA); `target` is cuda:90 or hip:gfx942."""
    kind, _, arch = target.partition(":")
    gpu = GPUTarget(kind, int(arch), 32) if kind == "cuda" else GPUTarget(kind, arch, 64)
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    # CompiledKernel tells spills only where a driver is, and cuobjdump reports none: the assembler's log does.
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        return triton.compile(source, target=gpu, options=launch.options), log.getvalue()


@dataclass(frozen=True)
class Resources:
    registers: int
    spills: int  # to memory: bytes on NVIDIA, registers on AMD
    scalar_spills: int  # AMD alone: scalar registers kept in lanes of vector registers
    wide_loads: int  # instructions that load 16 bytes
    wide_stores: int


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in:\n{text[:2000]}"
    return int(found[1])


def resources(compiled, report: str) -> Resources:
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills, scalar = (
            _number(rf"\.{n}_count:\s*(\d+)", text) for n in ("vgpr", "vgpr_spill", "sgpr_spill")
        )
        loads, stores = (_count(rf"(?:global|buffer)_{kind}_dwordx4", text) for kind in ("load", "store"))
        return Resources(registers, spills, scalar, loads, stores)
    loads, stores = (
        _count(rf"{kind}\.global[\w.:]*\.(?:v4\.[bfu]32|v2\.[bfu]64)", compiled.asm["ptx"]) for kind in ("ld", "st")
    )
    spills = _number(r"(\d+) bytes spill stores", report) + _number(r"(\d+) bytes spill loads", report)
    return Resources(_number(r"Used (\d+) registers", report), spills, 0, loads, stores)
