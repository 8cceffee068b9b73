"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT


def test_ppo_from_python_is_short_and_learns(tmp_path):
    path = ROOT / "examples" / "ppo_from_python.py"
    assert path.read_text(encoding="utf-8").count("\n") < 40
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    scores = [float(line.split()[1]) for line in run.stdout.splitlines() if line[:1].isdigit()]
    assert len(scores) == 20 and sum(scores[-5:]) / 5 > sum(scores[:3]) / 3 + 0.2
    assert (tmp_path / "runs" / "example" / "ppo" / "final" / "config.json").is_file()
