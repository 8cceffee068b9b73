"""One command for a machine with a GPU and no network: builds in place, runs the GPU tests and the op benchmarks and
writes one JSON file.

    python -m benchmarks.gpu --results-dir DIR [--device cpu]     (--device cpu tries the procedure without a GPU)

A step that fails or runs out of time is recorded and the rest goes on; the exit code is 1 if the build or a test
failed or, with a GPU asked for, none ran. The file gpu-DATE-TIME.json holds: device, driver, machine (versions, GPU,
commit, as in the benchmarks' file), build (what was built, or why not), steps {name: returncode (null when killed),
seconds, output (its end)}, tests {passed, failed, skipped, failures [{test, text}], killed if pytest was}, benchmarks
(the file of `python -m benchmarks`, or null).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_gpu.py", "tests/test_gpu_trainer.py")
TOTAL_SECONDS = 520
LIMITS = {"build": 200, "machine": 60, "tests": 320, "benchmarks": 300}  # each also ends with the total
OUTCOMES = ("PASSED", "FAILED", "SKIPPED")
MACHINE = "import json, sys, torch; from benchmarks.report import machine; "
MACHINE += "print(json.dumps(machine(torch.device(sys.argv[1]), [])))"


class Steps:
    """Runs commands under one deadline and keeps what became of each."""

    def __init__(self) -> None:
        self.record: dict[str, dict] = {}
        self._deadline = time.monotonic() + TOTAL_SECONDS

    def run(self, name: str, *command: str, **environment: str) -> str:
        """The output; a command past its limit is killed, return code None."""
        print(f"{name}: {' '.join(map(str, command))[:200]}", flush=True)
        start = time.monotonic()
        limit = max(1.0, min(LIMITS[name], self._deadline - start))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, timeout=limit, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            returncode, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            returncode, output = None, (error.output or b"").decode(errors="replace")
        seconds = round(time.monotonic() - start, 1)
        self.record[name] = {"returncode": returncode, "seconds": seconds, "output": output[-8000:]}
        print(f"{name}: return code {returncode} in {seconds} s", flush=True)
        return output


def architecture() -> str:
    """The GPU's own, which builds in a third of the time of all."""
    import torch

    if not torch.cuda.is_available():
        return "8.0;9.0;10.0+PTX"
    return "{}.{}".format(*torch.cuda.get_device_capability())


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def test_report(path: Path, output: str) -> dict:
    """Counts and the text of every failure from pytest's XML, or from its output where it was killed before that."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        counts = {name.lower(): len(re.findall(rf"^tests/.* {name}", output, re.M)) for name in OUTCOMES}
        return {**counts, "failures": [], "killed": True}
    failures, skipped = [], 0
    for case in cases:
        skipped += case.find("skipped") is not None
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                failures.append({"test": case.get("name"), "text": (found.text or found.get("message") or "")[-1500:]})
    failed = len({failure["test"] for failure in failures})
    counts = {"passed": len(cases) - failed - skipped, "failed": failed, "skipped": skipped}
    return {**counts, "failures": failures[:100]}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", allow_abbrev=False)
    parser.add_argument("--results-dir", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(argv)
    steps, python = Steps(), sys.executable
    with tempfile.TemporaryDirectory() as scratch:
        xml, timings = Path(scratch) / "tests.xml", Path(scratch) / "benchmarks.json"
        steps.run("build", python, "setup.py", "build_ext", "--inplace", TORCH_CUDA_ARCH_LIST=architecture())
        machine = steps.run("machine", python, "-c", MACHINE, args.device)
        pytest = [python, "-m", "pytest", *TESTS, "-m", "gpu", "-vv", "--tb=short", f"--junitxml={xml}"]
        tests = test_report(xml, steps.run("tests", *pytest))
        options = ["--quick"] if args.device == "cpu" else ["--seconds", "5"]
        steps.run("benchmarks", python, "-m", "benchmarks", "--device", args.device, "--json", str(timings), *options)
        report = {
            "device": args.device,
            "driver": driver(),
            "machine": json.loads(machine.splitlines()[-1]) if steps.record["machine"]["returncode"] == 0 else None,
            "build": read_json(ROOT / "rlhf_kernels/_build.json"),
            "steps": steps.record,
            "tests": tests,
            "benchmarks": read_json(timings),
        }
    args.results_dir.mkdir(parents=True, exist_ok=True)
    out = args.results_dir / f"gpu-{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {out}")
    built = report["build"] is not None and report["build"]["_C_cuda"]["built"]
    tested = steps.record["tests"]["returncode"] == 0 and (tests["passed"] > 0 or args.device == "cpu")
    return 0 if built and tested else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
