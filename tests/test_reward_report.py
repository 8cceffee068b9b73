"""The report on held-out rows: figures against closed forms, the bag of words, the files."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter

import pytest
import torch
from tiny_models import sentence, write_jsonl

from rlhf import bag_of_words
from rlhf.bag_of_words import baseline_margins, differences, fit
from rlhf.comparisons import Comparison, Judged, load_judged, of_ranking
from rlhf.config import RewardConfig, RunConfig
from rlhf.data import TokenExample
from rlhf.model import load_scorer
from rlhf.reward_model import train
from rlhf.reward_report import Margins, auroc, by_margin, calibration_error, correlation, evaluate, reliability

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = RunConfig(output_dir="o", device="cpu")


def config_for(tiny_model, rows, folder, **changes) -> RewardConfig:
    base = {"model_name_or_path": tiny_model, "dataset_name": rows, "output_dir": str(folder), "max_length": 32}
    return RewardConfig(**base | {"device": "cpu", "learning_rate": 3e-3, "eval_fraction": 0.25} | changes)


def ranking(size: int) -> Judged:
    return of_ranking(TokenExample([4], [[5 + i] for i in range(size)], "", {}), [], Counter())


def margins_of(*values: float) -> Margins:
    """Of pairs, whose worse side scores 0."""
    return Margins.of([ranking(2) for _ in values], [torch.tensor([[v], [0.0]]) for v in values])


def test_the_standard_error_of_pairs_is_binomial():
    found = margins_of(*[0.3] * 7, *[-0.2] * 3).accuracy()
    assert found == pytest.approx({"accuracy": 0.7, "accuracy_se": math.sqrt(0.7 * 0.3 / 10)})
    assert margins_of(0.0, 0.0).accuracy()["accuracy"] == 0.5  # a tie is half a hit


def test_the_standard_error_of_rankings_is_that_of_their_rows():
    """Pairs of one prompt are not independent: each row counts by the share of its pairs that are in order."""
    scores = [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 1.0]]
    rows = [ranking(len(row)) for row in scores]
    found = Margins.of(rows, [torch.tensor(row)[:, None] for row in scores]).accuracy()
    shares = torch.tensor([1.0, 0.0, 2 / 3, 1.0], dtype=torch.float64)
    assert found["accuracy"] == pytest.approx(float(shares.mean()))
    assert found["accuracy_se"] == pytest.approx(float(shares.std(unbiased=False)) / 2)


def test_calibration_compares_confidence_with_accuracy():
    """Ten pairs at a confidence of 0.73, of which five are right, and ten at 0.95, all right."""
    margins = margins_of(*[1.0] * 5, *[-1.0] * 5, *[3.0] * 10)
    found = reliability(margins)
    low, high = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    assert [(b["confidence"], b["accuracy"], b["weight"]) for b in found] == [
        (pytest.approx(low), 0.5, 10.0),
        (pytest.approx(high), 1.0, 10.0),
    ]
    assert calibration_error(found) == pytest.approx((low - 0.5 + 1 - high) / 2)


def test_a_model_that_knows_its_odds_is_calibrated():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).abs() * 2
    right = torch.rand(20_000, generator=torch.Generator().manual_seed(2)) < torch.sigmoid(values)
    signed = torch.where(right, values, -values).double()
    margins = Margins(signed, torch.ones_like(signed), torch.zeros(20_000).long(), torch.arange(20_000))
    assert calibration_error(reliability(margins)) < 0.015
    assert [b["accuracy"] for b in by_margin(margins)] == sorted(b["accuracy"] for b in by_margin(margins))


def test_auroc_counts_pairs():
    above, below = torch.tensor([0.1, 0.5, 0.5, 2.0]), torch.tensor([0.5, -1.0, 0.3])
    wins = [(a > b) + (a == b) / 2 for a in above.tolist() for b in below.tolist()]
    assert auroc(above, below) == pytest.approx(sum(wins) / len(wins))


def test_correlation_is_pearsons_and_0_of_a_constant():
    x, y = torch.randn(2, 50)
    assert correlation(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-6)
    assert correlation(x, torch.ones(50)) == 0.0


def test_steps_have_balanced_accuracy_and_auroc():
    comparisons = [Comparison(0, None), Comparison(None, 1), Comparison(2, None), Comparison(3, None)]
    row = Judged([4], [[5, 6, 7, 8]], "", {}, places=[(0, i) for i in range(4)], comparisons=comparisons)
    config = RewardConfig(model_name_or_path="m", dataset_name="d", output_dir="o", reward_type="process")
    found = evaluate([row], [torch.tensor([[1.0], [0.5], [2.0], [-1.0]])], config)
    assert found["eval/accuracy"] == 0.5 and found["eval/right_share"] == 0.75
    assert found["eval/balanced_accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["eval/auroc"] == pytest.approx(2 / 3)
    expected = [math.log1p(math.exp(-m)) for m in (1.0, -0.5, 2.0, -1.0)]
    assert found["eval/loss"] == pytest.approx(sum(expected) / 4)


# The bag of words


@pytest.fixture(scope="module")
def scorer(one_thread, tiny_model):
    return load_scorer(tiny_model, RUN, head="zero")


def test_the_bag_of_words_is_at_its_optimum(scorer, pairs, tmp_path):
    rows = load_judged(config_for("m", pairs, tmp_path), scorer).examples
    learnt = differences(rows, scorer.tokenizer)
    assert learnt[0].counts == {"great": 1, "dull": -1}
    words = {"great": 0, "dull": 1, "bad": 2}
    weight = fit(learnt, words, 0.1)
    x = torch.tensor([[d.counts.get(word, 0) for word in words] for d in learnt], dtype=torch.float64)
    gradient = -(x * torch.sigmoid(-x @ weight)).mean(0)[:, None] + 0.1 * weight
    assert float(gradient.abs().max()) < 1e-6 and float(weight[0]) > 0 > float(weight[1])


def test_it_orders_what_words_decide_and_nothing_else(scorer, tmp_path):
    """Held-out pairs of known words, and of words that were never seen: a tie."""

    def written(name: str, good: str, bad: str, count: int) -> list[Judged]:
        rows = [{"prompt": sentence(i), "chosen": f" was {good}", "rejected": f" {bad} was"} for i in range(count)]
        return load_judged(config_for("m", write_jsonl(tmp_path / name, rows), tmp_path), scorer).examples

    training = written("train.jsonl", "great", "dull", 20)
    known, unknown = written("known.jsonl", "great", "dull", 4), written("unknown.jsonl", "fine", "bad", 4)
    margins = baseline_margins(training, known + unknown, scorer.tokenizer)
    assert (margins[:4] > 0.5).all() and (margins[4:] == 0).all()


def test_each_objective_and_each_step_has_words_of_its_own(scorer, tmp_path):
    rows = [
        {"prompt": sentence(i), "chosen": " great", "rejected": " very dull", "objective": {"kind": 1, "long": -1}}
        for i in range(12)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    judged = load_judged(config_for("m", path, tmp_path, objectives=["kind", "long"]), scorer).examples
    margins = baseline_margins(judged[:10], judged[10:], scorer.tokenizer)
    assert (margins > 0).all() and len(margins) == 4
    steps = [{"prompt": "the", "completions": [" great", " dull"], "labels": [True, i < 6]} for i in range(12)]
    path = write_jsonl(tmp_path / "steps.jsonl", steps)
    config = config_for("m", path, tmp_path, reward_type="process", step_separator="and")
    judged = load_judged(config, scorer).examples
    found = differences(judged[6:7], scorer.tokenizer)
    assert [d.counts for d in found] == [{"great": 1, "and": 1, "": 1}, {"dull": -1, "": -1}]


def test_the_penalty_is_chosen_on_rows_that_were_not_learnt_from(scorer, pairs, tmp_path, monkeypatch):
    rows = load_judged(config_for("m", pairs, tmp_path), scorer).examples
    fitted = []

    def watched(learnt, vocabulary, l2):
        fitted.append((len(learnt), l2))
        return fit(learnt, vocabulary, l2)

    monkeypatch.setattr(bag_of_words, "fit", watched)
    baseline_margins(rows, rows[:2], scorer.tokenizer)
    assert fitted == [*((25, l2) for l2 in bag_of_words.L2), (32, bag_of_words.L2[0])]  # separable: the least penalty


# Files


@pytest.fixture
def noisy(tmp_path) -> str:
    """Pairs of which a quarter is the wrong way round."""
    pairs = [(" was great", " was very bad")] * 3 + [(" was dull", " was great")]
    rows = [{"prompt": sentence(i), "chosen": (p := pairs[i % 4])[0], "rejected": p[1]} for i in range(48)]
    return write_jsonl(tmp_path / "noisy.jsonl", rows)


def test_the_report_says_what_the_metrics_say(tiny_model, noisy, tmp_path):
    result = train(config_for(tiny_model, noisy, tmp_path / "run", num_train_epochs=4.0, eval_steps=6))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for name in ("accuracy", "accuracy_se", "baseline_accuracy", "ece", "length_correlation", "loss", "margin"):
        assert report[name] == result.metrics[f"eval/{name}"]
    assert report["rows"] == {"trained": 36, "held_out": 12} and report["comparisons"] == 12
    assert sum(b["weight"] for b in report["by_margin"]) == sum(b["weight"] for b in report["reliability"]) == 12
    assert sum(report["histogram"]["better"]) == sum(report["histogram"]["worse"]) == 12
    assert [p["step"] for p in report["curve"] if "eval/accuracy" in p] == [6, 12, 18]
    held = load_judged(config_for(tiny_model, noisy, "o"), load_scorer(tiny_model, RUN, head="zero")).split(0.25, 1)[1]
    differ = [len(b) - len(w) for b, w in (row.completions for row in held.examples)]
    judged = sum(d > 0 for d in differ) / sum(d != 0 for d in differ)
    assert report["longer_preferred_by_judges"] == pytest.approx(judged)
    assert (tmp_path / "run" / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_picture_is_left_out(tiny_model, pairs, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    train(config_for(tiny_model, pairs, tmp_path, max_steps=1))
    assert "report.png is left out: pip install matplotlib" in capsys.readouterr().err
    assert (tmp_path / "report.json").exists() and not (tmp_path / "report.png").exists()


def test_without_held_out_rows_there_is_no_report(tiny_model, pairs, tmp_path):
    result = train(config_for(tiny_model, pairs, tmp_path, max_steps=1, eval_fraction=0.0))
    assert not (tmp_path / "report.json").exists() and not any(name.startswith("eval/") for name in result.metrics)
