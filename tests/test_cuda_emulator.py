"""The CUDA kernels and their wrappers without a GPU: compiled for the CPU, threads as fibers, against the battery.

Finds wrong indices, masks and tails, missing barriers and misaligned accesses; says nothing about speed or about what
nvcc makes of the code.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

FOLDER = ROOT / "tests/cuda_emulator"

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None or sys.platform != "linux", reason="no C++ compiler on Linux"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    command = ["sh", FOLDER / "build.sh", folder, Path(torch.__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libemulated.so"


@pytest.mark.parametrize("op", ["gae", "masked_whiten", "ppo_advantages", "ppo_loss"])
def test_emulated_kernels(library, op):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, FOLDER / "battery.py", library, op]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
