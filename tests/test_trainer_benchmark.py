"""The trainer benchmark at tiny sizes, ours alone: its phases are the step's, its file and picture hold all of it."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import trainer
from benchmarks.peers import dpo_step, meter, models, ppo_step, rlhf_step, steps

pytestmark = pytest.mark.usefixtures("one_thread")
PHASES = {
    "ppo": ["generation", "scoring", "advantages", "update", "rest"],
    "dpo": ["reference", "gradient", "optimizer", "rest"],
}


@pytest.fixture
def in_process(monkeypatch):
    """The modules that processes of their own would run, here, where everything is imported already."""
    mains = {"benchmarks.peers.models": models.write, "benchmarks.peers.rlhf_step": rlhf_step.main}

    def run(*command, threads):
        assert command[:2] == (sys.executable, "-m") and threads == 1
        mains[command[2]](*map(Path, command[3:]))

    monkeypatch.setattr(steps, "run", run)


def arguments(tmp_path, **others) -> Namespace:
    known = {"device": "cpu", "quick": True, "seconds": 1.0, "threads": 1, "json": tmp_path / "trainer.json"}
    return Namespace(**known | {"plots": None, "alone": True} | others)


def test_quick_run_alone(in_process, tmp_path):
    pytest.importorskip("matplotlib")
    assert trainer.main(arguments(tmp_path, plots=tmp_path / "plots")) == 0
    report = json.loads((tmp_path / "trainer.json").read_text())
    assert report["format"] == steps.FORMAT and report["machine"]["device"] == "cpu" and report["machine"]["command"]
    names = [(r["trainer"], r["name"]) for r in report["results"]]
    assert names == [("ppo", "OPT, tiny"), ("ppo", "vocabulary 64"), ("dpo", "vocabulary 64")]
    for result in report["results"]:
        assert result["failed"] == {} and result["trl_over_rlhf"] == {} and "lengths" not in result["settings"]
        (ours,) = result["providers"].values()
        assert list(ours["phases_s"]) == PHASES[result["trainer"]] and len(ours["seconds"]) == 2
        for seconds, phases in zip(ours["seconds"], ours["phases"]):
            assert sum(phases.values()) == pytest.approx(seconds) and min(phases.values()) > 0
            assert phases["rest"] < 0.9 * seconds
        assert ours["step_s"] == ours["seconds"][1] and ours["phases_s"] == ours["phases"][1]
        assert 0 < ours["built_bytes"] < ours["peak_bytes"]
        assert ours["growth_bytes"] == ours["peak_bytes"] - ours["built_bytes"]
    assert (tmp_path / "plots/trainer-cpu.png").stat().st_size > 10_000


def test_one_that_fails_is_recorded_and_the_others_run(in_process, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise steps.StepError("first line\nout of memory")

    monkeypatch.setattr(trainer.ppo_step, "check", refuse)
    assert trainer.main(arguments(tmp_path, kinds=("op", "trainer"))) == 1
    assert not (tmp_path / "trainer.json").exists()  # is the op benchmarks' where they run, too
    results = json.loads((tmp_path / "trainer-trainer.json").read_text())["results"]
    assert [r["failed"] for r in results] == [{"rlhf": "out of memory"}, {"rlhf": "out of memory"}, {}]
    assert "PPO step, OPT, tiny failed: out of memory" in capsys.readouterr().out


def test_a_missing_rival_is_said(in_process, tmp_path, monkeypatch, capsys):
    nowhere = steps.ROOT / "no-such-environment/bin/python"
    monkeypatch.setattr(steps, "TRL_PYTHON", dict.fromkeys(("ppo", "dpo"), nowhere))
    of_dpo = [one for one in trainer.comparisons("cpu", 1, True) if one.settings["trainer"] == "dpo"]
    monkeypatch.setattr(trainer, "comparisons", lambda *_: of_dpo)
    assert trainer.main(arguments(tmp_path, alone=False)) == 0
    (result,) = json.loads((tmp_path / "trainer.json").read_text())["results"]
    assert "make peers" in result["failed"]["trl"] and list(result["providers"]) == ["rlhf"]
    assert "ours runs alone" in capsys.readouterr().out


def test_other_work_is_refused():
    settings = ppo_step.settings_of(1, name="", vocab=64, threads=1)
    tokens = [sum(lengths) for lengths in settings["lengths"][:2]]
    row = {"response_tokens": tokens, "seconds": [1, 1], "entropy": [200.0, 200.0]}
    ppo_step.check({"rlhf": row, "trl": row | {"entropy": [201.9, 0]}}, settings)
    for other in ({"response_tokens": tokens[:1]}, {"seconds": [1]}, {"entropy": [203.0, 200.0]}):
        with pytest.raises(steps.StepError):
            ppo_step.check({"rlhf": row, "trl": row | other}, settings)
    settings, row = dpo_step.settings_of(1, name="", vocab=64, threads=1), {"losses": [0.7, 0.6], "seconds": [1, 1]}
    dpo_step.check({"rlhf": row, "trl": row | {"losses": [0.7, 0.60009]}}, settings)
    for other in ({"losses": [0.7]}, {"losses": [0.7, 0.6002]}):
        with pytest.raises(steps.StepError):
            dpo_step.check({"rlhf": row, "trl": row | other}, settings)


def test_ours_stands_where_trl_did_other_work(monkeypatch, tmp_path):
    rows = iter([{"losses": [0.7, 0.6]}, {"losses": [0.7, 0.5]}])
    common = {"step_s": 1.0, "cpu_s": 1.0, "growth_bytes": 1, "peak_bytes": 2, "seconds": [1, 1]}
    monkeypatch.setattr(steps, "run", lambda *_, **__: None)
    monkeypatch.setattr(steps, "measured", lambda *_: common | next(rows))
    monkeypatch.setattr(steps, "TRL_PYTHON", {"dpo": Path(sys.executable)})
    record = steps.compare(dpo_step.settings_of(1, name="", vocab=64, threads=1), dpo_step.check)
    assert list(record["providers"]) == ["rlhf"] and record["trl_over_rlhf"] == {}
    assert record["failed"]["trl"].startswith("it did other work: the losses of rlhf and trl differ")


def test_all_comparisons_can_be_made_for_a_gpu():
    found = list(trainer.comparisons("cuda", 2, False))
    others = [(name, vocab) for vocab in (151_936, 32_000, 512) for name in ("ppo", "dpo")]
    assert [(c.settings["trainer"], c.settings["vocab"]) for c in found] == [("ppo", 50_272), *others]
    opt = found[0].settings
    shape = [opt[name] for name in ("prompts", "prompt_length", "response_length", "epochs", "longest")]
    assert shape == [8, 256, 128, 1, 384] and found[0].published["DeepSpeed, eager"]["step_s"] == 0.8128


def test_the_opt_models_are_those_of_their_names():
    """Parameters of facebook/opt-1.3b and opt-350m, which have 2,050 positions."""
    import torch
    from transformers import AutoModelForCausalLM

    for shape, parameters in ((trainer.OPT_1B, 1_315_758_080), (trainer.OPT_350M, 331_196_416)):
        with torch.device("meta"):
            config = models.model_config(50_272, 384, **shape)
            assert AutoModelForCausalLM.from_config(config).num_parameters() == parameters


def test_figures_are_those_of_the_median_step():
    row = {"seconds": [9.0, 3.0, 1.0, 2.0], "cpu_seconds": [9.0, 1.0, 2.0, 3.0], "built_bytes": 2, "peak_bytes": 5}
    found = steps.summary(row | {"phases": [{"a": n} for n in range(4)]})
    assert [found[name] for name in ("step_s", "cpu_s", "phases_s", "growth_bytes")] == [2.0, 2.0, {"a": 3}, 3]


def test_a_meters_phases_are_the_step():
    found = meter.Meter("cpu")
    found.weigh()
    found.start()
    for _ in range(2):
        for phase in ("a", "b", "a"):
            found.enter(phase)
            time.sleep(0.02)
        found.enter(meter.REST)
        time.sleep(0.01)
        found.step()
    row = found.row()
    for seconds, phases in zip(row["seconds"], row["phases"]):
        assert list(phases) == ["a", "b", "rest"] and sum(phases.values()) == pytest.approx(seconds)
        assert phases["a"] > 0.04 and 0.02 < phases["b"] < phases["a"] and phases["rest"] > 0.01
    assert len(row["seconds"]) == 2 and row["peak_bytes"] >= row["built_bytes"] > 1e6
