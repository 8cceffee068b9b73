"""verl and OpenRLHF patched in processes that Ray starts, and OpenRLHF's real modules; in the environment of
`make peers`."""

import os
import subprocess

import pytest
from conftest import ROOT

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON.relative_to(ROOT)}: `make peers` makes it")


def run(script):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), str(ROOT / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_openrlhf_modules_get_ours_and_theirs_back():
    run("tests/peers_openrlhf_patch.py")


def test_verl_example_patches_ray_workers():
    found = run("examples/speed_up_verl.py")
    assert "rlhf_kernels.compat.verl: advantages (4, 16)" in found
    assert "verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY.vanilla" in found
