"""verl and OpenRLHF patched in processes that Ray starts, and OpenRLHF's real modules; in the environment of
`make peers`."""

import os
import subprocess

import pytest
from conftest import ROOT

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON.relative_to(ROOT)}: `make peers` makes it")


def run(script, *arguments, paths=()):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))), "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), str(ROOT / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_openrlhf_modules_get_ours_and_theirs_back():
    run("tests/peers_openrlhf_patch.py")


def test_verl_example_patches_ray_workers():
    found = run("examples/speed_up_verl.py")
    assert "rlhf_kernels.compat.verl: advantages (4, 16)" in found
    assert "verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY.vanilla" in found


@pytest.mark.slow
def test_openrlhf_example_hands_over_to_its_command_line(tmp_path):
    """What this environment lacks is stood in for in every process, as in peers_openrlhf_patch."""
    absent = "import sys, peers_openrlhf_patch as absent\nsys.meta_path.append(absent.Absent())\n"
    (tmp_path / "sitecustomize.py").write_text(absent)
    found = run("examples/speed_up_openrlhf.py", "--help", paths=(tmp_path, ROOT / "tests"))
    assert "RemoteExperienceMaker.get_advantages_and_returns" in found and "left as it is" not in found
    assert "--vllm.num_engines" in found


def test_verl_imports_the_module_that_its_environment_names(tmp_path, monkeypatch):
    (tmp_path / "ours.py").write_text("import rlhf_kernels\nrlhf_kernels.patch('verl')\n")
    (tmp_path / "script.py").write_text(
        "from verl.workers.utils import losses\n"
        "for found in (losses.get_policy_loss_fn('vanilla'), losses.kl_penalty, losses.compute_value_loss):\n"
        "    print(found.__module__)\n"
    )
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "ours")
    found = run(tmp_path / "script.py", paths=(tmp_path,))
    assert found.split() == ["rlhf_kernels.compat.verl"] * 3
