"""`make gpu` without a GPU: its steps run, end in time, and what was measured until then is in the file."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.readme_files import read

# Writes a report twice, as benchmarks do after each case, then waits in a child that holds its output open.
UNFINISHED = """
import subprocess, sys, time
from pathlib import Path
from benchmarks.files import write_json
for n in (1, 2):
    write_json(Path(sys.argv[1]), {"results": list(range(n))})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
child.wait()
"""


def test_a_killed_step_leaves_what_it_measured_and_no_child(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.ENDS, "ops", 3)
    steps, path = gpu.Steps(tmp_path), tmp_path / "ops.json"
    start = time.monotonic()
    output = steps.run("ops", sys.executable, "-c", UNFINISHED, str(path))
    assert time.monotonic() - start < 10
    assert steps.record["ops"]["returncode"] is None and steps.record["ops"]["output"] == output
    assert json.loads(path.read_text()) == {"results": [0, 1]}
    child = Path("/proc") / output.split()[1]
    until = time.monotonic() + 5
    while child.exists() and "State:\tZ" not in (child / "status").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert not child.exists() or "State:\tZ" in (child / "status").read_text()


def test_the_file_is_named_after_the_gpu():
    today = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    assert gpu.file_name("cuda", "NVIDIA H200, 580.65.06, 143771 MiB") == f"nvidia-h200-{today}.json"
    assert gpu.file_name("cuda", None) == f"cuda-{today}.json"


def test_every_file_with_a_test_for_a_gpu_is_found():
    assert {"tests/test_gpu.py", "tests/test_gpu_trainer.py", "tests/test_benchmarks.py"} <= set(gpu.test_files())


def test_counts_of_a_killed_run_are_those_of_its_output(tmp_path):
    """pytest names the worker first where there are several."""
    lines = ["tests/test_gpu.py::test_a[x] PASSED [ 1%]", "[gw3] [ 2%] FAILED tests/test_gpu.py::test_b"]
    lines += ["[gw0] [ 3%] PASSED tests/test_gpu.py::test_c", "tests/test_gpu.py::test_d SKIPPED (no GPU)", "3 PASSED"]
    found = gpu.test_report(tmp_path / "missing.xml", "\n".join(lines))
    assert found == {"passed": 2, "failed": 1, "skipped": 1, "failures": [], "killed": True}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"build": {"_C_cuda": {"built": False}}}, False),
        ({"build": None}, False),
        ({"tests": {"passed": 0}}, False),
        ({"steps": {"build": {}, "tests": {"returncode": None}}}, False),
        ({"sanitizer": {"summary": "ERROR SUMMARY: 1 error"}}, False),
        ({"sanitizer": {"summary": None}}, True),
        ({"steps": {"sanitizer": {"returncode": 1}}}, False),
        ({"steps": {"sanitizer": {"returncode": None}}}, True),
        ({"ops": {"refused": {"gae": "wrong"}}}, False),
        ({"ops": {"refused": {}}}, True),
    ],
)
def test_what_makes_the_command_fail(changes, expected):
    report = {
        "device": "cuda", "build": {"_C_cuda": {"built": True}}, "tests": {"passed": 3}, "sanitizer": None,
        "steps": {"build": {"returncode": 0}, "tests": {"returncode": 0}},
    }  # fmt: skip
    assert gpu.good(report | changes) is expected


def test_the_procedure_on_a_cpu(tmp_path):
    """On the smallest op: what the parts measure is tested where they are."""
    chosen = ["--steps", "machine", "ops", "sanitizer", "--ops", "masked_whiten"]
    assert gpu.main(["--device", "cpu", "--results-dir", str(tmp_path), *chosen]) == 0
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert list(report["steps"]) == ["machine", "ops"] and report["machine"]["device"] == "cpu"
    assert [report[name] for name in ("build", "tests", "trainer", "sanitizer")] == [None] * 4
    (result,) = report["ops"]["results"]
    assert result["op"] == "masked_whiten" and "compile" not in result["providers"]
    assert read(tmp_path) == []  # README shows no trial
    path.write_text(json.dumps(report | {"device": "cuda"}))
    assert [(file.command, file.results) for file in read(tmp_path)] == [("make gpu", report["ops"]["results"])]


@pytest.mark.slow
def test_the_whole_procedure_on_a_cpu(tmp_path):
    steps = ["machine", "tests", "large_tests", "ops", "ops_compile", "trainer", "sanitizer"]
    assert gpu.main(["--device", "cpu", "--results-dir", str(tmp_path), "--steps", *steps]) == 0
    report = json.loads(next(tmp_path.iterdir()).read_text())
    assert report["tests"]["passed"] == 0 and report["tests"]["skipped"] > 300
    assert {result["op"] for result in report["ops"]["results"]} >= {"gae", "linear_kl", "token_logprobs"}
    assert [row["name"] for row in report["trainer"]["results"]] == ["OPT, tiny", "vocabulary 64", "vocabulary 64"]
