"""The install: with no compiler, with a broken one, as a wheel; what was left out is always said."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "rlhf_kernels", "rlhf")


@pytest.fixture
def checkout(tmp_path):
    """The sources alone, without what was built from them here."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    skip = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for name in SOURCES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(
            source, folder / name, **({"ignore": skip} if source.is_dir() else {})
        )
    return folder


def install(checkout: Path, target: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [*PIP, "install", "-v", "--no-build-isolation", "--no-deps", "--target", str(target), *options, "."]
    environment = {**os.environ, "RLHF_KERNELS_CUDA": "0", **environment}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)


def unavailable(target: Path) -> dict[str, str]:
    """What `backends()` says of the package in `target`, run where no other copy is importable."""
    code = "import json, rlhf_kernels as r; print(json.dumps([r.__file__, r.backends().unavailable]))"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=target, env=environment, capture_output=True, text=True, check=True
    )
    file, reasons = json.loads(done.stdout)
    assert file.startswith(str(target))
    return reasons


def test_no_compiler(checkout, tmp_path):
    """The install works, the references serve every op, and `backends()` names the missing compiler."""
    target = tmp_path / "site"
    done = install(checkout, target, CXX="/nonexistent/g++", RLHF_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_C_cpu left out: CXX=/nonexistent/g++ is not an executable" in done.stdout + done.stderr
    assert "CXX=/nonexistent/g++ is not an executable" in unavailable(target)["cpu"]
    assert not list(target.rglob("*.so"))


def test_broken_compiler_is_reported(checkout, tmp_path):
    """A library that fails to build is left out with the compiler's words, not in silence."""
    compiler = tmp_path / "broken-g++"
    compiler.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = install(checkout, tmp_path / "site", CXX=str(compiler))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this compiler is broken" in unavailable(tmp_path / "site")["cpu"]
    forced = install(checkout, tmp_path / "other", CXX=str(compiler), RLHF_KERNELS_CPU="1")
    assert forced.returncode and "RLHF_KERNELS_CPU=1, but _C_cpu cannot be built" in forced.stdout + forced.stderr


def test_forced_cuda_without_nvcc_is_an_error(checkout, tmp_path):
    done = install(checkout, tmp_path / "site", RLHF_KERNELS_CUDA="1", RLHF_KERNELS_CPU="0", CUDA_HOME="/nonexistent")
    assert done.returncode
    assert (
        "RLHF_KERNELS_CUDA=1, but _C_cuda cannot be built: no nvcc in CUDA_HOME=/nonexistent"
        in done.stdout + done.stderr
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_wheel(checkout, tmp_path):
    """A wheel holds the libraries, the record of the build and py.typed, and works from where it is installed."""
    command = [*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), "."]
    environment = {**os.environ, "RLHF_KERNELS_CUDA": "0", "RLHF_KERNELS_CPU": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(target)
    for name in ("rlhf_kernels/_C_cpu.so", "rlhf_kernels/_build.json", "rlhf_kernels/py.typed", "rlhf/cli.py"):
        assert name in names
    assert "rlhf_kernels/_host" in " ".join(names)
    assert "cpu" not in unavailable(target)


@pytest.mark.slow
def test_build_isolation(checkout, tmp_path):
    """`pip install .` alone: the build environment takes the pinned torch."""
    command = [*PIP, "install", "--no-deps", "--target", str(tmp_path / "site"), "."]
    environment = {**os.environ, "RLHF_KERNELS_CUDA": "0", "RLHF_KERNELS_CPU": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu" not in unavailable(tmp_path / "site")
