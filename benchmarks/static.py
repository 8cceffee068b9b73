"""What can be said of the GPU kernels without a GPU, from the machine code that is launched.

    python -m benchmarks.static [--output benchmarks/results/static.md]

Every Triton kernel as its launcher launches it and every CUDA kernel is compiled for sm_80, sm_90 and sm_100, the sm_90
code is disassembled, and the passes through its loops are weighed against a roofline of an H200. Needs Triton for the
disassembler; the CUDA kernels are left out without nvcc, their launches are not counted without a C++ compiler.
Nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import launches as recorded
from .aot import NVIDIA, Launch, compile_launch, resources
from .occupancy import occupancy
from .roofline import limits, verdict
from .sass import Kernel, disassemble, kernels
from .static_text import TEXT, predictions

ROOT = Path(__file__).resolve().parent.parent
ARCHS = tuple(target.replace("cuda:", "sm_") for target in NVIDIA)
DETAIL = "sm_90"
ROW_CASES = {
    "bf16, V 128256": "bf16",
    "bf16, V 50257": "bf16_odd_vocab",
    "bf16, V 50257, a view": "bf16_odd_vocab_view",
    "fp32, V 32000": "fp32_view",
}
CUDA_BLOCK = 256  # threads of every kernel: csrc/cuda/layout.h
PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill "
    r"loads.*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
EMULATED = """
import ctypes, json, sys, torch, rlhf_kernels
from benchmarks.launches import token_calls
torch.ops.load_library(sys.argv[1])
launches, found = ctypes.c_int64.in_dll(ctypes.CDLL(sys.argv[1]), "emulated_launches"), {}
for label, (op, *arguments) in token_calls(torch.float32).items():
    before = launches.value
    getattr(torch.ops.rlhf_kernels, op)(*arguments)
    found[label] = launches.value - before
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Used:
    registers: int
    spills: int  # bytes
    shared: int  # bytes, static and dynamic


@dataclass(frozen=True)
class Subject:
    """A kernel as it is launched."""

    file: str
    kernel: str
    case: str
    threads: int
    used: dict[str, Used]  # by architecture
    code: Kernel  # on DETAIL
    wide_offsets: bool | None  # row or block offsets are formed in 64 bits; None where the kernel has none


def triton_calls() -> Iterator[tuple[str, list[Launch]]]:
    """(what is called, what it launches) of every Triton op."""
    rows, bf16 = recorded.ROWS, torch.bfloat16
    for label, case in ROW_CASES.items():
        yield f"token_logprobs and backward, {label}", recorded.row_launches(**rows[case])
    hidden = "ops on hidden states: gradient over bf16 logits, gradient of fp32 logits"
    yield hidden, recorded.tile_launches(**rows["bf16"])
    for label, case in list(ROW_CASES.items())[:3]:
        name = f"logits_kl and backward, reverse and forward KL, {label}"
        yield name, recorded.divergence_launches(**rows[case])
    yield from recorded.token_launches(torch.float32).items()
    yield "adamw_bf16_", recorded.adamw_launches(bf16, recorded.N, False)
    yield "adamw_bf16_, a size that is no multiple of 16", recorded.adamw_launches(bf16, recorded.N + 7, False)


def triton_subjects(calls) -> Iterator[Subject]:
    seen: list[Launch] = []
    for label, launched in calls:
        for launch in launched:
            if launch not in seen:
                seen.append(launch)
                yield triton_subject(launch, label)


def triton_subject(launch: Launch, case: str) -> Subject:
    used, code = {}, None
    for target, arch in zip(NVIDIA, ARCHS):
        compiled, report = compile_launch(launch, target)
        found = resources(compiled, report)
        used[arch] = Used(found.registers, found.spills, compiled.metadata.shared)
        if arch == DETAIL:
            (code,) = kernels(disassemble(compiled.asm["cubin"]))
            threads, text = 32 * compiled.metadata.num_warps, compiled.asm["ttir"]
    programs = set(re.findall(r"(%\w+) = tt.get_program_id x", text))
    multiplied = set(re.findall(r"arith\.muli (%\w+), %\w+ : i32", text))
    file = launch.kernel.fn.__module__.rpartition(".")[2]
    return Subject(f"triton/{file}.py", launch.name, case, threads, used, code, not programs & multiplied)


def cuda_subjects() -> Iterator[Subject]:
    """The float32 instances; those of float64 are the same source at twice the bytes."""
    if shutil.which("nvcc") is None:
        return
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        built = {arch: compile_cuda(source, arch) for arch in ARCHS}
        codes = {code.name: code for code in kernels(disassemble(built[DETAIL][1]))}
        for name in built[DETAIL][0]:
            base, arguments = demangled(name)
            if "double" not in arguments:
                used = {arch: next(u for n, u in found.items() if demangled(n) == (base, arguments))
                        for arch, (found, _) in built.items()}  # fmt: skip
                yield Subject(f"cuda/{source.name}", base, arguments, CUDA_BLOCK, used, codes[name], None)


