"""The static analysis of the GPU kernels: occupancy against known figures, the reader of disassemblies on code whose
answer is known, and a table that names the kernels there are."""

import re
import shutil

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton")
import triton
import triton.language as tl

from benchmarks import launches, static
from benchmarks.aot import Launch
from benchmarks.occupancy import occupancy
from benchmarks.roofline import MACHINE, limits
from benchmarks.sass import kernels

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
compiles = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "share", "limit"),
    [
        ("sm_80", 128, 37, 0, 12, 0.75, "registers"),  # these two from the CUDA C++ Best Practices Guide, "Occupancy"
        ("sm_80", 320, 37, 0, 4, 0.625, "registers"),
        ("sm_90", 256, 32, 0, 8, 1.0, "registers"),
        ("sm_90", 256, 255, 0, 1, 0.125, "registers"),
        ("sm_90", 32, 16, 0, 32, 0.5, "blocks"),
        ("sm_90", 1024, 32, 100 * 1024, 2, 1.0, "registers"),
        ("sm_90", 256, 32, 100 * 1024, 2, 0.25, "shared memory"),
        ("sm_80", 256, 32, 100 * 1024, 1, 0.125, "shared memory"),
    ],
)
def test_occupancy(arch, threads, registers, shared, blocks, share, limit):
    found = occupancy(arch, threads, registers, shared)
    assert (found.blocks, found.share, found.limit) == (blocks, share, limit)


def disassembly(*lines: str) -> str:
    body = "\n".join(line if line.endswith(":") else f"        /*{i:04x}*/ {line} ;" for i, line in enumerate(lines))
    return f".text.example:\n{body}\n"


def test_a_pass_takes_the_wide_way_and_no_contradiction():
    """The second branch asks what the first has decided, and a load under the other answer moves nothing."""
    (kernel,) = kernels(
        disassembly(
            "LDG.E R9, [R8]",
            ".L_x_0:",
            "ISETP.GE.AND P2, PT, R1, R2, PT",
            "@P2 LDG.E.128 R4, [R2.64]",
            "@P2 BRA `(.L_x_1)",
            "LDG.E.U16 R4, [R2.64]",
            "LDG.E.U16 R5, [R2.64+0x2]",
            ".L_x_1:",
            "@P2 BRA `(.L_x_2)",
            "DADD R6, R6, R4",
            ".L_x_2:",
            "MUFU.EX2 R7, R7",
            "STG.E.64 [R10.64], R6",
            "@!P0 BRA `(.L_x_3)",
            "FSETP.GT.AND P1, PT, R1, R2, PT",
            ".L_x_3:",
            "@P3 BRA `(.L_x_0)",
            "EXIT",
        )
    )
    ((fewest, most),) = kernel.loops
    assert not kernel.whole and len(kernel.instructions) == 14
    assert dict(fewest.loads) == dict(most.loads) == {16: 1} and dict(fewest.stores) == {8: 1}
    assert (fewest.instructions, most.instructions) == (8, 9)
    assert (most.bytes, most.branches, most.pipes["sfu"], most.pipes["fp64"], most.pipes["alu"]) == (24, 4, 1, 0, 2)


def test_roofline():
    assert MACHINE.instructions_a_byte == pytest.approx(132 * 4 * 32 * 1.8e9 / 4.8e12)
    (kernel,) = kernels(
        disassembly(".L_x_0:", "LDG.E.128 R4, [R2.64]", *["FADD R4, R4, R5"] * 14, "@P0 BRA `(.L_x_0)", "EXIT")
    )
    ((one, _),) = kernel.loops
    assert limits(one)["issue"] == pytest.approx(1 / MACHINE.instructions_a_byte)


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        tl.store(out + start + tl.arange(0, BLOCK), tl.load(x + start + tl.arange(0, BLOCK)))


@compiles
@pytest.mark.parametrize(("aligned", "width"), [((0, 1), 16), ((1,), 2)])
def test_widths_of_a_compiled_kernel(aligned, width):
    signature = {"x": "*bf16", "out": "*bf16", "n": "i32", "BLOCK": "constexpr"}
    launch = Launch(copy_kernel, signature, {"BLOCK": 1024}, aligned, {"num_warps": 4})
    found = static.triton_subject(launch, "")
    ((one, _),) = found.code.loops
    assert set(one.loads) == {width} and set(one.stores) == {16} and one.loaded % 16 == 0
    assert found.threads == 128 and found.used["sm_90"].registers > 8 and not found.used["sm_90"].spills


@compiles
def test_the_loops_over_the_vocabulary_are_bound_by_memory():
    """The usual pass issues in less time than an H200 takes for its bytes, and enough of them are in flight."""
    for launch in launches.row_launches(**launches.ROWS["bf16"]):
        found = static.triton_subject(launch, "")
        ((fewest, _),) = found.code.loops
        assert max(limits(fewest).values()) < 1, (launch.name, limits(fewest))
        resident = occupancy("sm_90", found.threads, found.used["sm_90"].registers, found.used["sm_90"].shared)
        assert 32 * resident.warps * fewest.loaded > MACHINE.bytes_in_flight, launch.name
        assert found.wide_offsets


@needs_nvcc
def test_the_scan_in_cuda():
    used, cubin = static.compile_cuda(ROOT / "csrc/cuda/gae.cu", "sm_90")
    codes = {static.demangled(code.name): code for code in kernels(static.disassemble(cubin))}
    assert {static.demangled(name) for name in used} == set(codes)
    ((one, _),) = codes["gae_kernel", "256, false, float"].loops
    assert one.loads[16] == 2 and one.stores[16] == 2 and not one.local and not one.pipes["fp64"]
    assert one.pipes["shared"] and one.barriers == 2


def test_the_table_names_every_kernel():
    written = {f"`triton/{module.rpartition('.')[2]}.py` {name}" for module, name in launches.written_kernels()}
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        found = re.findall(r"__global__ void __launch_bounds__\([^\n]*\)\s+(\w+)\(", source.read_text())
        written |= {f"`cuda/{source.name}` {name}" for name in found}
    text = (ROOT / "benchmarks/results/static.md").read_text()
    named = set(re.findall(r"^\| (`(?:triton|cuda)/\S+` \w+) \|", text, re.M))
    assert named == written, "run python -m benchmarks.static"


def test_the_subjects_are_every_call():
    labels = [label for label, _ in static.triton_calls()]
    assert len(labels) == len(set(labels)) and set(launches.token_calls(torch.float32)) <= set(labels)
    reached = {(x.kernel.fn.__module__, x.name) for _, launched in static.triton_calls() for x in launched}
    assert reached == launches.written_kernels()
