"""The benchmark of rankings against pairs: its data are as it says, and its table adds up."""

from __future__ import annotations

import json
import math
import random
from itertools import combinations

import pytest

from benchmarks import reward_rankings
from rlhf import task


def test_each_pair_of_a_ranking_is_as_noisy_as_a_pair():
    """The one with the higher gold reward comes first as often as Bradley-Terry has it, whatever K is."""
    for size, count in ((2, 4_000), (4, 1_200), (9, 300)):
        right, expected = 0.0, 0.0
        for row in reward_rankings.rankings(count, size, random.Random(size)):
            pairs = [(task.gold(a), task.gold(b)) for a, b in combinations(row, 2)]
            right += sum(a > b for a, b in pairs if a != b) / len(pairs)
            expected += sum(1 / (1 + math.exp(-abs(a - b))) for a, b in pairs if a != b) / len(pairs)
        assert right / count == pytest.approx(expected / count, abs=0.03)


def test_held_out_pairs_stand_in_the_order_of_gold(monkeypatch):
    monkeypatch.setattr(reward_rankings, "HELD_OUT", 50)
    pairs = reward_rankings.held_out(random.Random(1))
    assert len(pairs) == 50 and all(task.gold(better) > task.gold(worse) for better, worse in pairs)


def test_every_way_learns_from_as_many_comparisons(monkeypatch, tmp_path, capsys):
    for name, value in {"COMPARISONS": 72, "HELD_OUT": 20, "EPOCHS": 1}.items():
        monkeypatch.setattr(reward_rankings, name, value)
    assert reward_rankings.main(["--seeds", "1", "--json", str(tmp_path / "report.json")]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["results"]
    assert [row["responses"] for row in rows] == [144, 48, 48, 18, 18]
    assert [row["sequences"] for row in rows] == [144, 48, 144, 18, 144]
    assert rows[0]["gain"] == 0.0 and all(0 <= row["mean"] <= 1 for row in rows)
    assert "| rankings of 9, pairs apart |" in capsys.readouterr().out
