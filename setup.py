"""Builds the compiled parts; everything else about the package is in pyproject.toml.

    _C_cpu.so    stable-ABI torch library: csrc/cpu/<op>.cpp registers, <op>_kernel.cpp is compiled per instruction set
    _C_cuda.so   stable-ABI torch library: csrc/cuda/<op>.cu kernels by nvcc, <op>.cpp registers; needs no GPU to build
    _host*.so    pybind11 module
    _build.json  which of them were built and why the others were not; `rlhf_kernels.backends()` reads it

A missing compiler leaves its libraries out. Environment: RLHF_KERNELS_CPU=0|1 and RLHF_KERNELS_CUDA=0|1 leave a part
out or make its absence an error, RLHF_KERNELS_DEBUG=1 builds with -O0 -g, TORCH_CUDA_ARCH_LIST (default
"8.0;9.0;10.0+PTX"), CXX, CUDA_HOME, MAX_JOBS.
"""

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mprefer-vector-width=512",
    ]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]  # torch >= 2.10
DEBUG = os.environ.get("RLHF_KERNELS_DEBUG") == "1"
OPTIMISE = ["-O0", "-g"] if DEBUG else ["-O3"]
NINJA_RULES = """
ninja_required_version = 1.5
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in $flags -o $out
"""


class Unavailable(Exception):
    """A library that cannot be built here; the text says why."""


def torch_dir():
    spec = importlib.util.find_spec("torch")  # locates the headers without the 2 s of `import torch`
    if spec is None:
        raise Unavailable("torch is not installed in the build environment")
    return Path(spec.origin).parent


def cxx_compiler():
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        if shutil.which(shlex.split(name)[0]):
            return name
        if name == os.environ.get("CXX"):
            raise Unavailable(f"CXX={name} is not an executable")
    raise Unavailable("no C++ compiler on PATH (g++, c++, clang++)")


def nvcc_compiler():
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise Unavailable(f"no nvcc {'in CUDA_HOME=' + home if home else 'on PATH'}")
    return nvcc


def gencode_flags():
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";").split(";")
    flags = []
    for name in filter(None, names):
        arch = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


