"""What becomes of the benchmarks' numbers: comparisons, regressions, sweeps, CSV and plots."""

import csv
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import rlhf_kernels
from benchmarks import compare, liger_csv, ops, plots, regressions, scaling
from benchmarks.__main__ import parse
from benchmarks.case import OURS
from benchmarks.measure import measure
from benchmarks.timing import quantile

CPU = torch.device("cpu")


def ops_arguments(*words):
    return parse([*words, "--quick", "--threads", "1", "--providers", "ours", "eager"])


def run(args, old=None, facts=None):
    outcome = ops.Outcome()
    ops.run(args, old, facts or {}, outcome, lambda: None)
    return outcome


# Comparison with an earlier file


def entry(ours, eager=1.0, copy=10.0):
    times = {name: [x * (1 + 0.01 * i) for i in range(9)] for name, x in (("ours", ours), ("eager", eager))}
    providers = {name: {"samples_s": x, "median_s": quantile(x, 0.5)} for name, x in times.items()}
    identity = {"op": "gae", "variant": "", "mode": "forward", "shape": [8, 64], "dtype": "float32"}
    return {**identity, "copy_gb_per_s": copy, "providers": providers}


@pytest.mark.parametrize(
    ("new", "same", "verdict"),
    [
        (entry(0.1), True, "same"),
        (entry(0.11), True, "same"),  # within the margin
        (entry(0.15), True, "slower"),
        (entry(0.06), True, "faster"),
        (entry(0.15, eager=1.5, copy=7.0), True, "same"),  # the machine is slower
        (entry(0.1, eager=0.5), True, "same"),  # eager alone is faster
        (entry(0.15, eager=1.0), False, "slower"),
        (entry(0.3, eager=3.0), False, "same"),  # another machine: by the ratio to eager
        (entry(0.05, eager=0.25), False, "slower"),
    ],
)
def test_verdicts(new, same, verdict):
    found = compare.judge(entry(0.1), new, same)
    assert found.verdict == verdict and (found.time is None) == (not same)


def test_without_eager_the_copy_is_the_yardstick():
    old, new, busy = entry(0.1), entry(0.2), entry(0.2, copy=5.0)
    for result in (old, new, busy):
        del result["providers"]["eager"]
    assert [compare.judge(old, x, True).verdict for x in (new, busy)] == ["slower", "same"]
    assert compare.judge(old, new, False).verdict == compare.judge(None, new, True).verdict == "new"


def test_compare_finds_a_slowed_op_and_only_that(tmp_path, monkeypatch):
    """A sleep in an op: the verdict of the file that was written without it."""
    facts = dict.fromkeys(compare.MACHINE, "x")
    args = ops_arguments("masked_whiten")
    old = {"machine": facts, "results": run(args, None, facts).results}
    monkeypatch.setattr(compare, "MARGIN", 3.0)
    monkeypatch.setattr(compare.judge, "__defaults__", (3.0,))  # a busy machine may triple a time
    (verdict,) = run(args, old, facts).verdicts
    assert verdict.verdict == "same"
    fast = rlhf_kernels.masked_whiten
    monkeypatch.setattr(rlhf_kernels, "masked_whiten", lambda *a, **k: (time.sleep(0.005), fast(*a, **k))[1])
    (verdict,) = run(args, old, facts).verdicts
    assert verdict.slower and verdict.time > 50


def test_a_suspect_is_measured_anew(monkeypatch):
    case = next(iter(ops.bench("gae").cases(CPU, torch.float32, quick=True)))
    result = measure(case, CPU, 0.1, ["ours", "eager"])
    seen = iter([compare.Verdict("gae", name) for name in ("slower", "slower", "same")])
    monkeypatch.setattr(compare, "judge", lambda *_: next(seen))
    assert ops.confirmed(case, result, {}, True, CPU, 0.1, ["ours", "eager"])[1].verdict == "same"


# make bench-check


def test_a_slowed_op_is_a_regression_and_a_whole_one_is_not():
    case = next(iter(ops.bench("masked_whiten").cases(CPU, torch.float32, quick=True)))
    ours = case.providers[OURS]
    slow = replace(ours, run=lambda **inputs: (time.sleep(0.005), ours.run(**inputs))[1])
    slowed = replace(case, providers=case.providers | {OURS: slow})
    stored = regressions.measured(case, CPU, 0.1)
    for tried, is_slower in ((slowed, True), (case, False)):
        found = regressions.check(stored, lambda tried=tried: regressions.measured(tried, CPU, 0.1), margin=3.0)
        assert found[0] == is_slower, found


