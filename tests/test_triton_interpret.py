"""The Triton kernels under the interpreter, in their own process: triton reads TRITON_INTERPRET on import."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted_kernels(selection):
    pytest.importorskip("triton")
    # Where a GPU is, the kernels would be registered for it, and the tests run on CPU tensors.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "RLHF_KERNELS_BACKEND": ""}
    command = [sys.executable, "-m", "pytest", "tests/triton_interpreted.py", "-m", selection, "-x", "--no-header"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
