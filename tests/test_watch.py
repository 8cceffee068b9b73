"""Each signal against its value by hand; each warning where it is due, nowhere else, and the same after a restart."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import PPOConfig
from rlhf.watch import DECAY, PAUSE, Watch, correlation, distinct, health

CONFIG = PPOConfig(model_name_or_path="m", dataset_name="d", output_dir="o", reward=["module:function"])
HEALTHY = {
    "watch/score": 1.0, "watch/gold": 1.0, "watch/gold_std": 1.0, "watch/kl": 2.0, "watch/entropy": 2.0,
    "watch/length": 40.0, "watch/distinct_2": 0.8, "watch/eos_rate": 0.9, "watch/score_length_correlation": 0.3,
}  # fmt: skip
RESPONSES = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=6)
FINITE = st.floats(-1e6, 1e6, width=32)


def warnings(steps: list[dict], config: PPOConfig = CONFIG, state: dict | None = None, start: int = 0) -> list[str]:
    watch = Watch(config, {} if state is None else state)
    return [line for step, signals in enumerate(steps, start) for line in watch.check(step, HEALTHY | signals)]


def about(lines: list[str], name: str) -> list[int]:
    """The steps, from 1, at which a field warned."""
    return [int(line.split(":")[0].removeprefix("step ")) for line in lines if f"warn_{name} " in line]


# Signals


def test_signals_by_hand():
    """Tokens 1 2 1 | 2 1 2 1 | 1: 2 of 8 differ; pairs 12 21 | 21 12 21: 2 of 5; none spans two responses."""
    ids = [[1, 2, 1], [2, 1, 2, 1], [1]]
    scores, gold = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.0, 3.0, 0.0])
    got = health(ids, torch.tensor([True, False, True]), scores, 1.5, 0.25, gold)
    assert got == pytest.approx({
        "watch/score": 2 / 3, "watch/kl": 0.25, "watch/entropy": 1.5, "watch/length": 8 / 3, "watch/distinct_1": 2 / 8,
        "watch/distinct_2": 2 / 5, "watch/eos_rate": 2 / 3, "watch/gold": 1.0, "watch/gold_std": math.sqrt(2.0),
        # deviations of the scores (1, 4, -5) / 3 and of the lengths (1, 4, -5) / 3
        "watch/score_length_correlation": 1.0,
    })  # fmt: skip
    assert all(type(value) is float for value in got.values())
    assert not {"watch/gold", "watch/gold_std"} & health(ids, torch.ones(3, dtype=torch.bool), scores, 1.5, 0.0).keys()


def test_distinct_without_any_ngram_is_1():
    assert distinct([[], [5]], 2) == 1.0 and distinct([[], []], 1) == 1.0
    assert distinct([[7, 7, 7, 7]], 2) == pytest.approx(1 / 3)


def test_correlation_by_hand():
    """x - 2 = (-1, 0, 1), y - 3 = (-1, -1, 2): 3 / sqrt(2 * 6)."""
    x, y = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 5.0]).double()
    assert correlation(x, y) == pytest.approx(3 / math.sqrt(12))
    assert correlation(-x, y) == pytest.approx(-3 / math.sqrt(12))


@pytest.mark.parametrize("scores", [[0.1] * 7, [float("nan")] * 7, [float("inf")] + [0.0] * 6])
def test_correlation_with_what_is_constant_or_not_finite_is_0(scores):
    """In float64 the mean of 0.1 seven times is not 0.1 to the bit."""
    scores, lengths = torch.tensor(scores, dtype=torch.float64), torch.tensor([3.0, 1, 9, 4, 4, 8, 2]).double()
    assert correlation(scores, lengths) == pytest.approx(0.0, abs=1e-12)
    assert correlation(lengths, scores) == pytest.approx(0.0, abs=1e-12)


@given(RESPONSES, st.data())
def test_signals_keep_their_ranges_and_ignore_the_order_of_rows(ids, data):
    rows = len(ids)
    scores, gold = (data.draw(st.lists(FINITE, min_size=rows, max_size=rows)) for _ in range(2))
    ends = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    order = data.draw(st.permutations(range(rows)))

    def of(rows) -> dict[str, float]:
        picked = ([values[row] for row in rows] for values in (ids, ends, scores, gold))
        ids_, ends_, scores_, gold_ = picked
        return health(ids_, torch.tensor(ends_), torch.tensor(scores_), 1.0, 0.0, torch.tensor(gold_))

    got = of(range(rows))
    assert all(map(math.isfinite, got.values()))
    assert 0 < got["watch/distinct_1"] <= 1 and 0 < got["watch/distinct_2"] <= 1
    assert -1 <= got["watch/score_length_correlation"] <= 1
    assert 0 <= got["watch/eos_rate"] <= 1 and got["watch/gold_std"] >= 0
    assert of(order) == pytest.approx(got, rel=1e-6, abs=1e-6)


@given(RESPONSES, st.integers(1, 3))
def test_a_batch_twice_is_half_as_distinct(ids, n):
    has_any = any(len(row) >= n for row in ids)
    assert distinct(ids + ids, n) == pytest.approx(distinct(ids, n) / 2 if has_any else 1.0)


# Warnings


@pytest.mark.parametrize(
    ("name", "signal", "silent", "loud"),
    [
        ("kl", "kl", 20.0, 20.1),
        ("distinct", "distinct_2", 0.41, 0.39),
        ("length", "length", 79.0, 81.0),
        ("entropy", "entropy", 0.41, 0.39),
        ("eos_rate", "eos_rate", 0.5, 0.49),
    ],
)
def test_a_warning_is_given_beyond_its_bound_alone(name, signal, silent, loud):
    steps = [{}] * 5 + [{f"watch/{signal}": silent}] * 5
    assert warnings(steps) == []
    lines = warnings([*steps, {f"watch/{signal}": loud}])
    assert len(lines) == 1 and about(lines, name) == [11]
    assert warnings([*steps, {f"watch/{signal}": loud}], replace(CONFIG, **{f"warn_{name}": None})) == []


def test_what_a_warning_says():
    [line] = warnings([{}] * 3 + [{"watch/length": 100.0}])
    assert line == (
        "step 4: warning: responses have 100 tokens, above warn_length 2 times the first 40: "
        "length may be what the reward pays for: read samples.jsonl, set length_penalty"
    )


def test_the_first_value_is_a_mean_of_three_steps():
    """(10 + 40 + 70) / 3 = 40: a first step that is odd by itself is no baseline, and gives no warning either."""
    first = [{"watch/length": length} for length in (10.0, 40.0, 70.0)]
    assert warnings([*first, {"watch/length": 79.0}]) == []
    assert about(warnings([*first, {"watch/length": 81.0}]), "length") == [4]


def test_one_batch_that_correlates_is_no_warning():
    high = {"watch/score_length_correlation": 0.95}
    assert warnings([high, {}, {}, {}, {}, {}, high, *[{}] * 9, high]) == []
    assert len(about(warnings([{}] * 5 + [high] * 15), "length_correlation")) == 1
    assert warnings([{}] * 5 + [{"watch/score_length_correlation": -0.95}] * 20) == []


def gold_run(score_slope: float, drop: float) -> list[dict]:
    """Gold is 2 for 30 steps, falls by `drop` over ten and stays there for 30; the score has one slope throughout."""
    gold = [2.0] * 30 + [2 - drop * min(step, 10) / 10 for step in range(1, 41)]
    return [{"watch/gold": g, "watch/score": 1 + score_slope * step} for step, g in enumerate(gold)]


def test_gold_that_falls_while_the_score_rises():
    lines = warnings(gold_run(0.1, 1.5))
    first, *rest = about(lines, "gold_drop")
    assert 31 < first <= 40 and rest == [*range(first + PAUSE, 71, PAUSE)]
    assert "gold_reward has fallen from 2 at step" in lines[0] and "while the score rose from" in lines[0]
    assert warnings(gold_run(-0.1, 1.5)) == []  # gold and score fall together: bad training, but no gaming
    assert warnings(gold_run(0.1, 0.4)) == []
    assert about(warnings(gold_run(0.1, 0.4), replace(CONFIG, warn_gold_drop=0.1)), "gold_drop")
    wide = [step | {"watch/gold_std": 4.0} for step in gold_run(0.1, 1.5)]
    assert warnings(wide) == []  # 1.5 of a deviation of 4
    assert warnings(gold_run(0.1, 1.5), replace(CONFIG, warn_gold_drop=None)) == []


def test_the_drop_of_gold_is_of_exponential_means():
    """Gold 3 for ten steps, then 0: the mean after k steps is 3 * DECAY**k (of ten steps before, 1 - DECAY**10)."""
    weights = 1 - DECAY**10

    def mean(k: int) -> float:
        return 3 * DECAY**k * weights / (1 - DECAY ** (10 + k))

    due = next(k for k in range(1, 9) if 3 - mean(k) > 0.9)
    run = [{"watch/gold": 3.0, "watch/score": 1.0}] * 10 + [{"watch/gold": 0.0, "watch/score": 1.5}] * 8
    [line] = warnings(run, replace(CONFIG, warn_gold_drop=0.9))
    assert about([line], "gold_drop") == [10 + due] and f"to {mean(due):.3g}," in line


def test_gold_that_one_lucky_batch_made_best_gives_no_warning():
    lucky = {"watch/gold": 2.5}
    rising = [{"watch/score": 1 + step / 10} for step in range(20)]
    assert warnings([rising[0] | lucky, *rising[1:]]) == []
    assert warnings([*rising[:9], rising[9] | lucky, *rising[10:]]) == []


def test_gold_that_nothing_earns_at_first_has_no_scale_yet():
    nothing = [{"watch/gold": 0.0, "watch/gold_std": 0.0, "watch/score": step / 10} for step in range(9)]
    assert warnings(nothing) == []
    falls = [{"watch/gold": 1 - step / 10, "watch/gold_std": 0.1, "watch/score": 1 + step} for step in range(10)]
    assert about(warnings(nothing + falls), "gold_drop")


def test_a_warning_that_holds_is_repeated_every_ten_steps_and_counted():
    metrics, watch = [HEALTHY | {"watch/kl": 30.0} for _ in range(25)], Watch(CONFIG, {})
    lines = [line for step, row in enumerate(metrics) for line in watch.check(step, row)]
    assert about(lines, "kl") == [1, 11, 21]
    assert [row["watch/warnings"] for row in metrics] == [1] * 10 + [2] * 10 + [3] * 5
    flapping = [{"watch/kl": 30.0 if step % 2 else 1.0} for step in range(20)]
    assert about(warnings(flapping), "kl") == [2, 12]


SIGNALS = st.fixed_dictionaries({
    name: st.one_of(st.floats(width=32), st.sampled_from([value, value / 10, value * 10, 0.0, None]))
    for name, value in HEALTHY.items()
})  # fmt: skip


@given(st.lists(SIGNALS, max_size=30), st.data())
def test_a_run_that_was_stopped_warns_as_one_that_was_not(steps, data):
    """At any step, with any values, the ones that are no numbers among them."""
    stop = data.draw(st.integers(0, len(steps)))
    whole, state = {}, {}
    expected = warnings(steps, state=whole)
    before = warnings(steps[:stop], state=state)
    state = json.loads(json.dumps(state))
    assert before + warnings(steps[stop:], state=state, start=stop) == expected
    assert state == whole
    assert whole.get("watch", {"count": 0})["count"] == len(expected)


def test_signals_that_are_missing_or_not_finite_are_passed_over():
    odd = [dict.fromkeys(HEALTHY, value) for value in (float("nan"), float("inf"), -float("inf"), None)]
    assert warnings(odd) == []
    assert about(warnings([*odd, {}, {}, {}, {"watch/length": 81.0}]), "length") == [8]
    unknown = {"watch/score": None, "watch/gold": 9.0}  # neither a new best nor a drop, as the score may have fallen
    assert warnings([{}] * 12 + [unknown, {"watch/score": 2.0}, unknown | {"watch/gold": -99.0}]) == []
    metrics: dict = {"objective/kl": 99.0}
    assert Watch(CONFIG, {}).check(0, metrics) == [] and metrics == {"objective/kl": 99.0, "watch/warnings": 0}
