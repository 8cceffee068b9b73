"""The demo's study: best-of-n of a pool and rewards against closed forms, the checks on doctored summaries, the report,
and a run of it in miniature (slow)."""

import copy
import json
import math
import re

import pytest
import torch

from rlhf import demo, study, study_report, task
from rlhf.best_of_n import best_of_n_kl
from rlhf.config import DemoConfig
from rlhf.log import Run


def point(gold, proxy, kl, **others):
    return {"gold": gold, "proxy": proxy, "kl": kl, "gold_se": 0.02, "proxy_se": 0.01, "kl_se": 0.01} | others


def sweep_run(beta, curve, warnings=()):
    rows = [{"step": step, "warning": line} for step, line in warnings]
    last = curve[-1]
    return last | {"beta": beta, "curve": curve, "warnings": rows, "seconds": 3.0, "sample": "the film was good ."}


START = point(-0.14, 0.0, 0.0, step=0)
FELL = "step 30: warning: gold_reward has fallen from 1.7 at step 10 to 0.2: the policy games the reward"


@pytest.fixture
def summary():
    """One that keeps every promise."""
    free = [START, point(1.7, 1.1, 1.6, step=10), point(-3.6, 1.3, 64.0, step=60)]
    tied = [START, point(1.65, 1.04, 0.8, step=10), point(1.6, 1.03, 0.75, step=60)]
    runs = [sweep_run(beta, tied) for beta in study.BETAS[1:]]
    variant = point(1.6, 1.0, 0.8, gain=1.74, target=None, last_kl=0.8, note="gold 1.5 at step 10", seconds=30.0)
    scored = variant | {"name": "PPO", "score": 0.95, "score_standard_error": 0.004}
    return {
        "config": {"seed": 1},
        "samples": {"final": 4096, "point": 512, "pool": 8192},
        "seconds": 600.0,
        "sft": START,
        "optimum": vars(task.known_optimum(torch.tensor([0.0, 1.0]), 0.4)),
        "frontier": [{"kl": 0.5, "reward": 1.5}, {"kl": 1.0, "reward": 1.8}],
        "sweep": [sweep_run(0.0, free, [(30, FELL)]), *runs],
        "best_of_n": [point(1.0, 0.9, best_of_n_kl(n), n=n) for n in study.BEST_OF],
        "dpo": [{"beta": beta, "curve": tied, "seconds": 9.0} | tied[-1] for beta in study.DPO_BETAS],
        "variants": [scored, variant | {"name": "adaptive KL", "target": 0.5, "last_kl": 0.55}],
    }


def test_best_of_n_figures_of_a_pool():
    generator = torch.Generator().manual_seed(0)
    proxy = torch.randn(1024, generator=generator)
    gold = proxy + torch.randn(1024, generator=generator)
    found = study.best_of_n(demo.Measurement(proxy, gold, torch.zeros(1024), []), 4)
    assert found["proxy"] == pytest.approx(1.0294, abs=4 * found["proxy_se"])  # the mean of the best of 4 normals
    assert found["gold"] == pytest.approx(1.0294, abs=4 * found["gold_se"])
    assert 0.01 < found["proxy_se"] < found["gold_se"] < 0.1


@pytest.mark.parametrize(
    "review",
    ["the film was good . the plot was very bad and bad .", "the film was was good", "good", "", "the the ."],
)
def test_stepwise_gold_reward_adds_up_to_the_gold_reward(review):
    ids = list(range(len(review.split()) + 1))  # with the EOS token
    [row] = task.stepwise_gold_reward(["review"], [review], [ids])
    assert len(row) == len(ids)
    assert sum(row) == pytest.approx(task.gold(review), abs=1e-12)


def test_stepwise_gold_reward_pays_where_it_is_earned():
    review = "the film was good ."
    [row] = task.stepwise_gold_reward(["review"], [review], [list(range(6))])
    assert row[:3] == [-1.0, 0.0, 0.0]  # begun, and not finished
    assert row[3:] == pytest.approx([2 * math.tanh(0.5), 1.0, 0.0])  # a good word; an end; nothing for EOS


def test_very_reward_counts():
    assert task.very_reward(["", ""], ["the film was very very good .", "the film was good ."]) == [2.0, 0.0]


def test_a_summary_that_keeps_its_promises(summary):
    assert study.shortfalls(summary) == []


