"""One command for a machine with a GPU and no network: builds in place, tests, times and writes one JSON file.

    python -m benchmarks.gpu --results-dir DIR [--device cpu]     (--device cpu tries the procedure without a GPU)

Its steps, in this order: build; machine; tests, all that need a GPU; large_tests, those that fill its memory; ops, the
op benchmarks with everybody but torch.compile; ops_compile, the same beside torch.compile, whose compiler takes
longest; trainer, ours alone; sanitizer, compute-sanitizer's memcheck on a few tests, where that tool is. A step that
fails or is out of time is recorded and the rest goes on; what it measured until then is kept. The whole ends within 520
seconds. The exit code is 1 if the build, a test or an op's battery failed, memcheck found an error or, on a GPU, no
test passed.

The file GPU-DATE.json, as nvidia-h200-2026-11-26.json, replaces one of the same day and is written after every step:

    device, driver   what was asked for; nvidia-smi's name, version and memory
    machine          versions, GPU, commit, as in the benchmarks' file; null where torch did not say
    build            what was built, or why not
    steps            {name: {returncode (null when killed), seconds, output (its end)}}
    tests, large_tests   {passed, failed, skipped, failures [{test, text}], killed if pytest was}
    ops, ops_compile, trainer   the files of `python -m benchmarks` and benchmarks.trainer, or null
    sanitizer        {tool, summary}: memcheck's last line, null where it did not come to it
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

from benchmarks.__main__ import OPS, PROVIDERS
from benchmarks.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
# Seconds after the start by which each step ends; who is done earlier leaves the time to those that follow.
ENDS = {
    "build": 120,
    "machine": 130,
    "tests": 250,
    "large_tests": 280,
    "ops": 350,
    "ops_compile": 390,
    "trainer": 490,
    "sanitizer": 520,
}
FIRST = ("linear_ppo_loss", "token_logprobs", "ppo_loss", "gae", "linear_token_logprobs", "linear_dpo_loss")
LARGE = "beyond_2"  # tests of offsets that take up to 45 GB, one after the other; by pytest's -k
MEMCHECKED = "bad_bounds or bad_ids or warps"
OUTCOMES = ("PASSED", "FAILED", "SKIPPED")
MACHINE = "import json, sys, torch; from benchmarks.report import machine; "
MACHINE += "print(json.dumps(machine(torch.device(sys.argv[1]), [])))"


class Steps:
    """Runs commands, each until its end in ENDS, and keeps what became of them."""

    def __init__(self, scratch: Path) -> None:
        self.record: dict[str, dict] = {}
        self._scratch, self._start = scratch, time.monotonic()

    def run(self, name: str, *command: str, **environment: str) -> str:
        """The output; a command past its end is killed with all that it started, return code None."""
        print(f"{name}: {' '.join(map(str, command))[:200]}", flush=True)
        start = time.monotonic()
        # What a killed command leaves in TMPDIR, such as the trainer's models, goes with the scratch folder.
        env = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TMPDIR": str(self._scratch)}
        with tempfile.TemporaryFile() as output:  # a pipe is open for as long as any child of the command lives
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | env | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                returncode = process.wait(max(1.0, self._start + ENDS[name] - start))
            except subprocess.TimeoutExpired:
                returncode = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            text = output.read().decode(errors="replace")
        seconds = round(time.monotonic() - start, 1)
        self.record[name] = {"returncode": returncode, "seconds": seconds, "output": text[-8000:]}
        print(f"{name}: return code {returncode} in {seconds} s", flush=True)
        return text


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


def file_name(device: str, gpu: str | None) -> str:
    name = (gpu or "cuda").partition(",")[0] if device == "cuda" else "procedure on cpu"
    return f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{datetime.now(timezone.utc):%Y-%m-%d}.json"


def test_files() -> list[str]:
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in tests if "mark.gpu" in path.read_text(encoding="utf-8")]


def test_report(path: Path, output: str) -> dict:
    """Counts and the text of every failure from pytest's XML, or from its output where it was killed before that."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        lines = [line for line in output.splitlines() if "tests/" in line and "::" in line]
        counts = {name.lower(): sum(bool(re.search(rf"\b{name}\b", line)) for line in lines) for name in OUTCOMES}
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


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