def test_noise_is_not_a_regression_until_it_repeats(tmp_path):
    stored, quiet, noisy = (
        regressions.Ratio(0.9, 1.0, 1.1),
        regressions.Ratio(1.4, 1.5, 1.6),
        regressions.Ratio(2, 2, 2),
    )
    for values, slower, attempts in (([quiet], False, 1), ([noisy, noisy, quiet], False, 3), ([noisy] * 4, True, 3)):
        found = regressions.check(stored, iter(values).__next__)
        assert found[0] == slower and len(found[1]) == attempts
    path = tmp_path / "store.json"
    regressions.store("here", "gae", stored, path)
    regressions.store("here", "ppo_loss", noisy, path)
    assert regressions.load("here", path) == {"gae": stored, "ppo_loss": noisy}
    assert regressions.load("elsewhere", path) == {}


# Sweeps


def test_a_provider_stops_before_memory_or_time_runs_out():
    history = scaling.History()
    for x in (100, 200):
        m = {name: like(peak_bytes=peak, median_s=t) for name, peak, t in (("a", 10 * x, 1e-3), ("b", 7, x / 50))}
        history.add(x, like(input_bytes=2 * x, failed={}, providers=m))
    assert history.why_not("a", 400, 4801, 9.0) is None  # 4,000 and inputs of 800
    assert history.why_not("a", 400, 4799, 9.0).startswith("would need 4.8e-06 GB of 4.8e-06 GB")
    assert (
        history.why_not("b", 400, 1e9, 9.0) is None
        and history.why_not("b", 600, 1e9, 9.0) == "would take 12.0 s a call"
    )
    history.stopped["a"] = "failed: it did"
    assert history.why_not("a", 400, 1e12, 9.0) == "failed: it did"


def like(**fields):
    return SimpleNamespace(**fields)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A file of sweeps in which eager runs out of memory and ours goes on."""
    folder = tmp_path_factory.mktemp("swept")
    args = ops_arguments("scaling", "token_logprobs", "gae")
    args.memory_gb = 300e3 / 1e9
    curves = scaling.sweeps(CPU, None, quick=True)
    tokens = replace(curves[0], xs=(8, 16, 32))
    found = [scaling.sweep(curve, args, CPU) for curve in (tokens, curves[1], curves[6])]
    results = run(ops_arguments("masked_whiten", "linear_kl")).results
    machine = {
        "device_name": "a CPU", "threads": 1, "cores": 2, "torch": torch.__version__, "rlhf_kernels": "0.1.0",
        "commit": None, "modified": None, "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return {"format": 2, "machine": machine, "results": results, "refused": {}, "scaling": found}, folder


def test_sweeps_go_on_without_who_does_not_fit(swept):
    first = swept[0]["scaling"][0]
    assert first["x_name"] == "tokens" and [p["sizes"]["tokens"] for p in first["points"]] == [8, 16, 32]
    assert all("ours" in point["providers"] for point in first["points"])
    assert "eager" in first["points"][0]["providers"] and "eager" not in first["points"][-1]["providers"]
    assert first["points"][-1]["failed"]["eager"].startswith("would need")
    assert first["stopped"] == first["points"][-1]["failed"]  # ours reached the end


def test_csv_has_ligers_columns(swept):
    report, folder = swept
    liger_csv.write(report, folder / "all.csv")
    rows = list(csv.DictReader((folder / "all.csv").open()))
    assert list(rows[0]) == list(liger_csv.COLUMNS) and len(liger_csv.COLUMNS) == 15
    count = sum(len(result["providers"]) for result in report["results"])
    count += sum(len(point["providers"]) for sweep in report["scaling"] for point in sweep["points"])
    assert len(rows) == 2 * count  # time and memory
    whiten = [row for row in rows if row["kernel_name"] == "masked_whiten" and row["kernel_provider"] == "ours"]
    assert [(r["metric_name"], r["metric_unit"], r["x_name"], r["x_value"]) for r in whiten] == [
        ("speed", "ms", "tokens", "512"),
        ("memory", "MB", "tokens", "512"),
    ]
    m = next(r for r in report["results"] if r["op"] == "masked_whiten")["providers"]["ours"]
    assert [float(whiten[0][f"y_value_{q}"]) for q in (50, 20, 80)] == pytest.approx(
        [1e3 * m[name] for name in ("median_s", "p20_s", "p80_s")], rel=1e-5
    )
    assert json.loads(whiten[0]["extra_benchmark_config_str"]) == {"sequences": 8, "length": 64, "dtype": "float32"}
    assert {row["kernel_operation_mode"] for row in rows} == {"forward", "full"}


def test_plots_show_every_provider_and_the_machine(swept):
    report, folder = swept
    paths = plots.draw(report, folder)
    names = {"scaling-token_logprobs.png", "scaling-gae.png", "bandwidth.png", "roofline.png"}
    assert {path.name for path in paths} == names and all(path.stat().st_size > 10_000 for path in paths)
    assert "a CPU, 1 CPU threads of 2 cores" in plots.caption(report["machine"])
    time_axis = plots.scaling(report["scaling"][:2]).axes[0]
    drawn = set(time_axis.get_legend_handles_labels()[1])
    assert drawn == set(report["scaling"][0]["points"][0]["providers"]) == {"ours", "eager"}
