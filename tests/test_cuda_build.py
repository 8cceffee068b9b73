"""The CUDA library: built for three architectures without a GPU, no kernel spills, the stable ABI alone, never loaded
where there is no GPU. Skipped without nvcc."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

ARCHS = ("sm_80", "sm_90", "sm_100")
KERNELS = ("gae_kernel", "moments_kernel", "whiten_kernel", "advantages_kernel", "count_kernel", "loss_kernel")
RESOURCES = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for '(?P<arch>\S+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(
    not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")), reason="no nvcc on PATH or in CUDA_HOME"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a build of _C_cuda alone, by setup.py as a user would run it."""
    folder = tmp_path_factory.mktemp("cuda")
    env = {**os.environ, "RLHF_KERNELS_CUDA": "1", "RLHF_KERNELS_CPU": "0", "TORCH_CUDA_ARCH_LIST": "8.0;9.0;10.0+PTX"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "lib/rlhf_kernels/_build.json").read_text())["_C_cuda"]["built"]
    return folder


def test_no_kernel_spills(built):
    found = [match.groupdict() for match in RESOURCES.finditer((built / "temp/_C_cuda/build.log").read_text())]
    for arch in ARCHS:
        kernels = [row["kernel"] for row in found if row["arch"] == arch]
        assert all(any(name in kernel for kernel in kernels) for name in KERNELS), f"{arch}: {kernels}"
    spilling = [row for row in found if int(row["stores"]) or int(row["loads"]) or int(row["stack"])]
    assert not spilling, spilling


def test_the_library_needs_torch_by_its_stable_names_alone(built):
    library = str(built / "lib/rlhf_kernels/_C_cuda.so")
    needed = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True).stdout
    assert all(f"[{name}.so]" in needed for name in ("libtorch_cuda", "libtorch_cpu")), needed
    command = ["nm", "--dynamic", "--undefined-only", library]
    wanted = re.findall(r" U (\S+)", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert "aoti_torch_get_current_cuda_stream" in wanted
    assert not [name for name in wanted if re.search(r"3c10|2at|5torch", name)], "C++ names of torch are not stable"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_library_is_not_loaded_without_a_gpu(built, tmp_path):
    """A copy of the package with the library in it imports, leaves it alone and says why."""
    shutil.copytree(ROOT / "rlhf_kernels", tmp_path / "rlhf_kernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(built / "lib/rlhf_kernels/_C_cuda.so", tmp_path / "rlhf_kernels")
    code = "import rlhf_kernels as r; print(r.backends().unavailable['cuda']); print(open('/proc/self/maps').read())"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out.startswith("built, but torch sees no CUDA device")
    assert "_C_cuda" not in out