class Procedure:
    """The steps by name; each fills its part of the report."""

    def __init__(self, device: str, ops: list[str], report: dict, scratch: Path):
        self.device, self.report, self.scratch, self.steps = device, report, scratch, Steps(scratch)
        self.ops_named = ops or [*FIRST, *(op for op in OPS if op not in FIRST)]
        self.quick = ["--quick"] if device == "cpu" else []
        report["steps"] = self.steps.record

    def build(self) -> None:
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        self.steps.run("build", *command, TORCH_CUDA_ARCH_LIST=architecture())
        self.report["build"] = read_json(ROOT / "rlhf_kernels/_build.json")

    def machine(self) -> None:
        output = self.steps.run("machine", sys.executable, "-c", MACHINE, self.device)
        if self.steps.record["machine"]["returncode"] == 0:
            found = [line for line in output.splitlines() if line.startswith("{")]  # warnings may stand around it
            self.report["machine"] = json.loads(found[-1]) if found else None

    def tests(self) -> None:
        workers = ["-n", "4"] if self.device == "cuda" and find_spec("xdist") else []  # most of the time is compiling
        self._pytest("tests", "-k", f"not {LARGE}", *workers)

    def large_tests(self) -> None:
        self._pytest("large_tests", "-k", LARGE)

    def ops(self) -> None:
        self._benchmark("ops", *self.ops_named, "--providers", *(name for name in PROVIDERS if name != "compile"))

    def ops_compile(self) -> None:
        self._benchmark("ops_compile", *self.ops_named, "--providers", "ours", "compile")

    def trainer(self) -> None:
        self._benchmark("trainer", "--alone", module="benchmarks.trainer")

    def sanitizer(self) -> None:
        tool = sanitizer()
        if tool is None or self.device == "cpu":
            return
        options = ["-m", "gpu", "-k", MEMCHECKED, "-x"]
        command = [tool, "--tool", "memcheck", sys.executable, "-m", "pytest", "tests/test_gpu.py", *options]
        # With torch's cache of memory an access beyond a tensor would stay within the cache's block.
        output = self.steps.run("sanitizer", *command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = re.findall(r"ERROR SUMMARY: .*", output)
        self.report["sanitizer"] = {"tool": tool, "summary": found[-1] if found else None}

    def _pytest(self, name: str, *options: str) -> None:
        xml = self.scratch / f"{name}.xml"
        command = (sys.executable, "-m", "pytest", *test_files(), "-m", "gpu", *options)
        output = self.steps.run(name, *command, "-vv", "--tb=short", f"--junitxml={xml}")
        self.report[name] = test_report(xml, output)

    def _benchmark(self, name: str, *options: str, module: str = "benchmarks") -> None:
        path = self.scratch / f"{name}.json"
        seconds = ["--seconds", "1"] if module == "benchmarks" and not self.quick else []
        command = (sys.executable, "-m", module, *options, "--device", self.device, "--json", str(path))
        self.steps.run(name, *command, *seconds, *self.quick)
        self.report[name] = read_json(path)


def good(report: dict) -> bool:
    """Whether everything that ran came out right."""
    steps = report["steps"]
    built = "build" not in steps or bool(report["build"] and report["build"]["_C_cuda"]["built"])
    ran = [name for name in ("tests", "large_tests") if name in steps]
    tested = all(steps[name]["returncode"] == 0 for name in ran)
    passed = sum(report[name]["passed"] for name in ran) > 0 or not ran or report["device"] == "cpu"
    refused = any((report.get(name) or {}).get("refused") for name in ("ops", "ops_compile"))
    checked = steps.get("sanitizer", {"returncode": None})["returncode"] in (None, 0)  # None: not run, or out of time
    summary = (report["sanitizer"] or {}).get("summary")
    clean = checked and (summary is None or "ERROR SUMMARY: 0 errors" in summary)
    return built and tested and passed and clean and not refused


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", allow_abbrev=False)
    parser.add_argument("--results-dir", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", nargs="+", choices=ENDS, default=list(ENDS), help="default all")
    parser.add_argument("--ops", nargs="+", choices=OPS, help="to time; default all, the most used first")
    args = parser.parse_args(argv)
    gpu = driver()
    args.results_dir.mkdir(parents=True, exist_ok=True)
    out = args.results_dir / file_name(args.device, gpu)
    report = {"device": args.device, "driver": gpu, "machine": None, "steps": {}}
    report |= dict.fromkeys(name for name in ENDS if name != "machine")
    with tempfile.TemporaryDirectory() as scratch:
        procedure = Procedure(args.device, args.ops, report, Path(scratch))
        for name in ENDS:
            if name in args.steps:
                getattr(procedure, name)()
                write_json(out, report)
    print(f"wrote {out}")
    return 0 if good(report) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