def doctored(change):
    return pytest.param(*change[1:], id=change[0])


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        doctored(change)
        for change in (
            ("gold held", ("sweep", 0, "gold"), 1.5, "beta 0: gold fell by 0.20"),
            ("proxy fell too", ("sweep", 0, "proxy"), 1.0, "beta 0: gold fell by 0.00"),
            ("NaN", ("sweep", 0, "gold"), math.nan, "beta 0: gold fell by nan"),
            ("silent", ("sweep", 0, "warnings"), [], "beta 0: no warning that gold_reward fell"),
            ("another warning", ("sweep", 0, "warnings", 0, "warning"), "the KL", "beta 0: no warning"),
            ("tied run fell", ("sweep", -1, "gold"), 1.2, "beta 0.4: gold is 0.45 below its best"),
            ("tied run NaN", ("sweep", -1, "gold"), math.nan, "beta 0.4: gold is nan below its best"),
            ("tied run warned", ("sweep", -1, "warnings"), [{"step": 3, "warning": "W"}], "beta 0.4: warned: W"),
            ("variant", ("variants", 0, "gain"), 0.4, r"PPO raised gold by 0.40, expected at least 1.0"),
            ("variant NaN", ("variants", 0, "gain"), math.nan, r"PPO raised gold by nan"),
            ("KL above", ("variants", 1, "last_kl"), 0.63, "adaptive KL: KL 0.630 over the last 10 steps"),
            ("KL below", ("variants", 1, "last_kl"), 0.37, "expected within 25% of 0.5"),
            ("KL NaN", ("variants", 1, "last_kl"), math.nan, "adaptive KL: KL nan"),
        )
    ],
)
def test_shortfalls_of_a_doctored_summary(summary, path, value, expected):
    broken = copy.deepcopy(summary)
    *way, last = path
    place = broken
    for key in way:
        place = place[key]
    place[last] = value
    [line] = study.shortfalls(broken)
    assert re.search(expected, line), line


def test_report(summary, tmp_path, capsys):
    study_report.draw(tmp_path / "study.png", summary)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    text = study_report.markdown(summary)
    assert "| PPO | 1.60 ±0.02 | 1.00 ±0.01 | 0.80 ±0.01 | 0.950 ±0.004 | gold 1.5 at step 10 | 30 |" in text
    assert (
        "| PPO, beta 0 | -3.60 ±0.02 | 1.70 at KL 1.60 | 1.30 ±0.01 | 64.00 ±0.01 | 1, first at step 30 | 3 |" in text
    )
    assert FELL in text
    for block in text.split("\n\n"):
        if block.startswith("| "):
            assert len({line.count("|") for line in block.split("\n")}) == 1
    study_report.show(summary, tmp_path)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("adaptive KL", "best of 128", "DPO, beta 0.1", "600 s in all"))


def test_the_study_is_asked_for(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(demo, "run", lambda config, folder: called.append("demo"))
    monkeypatch.setattr(study, "run", lambda config, folder: called.append("study"))
    study.main(DemoConfig(output_dir=str(tmp_path)))
    study.main(DemoConfig(output_dir=str(tmp_path), study=True))
    assert called == ["demo", "study"]


def test_warnings_are_kept_with_their_step(tmp_path, capsys):
    run = object.__new__(Run)
    run.folder = tmp_path
    run.warn(0, [])
    run.warn(4, ["first", "second"])
    rows = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert rows == [{"step": 5, "warning": "first"}, {"step": 5, "warning": "second"}]
    assert capsys.readouterr().err == "first\nsecond\n"


@pytest.mark.slow
def test_small_study_writes_everything_and_says_what_it_missed(tmp_path, monkeypatch):
    for name, value in {"REVIEWS": 256, "PAIRS": 80, "SAMPLES": 256, "BATCH": 64}.items():
        monkeypatch.setattr(demo, name, value)
    small = {"SWEEP_STEPS": 2, "SWEEP_POINTS": {1, 2}, "VARIANT_STEPS": 2, "SAMPLES": 64, "POINT_SAMPLES": 16}
    for name, value in (small | {"POOL_PARTS": 2, "DPO_EPOCHS": 1, "HELD_OUT_REVIEWS": 32}).items():
        monkeypatch.setattr(study, name, value)
    with pytest.raises(SystemExit, match=r"not as it should be: beta 0: gold fell by .*; beta 0: no warning"):
        study.main(DemoConfig(output_dir=str(tmp_path), seed=3, device="cpu", study=True))
    summary = json.loads((tmp_path / "study.json").read_text())
    assert [run["beta"] for run in summary["sweep"]] == list(study.BETAS)
    assert [p["step"] for p in summary["sweep"][0]["curve"]] == [0, 1, 2]
    assert len({variant["name"] for variant in summary["variants"]}) == len(summary["variants"]) == 9
    assert summary["best_of_n"][0]["gold"] == pytest.approx(summary["sft"]["gold"])
    assert {"study.png", "study.md"} <= {path.name for path in tmp_path.iterdir()}
    pairs = (tmp_path / "pairs.jsonl").read_text().count("\n")  # fewer than PAIRS: some reviews do not end
    for run in summary["dpo"]:
        assert run["curve"][-1]["step"] == math.ceil(pairs / study.DPO_BATCH)
        assert run["kl"] != 0.0


@pytest.mark.slow
def test_study_keeps_its_promises(tmp_path):
    study.main(DemoConfig(output_dir=str(tmp_path), device="cpu", study=True))
