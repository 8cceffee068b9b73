"""The benchmark program: runs, and its numbers are what its page says. How fast anything is, is no test."""

import importlib
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rlhf_kernels
from benchmarks import accuracy, ops
from benchmarks.__main__ import OPS, parse
from benchmarks.accuracy import max_abs_error, truth
from benchmarks.case import EAGER, OURS, Provider, with_backward
from benchmarks.counts import count
from benchmarks.measure import measure
from benchmarks.timing import Clock, interleave, quantile
from rlhf_kernels import _library

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
    assert report["format"] == 2 and report["refused"] == {} and report["scaling"] == []
    identity = [result[key] for key in ("op", "variant", "mode", "shape", "dtype", "truth_rows")]
    assert identity == ["masked_whiten", "", "forward", [8, 64], "float32", None]
    assert result["sizes"] == {"sequences": 8, "length": 64} and result["input_bytes"] == 8 * 64 * (4 + 1)
    assert result["flops"] == 0 and result["matmul_tflop_per_s"] is None
    assert result["bytes_moved"] == 8 * 64 * (4 + 4 + 1)
    assert result["load_average"] >= 0
    assert result["failed"] == {} and set(result["providers"]) == {"ours", "eager"}
    for m in result["providers"].values():
        assert len(m["samples_s"]) >= 7 and min(m["samples_s"]) > 0
        assert m["median_s"] == statistics.median(m["samples_s"])
        assert min(m["samples_s"]) <= m["p20_s"] <= m["median_s"] <= m["p80_s"] <= max(m["samples_s"])
        assert m["ops"] > 0 and m["launches"] is None and m["host_syncs"] == 0 and m["tflop_per_s"] is None
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
            if provider.package:  # tests/test_peers.py judges other projects, in their environment
                continue
            with torch.no_grad():
                errors = max_abs_error(case.comparable(provider.run(**inputs)), exact)
            assert set(errors) == set(exact) and all(errors[k] < limit[k] for k in errors), (name, errors)
            assert all(torch.count_nonzero(x) for x in exact.values())


def test_every_public_op_has_a_benchmark():
    assert set(OPS) == {op.removesuffix("_") for op in _library.OPS if op in rlhf_kernels.__all__}


@pytest.mark.parametrize("bench", BENCHES, ids=OPS)
def test_every_case_has_a_key_of_its_own(bench):
    for device in (CPU, torch.device("cuda")):  # sizes alone, no inputs
        cases = list(bench.cases(device, torch.float32, quick=False))
        assert len({case.key for case in cases}) == len(cases)
        assert all({OURS, EAGER} <= set(case.providers) and case.bytes_moved > 0 for case in cases)


def test_products_are_counted_and_have_a_ceiling():
    case = next(iter(ops.bench("linear_ppo_loss").cases(CPU, torch.float32, quick=True)))
    result = measure(case, CPU, 0.1, ["ours", "products"])
    assert result.flops == 3 * 2 * 24 * 16 * 1000
    m = result.providers["products"]
    assert m.tflop_per_s == pytest.approx(result.flops / m.median_s / 1e12)
    assert m.fraction_of_matmul == pytest.approx(m.tflop_per_s / result.matmul_tflop_per_s)
    assert set(result.providers["ours"].max_abs_error) == {"loss", "d_hidden", "d_weight"}


def test_what_is_missing_here_is_said():
    case = next(iter(ops.bench("gae").cases(CPU, torch.float32, quick=True)))
    extra = {
        "absent": Provider("", case.providers[OURS].run, package="no_such_package"),
        "gpu": Provider("", case.providers[OURS].run, needs_cuda=True),
        "broken": Provider("", lambda **_: 1 / 0),
    }
    providers = {name: case.providers[name] for name in (OURS, EAGER)} | extra
    result = measure(replace(case, providers=providers), CPU, 0.1)
    assert result.failed == {
        "absent": "no_such_package is not installed",
        "gpu": "its kernels need a GPU",
        "broken": "ZeroDivisionError: division by zero",
    }
    assert set(result.providers) >= {OURS, EAGER} and not set(result.providers) & set(extra)


# Refusals


def test_an_op_with_a_green_battery_is_timed():
    assert accuracy.refusal("gae", [None, "reference"], CPU) is None


def test_an_op_with_a_red_battery_is_refused(monkeypatch, capsys):
    """As a kernel that is off by a thousandth would be."""
    case, *_ = accuracy.testing.cases("masked_whiten")
    off = replace(case, call=lambda **inputs: tuple(x * 1.001 for x in case.call(**inputs)))
    monkeypatch.setattr(accuracy.testing, "cases", lambda op: [off])
    args = parse(["masked_whiten", "--quick"])
    outcome = ops.Outcome()
    ops.run(args, None, {}, outcome, lambda: None)
    assert outcome.results == [] and "error" in outcome.refused["masked_whiten"]
    assert "masked_whiten refused, its battery fails" in capsys.readouterr().out


# The clock and the counts


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


def test_counts_of_a_call():
    x = torch.ones(2**18)

    def run():
        y = x * 2  # 1 MiB
        z = y + y  # 2 MiB alive
        del y
        return z.exp_(), z.sum().item()

    found = count(run, CPU)
    assert found.peak_bytes == pytest.approx(2 * x.nbytes, rel=1e-3)
    assert found.host_syncs == 1 and found.launches is None
    assert count(lambda: [x.neg_() for _ in range(5)], CPU).ops == 5


def test_quantiles():
    assert [quantile([3.0, 1.0, 2.0, 5.0, 4.0], q) for q in (0, 0.2, 0.5, 0.8, 1)] == [1.0, 1.8, 3.0, 4.2, 5.0]
    assert quantile([7.0], 0.2) == 7.0


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
        (["gae", "--compare", "no.json"], "no.json"),
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
