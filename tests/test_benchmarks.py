"""The benchmark program: runs, and its numbers are what its page says. How fast anything is, is no test."""

import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import OPS
from benchmarks.harness import Clock, Provider, interleave, max_abs_error, peak_bytes, truth, with_backward

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BENCHES = [importlib.import_module(f"benchmarks.bench_{op}") for op in OPS]


def run_benchmarks(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_json_holds_what_its_page_says(tmp_path):
    path = tmp_path / "report.json"
    options = ("--quick", "--threads", "1", "--providers", "ours", "eager", "--json", str(path))
    done = run_benchmarks("masked_whiten", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    machine, (result,) = report["machine"], report["results"]
    assert machine["threads"] == 1 and machine["torch"] == torch.__version__ and machine["device"] == "cpu"
    assert machine["argv"][0] == "masked_whiten" and set(machine["backends"]) >= {"gae", "ppo_loss"}
    identity = [result[key] for key in ("op", "mode", "shape", "dtype", "truth_rows")]
    assert identity == ["masked_whiten", "forward", [8, 64], "float32", None]
    assert result["bytes_moved"] == 8 * 64 * (4 + 4 + 1)
    assert result["load_average"] >= 0
    assert result["failed"] == {} and set(result["providers"]) == {"ours", "eager"}
    for m in result["providers"].values():
        assert len(m["samples_s"]) >= 7 and min(m["samples_s"]) > 0
        assert m["median_s"] == statistics.median(m["samples_s"])
        assert m["gb_per_s"] == pytest.approx(result["bytes_moved"] / m["median_s"] / 1e9)
        assert m["fraction_of_copy"] == pytest.approx(m["gb_per_s"] / result["copy_gb_per_s"])
        assert 8 * 64 * 4 <= m["peak_bytes"] < 20 * 8 * 64 * 8
        assert 0 < m["max_abs_error"]["whitened"] < 1e-5
    ours, eager = result["providers"]["ours"], result["providers"]["eager"]
    assert result["speedup"] == {"eager": pytest.approx(eager["median_s"] / ours["median_s"])}
    assert "masked_whiten forward [8, 64] float32" in done.stdout
    assert f"{result['speedup']['eager']:.2f}x" in done.stdout


@pytest.mark.parametrize("bench", BENCHES, ids=OPS)
def test_every_provider_computes_the_same(bench):
    rounded = getattr(bench, "RELATIVE_ERROR", None)  # of an op that has no float64 results
    dtype = torch.bfloat16 if rounded else torch.float64
    for case in bench.cases(CPU, dtype, quick=True):
        inputs = case.inputs()
        exact = truth(case, inputs)
        limit = {name: rounded * x.abs().max().item() if rounded else 1e-9 for name, x in exact.items()}
        for name, provider in case.providers.items():
            if name == "compile" or not provider.judged:  # its code is eager's, and compiling takes seconds
                continue
            with torch.no_grad():
                errors = max_abs_error(case.comparable(provider.run(**inputs)), exact)
            assert set(errors) == set(exact) and all(errors[k] < limit[k] for k in errors), (name, errors)
            assert all(torch.count_nonzero(x) for x in exact.values())


def test_interleaved_rounds():
    order = []
    providers = {name: Provider(name, lambda name=name, **_: order.append(name)) for name in "abc"}
    samples, calls = interleave(providers, {}, lambda run, calls: (run(), 0.5)[1], seconds=30.0)
    assert calls == dict.fromkeys("abc", 1)
    rounds = order[6:]  # after those that calibrate
    assert rounds == list("aabbcc") * 10 and len(samples["a"]) == 10  # an untimed call before each timed one


def test_slow_provider_sits_rounds_out():
    seconds = {"fast": 0.1, "slow": 4.0}
    providers = {name: Provider(name, lambda name=name, **_: name) for name in seconds}
    samples, _ = interleave(providers, {}, lambda run, calls: seconds[run()], seconds=6.0)
    assert len(samples["fast"]) == 15 and len(samples["slow"]) == 3


def test_clock_is_seconds_a_call():
    calls = []
    per_call = Clock(CPU)(lambda: calls.append(torch.ones(2**20).sum().item()), 5)
    assert len(calls) == 5 and 0 < per_call < 1


def test_peak_bytes_counts_what_lives_at_once():
    x = torch.ones(2**18)

    def run():
        y = x * 2  # 1 MiB
        z = y + y  # 2 MiB alive
        del y
        return z.exp_()

    assert peak_bytes(run, CPU) == pytest.approx(2 * x.nbytes, rel=1e-3)


def test_with_backward_pulls_the_upstream_gradient():
    square = with_backward(lambda x, shift: {"y": x * x + shift}, wrt=("x",), through=("y",))
    x = torch.tensor([1.0, -2.0])
    outputs = square(x=x, shift=torch.ones(2), grad_y=torch.tensor([10.0, 100.0]))
    assert outputs["d_x"].tolist() == [20.0, -400.0] and outputs["y"].tolist() == [2.0, 5.0]
    assert not x.requires_grad


def test_errors_compare_leading_rows():
    outputs, exact = {"a": torch.tensor([1.0, 2.0, 99.0])}, {"a": torch.tensor([1.0, 2.5], dtype=torch.float64)}
    assert max_abs_error(outputs, exact) == {"a": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gea"], "got gea"),
        (["--devic", "cpu"], "--devic"),
        (["gae", "--dtype", "int8"], "int8"),
        (["--providers", "our"], "our"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    done = run_benchmarks(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_dtype_that_no_named_op_takes():
    done = run_benchmarks("gae", "--dtype", "bfloat16", "--quick")
    assert done.returncode == 2 and "gae take none of them" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_so():
    done = run_benchmarks("gae", "--device", "cuda", "--quick")
    assert done.returncode == 2 and "no CUDA device" in done.stderr


@pytest.mark.gpu
def test_quick_run_on_cuda(tmp_path):
    path = tmp_path / "report.json"
    done = run_benchmarks("ppo_loss", "--device", "cuda", "--quick", "--json", str(path))
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(path.read_text())["results"]
    assert result["providers"]["ours"]["median_s"] > 0 and result["providers"]["ours"]["peak_bytes"] > 0