class Plan:
    """One library: objects, then the link. Runs as one build.ninja, or as plain commands where there is no ninja."""

    def __init__(self, name, build_dir):
        self.name, self.lines, self.objects, self.commands = name, [NINJA_RULES], [], []
        self.build_dir = build_dir / name

    def compile(self, rule, compiler, source, flags, tag=""):
        out = self.build_dir / f"{source.stem}{source.suffix.replace('.', '_')}{tag}.o"
        self.objects.append(out)
        self._build(out, rule, [source], compiler, flags)

    def link(self, compiler, out, flags):
        if not self.objects:
            raise Unavailable("the source tree has no files for it under csrc/")
        self._build(out, "link", self.objects, compiler, flags)

    def _build(self, out, rule, inputs, compiler, flags):
        escape = lambda p: str(p).replace(" ", "$ ").replace(":", "$:")  # noqa: E731
        self.lines.append(f"build {escape(out)}: {rule} {' '.join(map(escape, inputs))}")
        self.lines.append(f"  cxx = {compiler}\n  flags = {' '.join(map(shlex.quote, flags))}")
        action = ["-shared", *inputs, *flags] if rule == "link" else [*flags, "-c", *inputs]
        self.commands.append([*shlex.split(compiler), *map(str, action), "-o", str(out)])

    def run(self):
        self.build_dir.mkdir(parents=True, exist_ok=True)
        (self.build_dir / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        if ninja:
            log = self._command([ninja, "-j", str(jobs)])
        else:
            with ThreadPoolExecutor(jobs) as pool:
                log = "".join(pool.map(self._command, self.commands[:-1])) + self._command(self.commands[-1])
        # Warnings (and ptxas' resource report) are kept where a person can read them.
        (self.build_dir / "build.log").write_text(log)

    def _command(self, command):
        done = subprocess.run(command, cwd=self.build_dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise Unavailable(f"{self.name} failed to build:\n{done.stdout}")
        return done.stdout


def torch_flags():
    return [*STABLE_ABI, f"-I{torch_dir() / 'include'}", f"-I{ROOT / 'csrc'}"]


def link_flags():
    # Without NEEDED libtorch_cpu the library has undefined symbols even after `import torch`, which loads it
    # RTLD_LOCAL.
    return [f"-L{torch_dir() / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]


def plan_cpu(plan, out):
    cxx = cxx_compiler()
    flags = [*OPTIMISE, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{ROOT / 'csrc'}"]
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.stem.endswith("_kernel"):
            for isa, isa_flags in ISA_FLAGS.items():
                plan.compile(
                    "cxx", cxx, source, [*flags, "-ffp-contract=fast", *isa_flags, f"-DRLHF_ISA={isa}"], tag=f"_{isa}"
                )
        else:
            plan.compile("cxx", cxx, source, [*flags, *(["-DRLHF_X86"] if X86 else []), *torch_flags()])
    plan.link(cxx, out, link_flags())
    return {"compiler": cxx, "isas": list(ISA_FLAGS)}


def plan_cuda(plan, out):
    nvcc, cxx = nvcc_compiler(), cxx_compiler()
    archs = gencode_flags()
    device = [
        "-O3",
        "-std=c++17",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        "-Xptxas",
        "-v",
        f"-I{ROOT / 'csrc'}",
        *archs,
    ]
    host = [*OPTIMISE, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DUSE_CUDA", *torch_flags()]
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        plan.compile("nvcc", nvcc, source, device)
    for source in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
        plan.compile("cxx", cxx, source, host)
    plan.link(nvcc, out, ["-cudart", "shared", *cuda_link_flags(plan, cxx)])
    return {"compiler": nvcc, "archs": archs}


def cuda_link_flags(plan, cxx):
    """Links libtorch_cuda, or an empty stub of its soname where torch is a CPU build, so that NEEDED names it on a
    GPU machine."""
    lib = torch_dir() / "lib"
    if not (lib / "libtorch_cuda.so").exists():
        lib = plan.build_dir
        lib.mkdir(parents=True, exist_ok=True)
        stub = [
            *shlex.split(cxx),
            "-shared",
            "-x",
            "c++",
            os.devnull,
            "-Wl,-soname,libtorch_cuda.so",
            "-o",
            str(lib / "libtorch_cuda.so"),
        ]
        subprocess.run(stub, check=True)
    return ["-Xlinker", "--no-as-needed", f"-L{lib}", "-ltorch_cuda", f"-L{torch_dir() / 'lib'}", "-ltorch_cpu"]


def plan_host(plan, out):
    import pybind11

    cxx = cxx_compiler()
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-I{ROOT / 'csrc'}"]
    flags = [
        *OPTIMISE,
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        *(["-DRLHF_X86"] if X86 else []),
        *includes,
    ]
    for source in sorted((ROOT / "csrc/host").glob("*.cpp")):
        plan.compile("cxx", cxx, source, flags)
    plan.link(cxx, out, [])
    return {"compiler": cxx}


LIBRARIES = {
    "_C_cpu": (plan_cpu, "RLHF_KERNELS_CPU"),
    "_C_cuda": (plan_cuda, "RLHF_KERNELS_CUDA"),
    "_host": (plan_host, "RLHF_KERNELS_CPU"),
}


class BuildKernels(build_ext):
    """One ninja run a library; a library that cannot be built is left out, said so and recorded."""

    def get_ext_filename(self, fullname):
        path = fullname.replace(".", "/")
        return f"{path}.so" if path.rpartition("/")[2].startswith("_C_") else super().get_ext_filename(fullname)

    def run(self):
        self.in_source = self.inplace or self.editable_mode  # setuptools clears `inplace` while it builds
        super().run()

    def build_extensions(self):
        record = {ext.name.rpartition(".")[2]: self.build_library(ext) for ext in self.extensions}
        text = json.dumps(record, indent=1) + "\n"
        for folder in [Path(self.build_lib) / "rlhf_kernels", *([ROOT / "rlhf_kernels"] if self.in_source else [])]:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build.json").write_text(text)

    def build_library(self, ext):
        name = ext.name.rpartition(".")[2]
        make_plan, variable = LIBRARIES[name]
        wanted = os.environ.get(variable)
        plan = Plan(name, Path(self.build_temp).resolve())
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.unlink(missing_ok=True)
        if self.in_source:  # an old copy must not outlive a build that leaves it out
            (ROOT / "rlhf_kernels" / out.name).unlink(missing_ok=True)
        try:
            if wanted == "0":
                raise Unavailable(f"left out by {variable}=0")
            details = make_plan(plan, out)
            out.parent.mkdir(parents=True, exist_ok=True)
            plan.run()
        except (Unavailable, ImportError, OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise SystemExit(f"{variable}=1, but {name} cannot be built: {error}") from error
            print(f"rlhf_kernels: {name} left out: {error}", file=sys.stderr)
            return {"built": False, "reason": str(error)[-2000:]}
        print(f"rlhf_kernels: built {name}")
        return {"built": True, **details}


# Optional, so that setuptools does not fail over a file that build_library left out on purpose.
extensions = [Extension(f"rlhf_kernels.{name}", sources=[], optional=True) for name in LIBRARIES]
setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