def compile_cuda(source: Path, arch: str) -> tuple[dict[str, Used], bytes]:
    """(what ptxas reports of each kernel, the cubin), by the flags of setup.py."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", f"-arch={arch}", "-cubin"]
        log = subprocess.run([*command, source, "-o", cubin], capture_output=True, text=True, check=True).stderr
        found = {
            m["kernel"]: Used(int(m["registers"]), int(m["stores"]) + int(m["loads"]), int(m["shared"] or 0))
            for m in PTXAS.finditer(log)
        }
        return found, cubin.read_bytes()


def demangled(name: str) -> tuple[str, str]:
    """gae_kernel and 256, false, float."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    kernel, arguments = re.search(r"(\w+_kernel)<(.*?)>\(", text).groups()
    return kernel, re.sub(r"\(rlhf::cuda::\(anonymous namespace\)::(\w+)\)(\d+)", r"\1 \2", arguments)


def cuda_launches() -> dict[str, int]:
    """Launches of each call of token_calls, counted by the emulator of the tests, which runs the real wrappers."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        build = ["sh", ROOT / "tests/cuda_emulator/build.sh", folder, Path(torch.__file__).parent]
        subprocess.run(build, check=True, capture_output=True)
        command = [sys.executable, "-c", EMULATED, f"{folder}/libemulated.so"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RLHF_KERNELS_BACKEND": ""}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def tools() -> str:
    triton = f"Triton {importlib.metadata.version('triton')}"
    if shutil.which("nvcc") is None:
        return f"{triton}; the CUDA kernels are missing, for there was no nvcc"
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return f"{triton} and nvcc {re.search(r'release (.+),', version)[1]}"


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def resource_table(subjects: list[Subject]) -> str:
    rows = []
    for s in subjects:
        each = [s.used[arch] for arch in ARCHS]
        fits = [occupancy(arch, s.threads, s.used[arch].registers, s.used[arch].shared) for arch in ARCHS]
        rows.append([
            f"`{s.file}` {s.kernel}", s.case, s.threads, " / ".join(str(u.registers) for u in each),
            sum(u.spills for u in each), " / ".join(str(u.shared) for u in each),
            " / ".join(f"{o.share:.0%}" for o in fits), fits[ARCHS.index(DETAIL)].limit,
            {True: "yes", False: "**no**", None: "in the source"}[s.wide_offsets],
        ])  # fmt: skip
    header = ["kernel", "case", "threads", "registers", "spilled bytes", "shared bytes", "occupancy", "held by"]
    return table([*header, "64-bit offsets"], rows)


def widths(accesses) -> str:
    return " + ".join(f"{count} x {width}" for width, count in sorted(accesses.items(), reverse=True)) or "none"


def loop_table(subjects: list[Subject]) -> str:
    rows = []
    for s in subjects:
        used = s.used[DETAIL]
        resident = occupancy(DETAIL, s.threads, used.registers, used.shared).warps * 32
        for i, (fewest, most) in enumerate(s.code.loops):
            where = "whole kernel" if s.code.whole else f"loop {i + 1}" if len(s.code.loops) > 1 else "loop"
            shares = limits(most)
            count = str(most.instructions)
            if fewest.instructions != most.instructions:
                count = f"{fewest.instructions} to {most.instructions}"
            rows.append([
                f"`{s.file}` {s.kernel}", s.case, where, widths(most.loads), widths(most.stores), count,
                f"{most.instructions / max(most.bytes, 1):.1f}", most.branches, most.barriers, most.local,
                " / ".join(f"{shares[pipe]:.2f}" for pipe in shares), f"{resident * most.loaded / 1024:.0f}",
                verdict(fewest, most),
            ])  # fmt: skip
    header = ["kernel", "case", "pass", "loads", "stores", "instructions", "a byte", "branches", "barriers", "local"]
    return table([*header, "issue / alu / sfu / fp64 / shared", "KB in flight", "limit"], rows)


def whole_table(subjects: list[Subject]) -> str:
    rows = []
    for s in subjects:
        names = [i.name for i in s.code.instructions]
        memory = sum(i.width > 0 for i in s.code.instructions)
        fp64 = sum(name in ("DADD", "DMUL", "DFMA", "DSETP") for name in names)
        local = sum(name in ("LDL", "STL") for name in names)
        rows.append([
            f"`{s.file}` {s.kernel}", s.case, len(names), memory, names.count("MUFU"), fp64, names.count("BRA"), local
        ])  # fmt: skip
    return table(["kernel", "case", "instructions", "global", "MUFU", "FP64", "branches", "local"], rows)


def launch_table(calls, emulated: dict[str, int]) -> str:
    rows = []
    for label, launched in calls:
        names = [launch.name for launch in launched]
        rows.append([label, len(names), ", ".join(names), emulated.get(label, "")])
    return table(["call", "Triton", "kernels", "CUDA"], rows)


def report(subjects: list[Subject], calls, emulated: dict[str, int]) -> str:
    parts = {
        "tools": tools(),
        "launches": launch_table(calls, emulated),
        "resources": resource_table(subjects),
        "loops": loop_table(subjects),
        "whole": whole_table(subjects),
        "predictions": table(["op", "floor", "why"], predictions()),
    }
    text = TEXT
    for name, value in parts.items():
        text = text.replace(f"[[{name}]]", value)
    return text


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/static.md")
    args = parser.parse_args(argv)
    calls = list(triton_calls())
    subjects = [*triton_subjects(calls), *cuda_subjects()]
    args.output.write_text(report(subjects, calls, cuda_launches()))
    print(f"{args.output}: {len(subjects)} kernels as they are launched")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
