"""The demo: its task against closed forms, a small run of it, and (slow) the whole with its promises."""

import json
import math
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf import demo, task
from rlhf.config import DemoConfig, UsageError


def test_reviews_are_grammatical_and_of_both_sentiments():
    rng = random.Random(0)
    reviews = [task.sample_review(rng).split() for _ in range(2000)]
    assert {task.violations(review) for review in reviews} == {0}
    lengths = [len(review) for review in reviews]
    assert (min(lengths), max(lengths)) == (10, 24)
    balances = [sum((word in task.GOOD) - (word in task.BAD) for word in review) for review in reviews]
    assert abs(sum(balances) / len(balances)) < 0.2
    assert sum(abs(balance) >= 3 for balance in balances) > 0.35 * len(balances)  # 0.14 if adjectives were independent


@pytest.mark.parametrize(
    ("review", "count"),
    [
        ("the film was good .", 0),
        ("the film was very good and bad . the plot was dull .", 0),
        ("", 1),
        ("the film was good", 1),  # no end
        ("film was good .", 1),
        ("the film was good and bad and dull .", 1),  # one `and` a sentence
        ("the film was good and bad . the plot was good and bad .", 0),
        ("the film was was good .", 1),
        ("the film was good and very dull .", 1),
        ("the film was . .", 2),
        ("the film was nice .", 2),  # an unknown word, and what follows it
    ],
)
def test_violations(review, count):
    assert task.violations(review.split()) == count


@pytest.mark.parametrize(
    ("review", "reward"),
    [
        ("the film was good .", 2 * math.tanh(0.5)),
        ("the film was good and great . the plot was fresh and bold .", 2 * math.tanh(2)),
        ("the film was good and bad .", 0.0),
        ("the film was good and good .", 2 * math.tanh(1) - 0.5),
        ("the film was good . the plot was good .", 2 * math.tanh(1)),  # twice, but not in one sentence
        ("the film was dull", 2 * math.tanh(-0.5) - 1),
    ],
)
def test_gold(review, reward):
    assert task.gold(review) == pytest.approx(reward, abs=1e-12)
    assert task.gold_reward(["review"], [review], other=[1]) == [task.gold(review)]


def test_preferences_have_bradley_terry_noise():
    better, worse = "the film was good .", "the film was dull ."
    rng, draws = random.Random(1), 20_000
    wins = sum(task.prefer(better, worse, rng) == (better, worse) for _ in range(draws))
    expected = 1 / (1 + math.exp(-4 * math.tanh(0.5)))
    assert wins / draws == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / draws))
    swapped = sum(task.prefer(worse, better, rng) == (better, worse) for _ in range(draws))
    assert swapped / draws == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / draws))


def test_known_optimum_of_two_outcomes():
    """Reward 1 with probability 1/4, else 0: every figure in closed form."""
    beta = 0.4
    found = task.known_optimum(torch.tensor([0.0, 0.0, 0.0, 1.0]), beta)
    partition = 0.75 + 0.25 * math.exp(1 / beta)
    tilted = 0.25 * math.exp(1 / beta) / partition
    assert found.objective == pytest.approx(beta * math.log(partition))
    assert found.baseline == pytest.approx(0.25)
    assert found.reward == pytest.approx(tilted)
    assert found.kl == pytest.approx(tilted * math.log(tilted / 0.25) + (1 - tilted) * math.log((1 - tilted) / 0.75))
    assert found.effective_samples == pytest.approx(1 / (tilted**2 + (1 - tilted) ** 2 / 3))


def test_known_optimum_of_normal_rewards():
    """N(m, s^2): J* = m + s^2 / (2 beta), where the mean moves by s^2 / beta."""
    rewards = 0.3 + 0.5 * torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    found = task.known_optimum(rewards, 0.5)
    assert found.objective == pytest.approx(0.3 + 0.25, abs=0.01)
    assert found.reward == pytest.approx(0.3 + 0.5, abs=0.02)


@given(st.lists(st.floats(0.01, 1), min_size=5, max_size=5), st.floats(0.05, 5))
def test_no_policy_beats_the_known_optimum(weights, beta):
    rewards = torch.tensor([-1.0, 0.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    policy = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    kl = float((policy * (policy * 5).log()).sum())
    found = task.known_optimum(rewards, beta)
    assert found.score(float((policy * rewards).sum()), kl) <= 1 + 1e-9
    assert found.score(found.reward, found.kl) == pytest.approx(1)
    assert found.score(found.baseline, 0.0) == pytest.approx(0)


def test_score_ignores_a_constant_reward():
    rewards = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = [task.known_optimum(rewards + c, 0.4).score(0.7 + c, 0.9) for c in (0.0, -100.0, 1000.0)]
    assert scores == pytest.approx(scores[:1] * 3, rel=1e-9)


@pytest.mark.parametrize("rewards", [[], [1.0], [2.0, 2.0, 2.0]])
def test_known_optimum_needs_different_rewards(rewards):
    with pytest.raises(ValueError, match="rewards: expected at least two different values"):
        task.known_optimum(torch.tensor(rewards), 0.4)


def test_small_demo_writes_everything_and_says_what_it_missed(tmp_path, monkeypatch, capsys):
    """Every stage in miniature: too little training to keep the promises, which must be said and not passed over."""
    small = {"REVIEWS": 256, "PAIRS": 80, "PPO_STEPS": 2, "SAMPLES": 128, "CURVE_SAMPLES": 16, "BATCH": 64}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit, match=r"PPO \(gold\) scored .* of the known optimum, expected 0.9"):
        demo.main(DemoConfig(output_dir=str(tmp_path), seed=3, device="cpu"))
    assert torch.get_num_threads() == threads

    summary = json.loads((tmp_path / "summary.json").read_text())
    stages = summary["stages"]
    assert [stage["name"] for stage in stages] == ["SFT", "reward model", "PPO (proxy)", "PPO (gold)"]
    assert stages[0]["kl"] == 0.0
    assert [point["step"] for point in stages[3]["curve"]] == [0, 1, 2]
    assert stages[3]["curve"][0]["gold"] == stages[0]["gold"] == pytest.approx(summary["optimum"]["baseline"])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert all(stage["name"] in table for stage in stages)
    vocabulary = json.loads((tmp_path / "sft" / "final" / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == 32
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)


def test_a_demo_makes_room_for_itself_only(tmp_path):
    (tmp_path / "sft" / "final").mkdir(parents=True)
    with pytest.raises(UsageError, match="sft is there and not of an earlier demo: use another output_dir"):
        demo.main(DemoConfig(output_dir=str(tmp_path)))
    assert (tmp_path / "sft" / "final").exists()
    (tmp_path / "reviews.jsonl").touch()
    (tmp_path / "notes").mkdir()
    demo.make_room(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "reviews.jsonl"]


def test_shortfalls_take_nan_for_a_failure():
    kept = {"gold_gain": {"PPO (gold)": 1.5}, "score": 0.95}
    assert demo.shortfalls(kept) == []
    assert len(demo.shortfalls({"gold_gain": {"PPO (gold)": math.nan}, "score": math.nan})) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_demo_keeps_its_promises(tmp_path, seed):
    command = [sys.executable, "-m", "rlhf", "demo", "--output_dir", str(tmp_path), "--seed", str(seed)]
    subprocess.run([*command, "--device", "cpu"], check=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["score"] >= 0.9
    assert min(summary["gold_gain"].values()) >= 1.0
