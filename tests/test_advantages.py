"""From scores and KL to advantages in the trainer: each estimator by hand, where scores stand, groups, whitening."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from test_losses import ppo_config
from test_ppo_invariance import models_of, sampled

from rlhf.advantages import score, token_rewards, with_advantages
from rlhf.data import load
from rlhf.model import load_tokenizer
from rlhf.ppo import prompts_of
from rlhf.read import Source
from rlhf.tokens import Reader
from rlhf.types import Experience, pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS, WIDTH = [3, 5, 1], 5
PLAIN = {"gamma": 1.0, "lam": 1.0, "whiten_advantages": False, "kl_coef": 0.3}
VALUES = {
    "k1": lambda x: x,
    "abs": abs,
    "k2": lambda x: 0.5 * x * x,
    "k3": lambda x: math.exp(-x) - 1 + x,
}


def rows_of(tensor: torch.Tensor) -> list[list[float]]:
    return [row[:n] for row, n in zip(tensor.tolist(), LENGTHS)]


def experience(pad: int = 0, **changes) -> Experience:
    """Three responses of 3, 5 and 1 tokens; no values."""
    batch = pad_sequences([[4], [4, 5], [6]], [[7] * n for n in LENGTHS], pad)
    logprobs, ref = -torch.rand(3, WIDTH) - 0.1, -torch.rand(3, WIDTH) - 0.1
    kl, zeros = torch.rand(3, WIDTH), torch.zeros(3, WIDTH)
    mask = batch.response_mask
    columns = [x * mask for x in (logprobs, ref, kl)]
    scores = torch.tensor([2.0, -1.0, 0.5])
    return replace(Experience(batch, *columns, scores, values=zeros), **changes)


def to_go(rewards: list[float], gamma: float = 1.0) -> list[float]:
    found, total = [], 0.0
    for reward in reversed(rewards):
        total = reward + gamma * total
        found.append(total)
    return found[::-1]


def assert_rows(found: torch.Tensor, expected: list[list[float]]) -> None:
    padded = torch.tensor([row + [0.0] * (WIDTH - len(row)) for row in expected])
    torch.testing.assert_close(found, padded, rtol=1e-5, atol=1e-6)


# Where scores stand


@pytest.mark.parametrize("pad", [0, 2, 7])
def test_a_score_stands_on_the_last_counted_token(pad):
    """TRL#3750, DSE#672: not one position after it, whatever the padding is, and on the last column too. With a
    discount of a half each token before sees half of the one after."""
    given = experience(pad)
    found = with_advantages(given, ppo_config("m", **PLAIN | {"kl_coef": 0.0, "gamma": 0.5}), 0.0)
    expected = [[s * 0.5 ** (n - 1 - t) for t in range(n)] for s, n in zip([2.0, -1.0, 0.5], LENGTHS)]
    assert_rows(found.returns, expected)
    assert_rows(found.advantages, expected)
    assert_rows(token_rewards(given), [[0.0, 0.0, 2.0], [0.0] * 4 + [-1.0], [0.5]])


def test_rewards_of_tokens_are_paid_where_they_stand():
    rewards = torch.tensor([[1.0, 0.0, 2.0, 0, 0], [0.0, 0.0, 3.0, 0.0, -1.0], [4.0, 0, 0, 0, 0]])
    given = experience(rewards=rewards, scores=rewards.sum(1))
    assert torch.equal(token_rewards(given), rewards)
    for estimator in ("k1", "full"):
        config = ppo_config("m", **PLAIN | {"kl_coef": 0.0, "kl_estimator": estimator, "gamma": 0.9})
        expected = [to_go(row, 0.9) for row in rows_of(rewards)]
        assert_rows(with_advantages(given, config, 0.0).returns, expected)


# KL in the reward


@pytest.mark.parametrize("estimator", VALUES)
@pytest.mark.parametrize("by_token", [False, True])
def test_the_penalty_of_each_token_by_hand(estimator, by_token):
    """verl#179: its sign. Detail 12: -coef * estimate on every token, of sampling and reference log-probabilities."""
    given = experience()
    if by_token:
        rewards = torch.rand(3, WIDTH) * given.sequences.response_mask
        given = replace(given, rewards=rewards, scores=rewards.sum(1))
    found = with_advantages(given, ppo_config("m", **PLAIN, kl_estimator=estimator), 0.3)
    expected = []
    for lp, ref, paid in zip(*map(rows_of, (given.logprobs, given.ref_logprobs, token_rewards(given)))):
        expected.append(to_go([r - 0.3 * VALUES[estimator](a - b) for a, b, r in zip(lp, ref, paid)]))
    assert_rows(found.returns, expected)


def test_an_exact_kl_is_taken_as_it_is():
    given = experience()
    found = with_advantages(given, ppo_config("m", **PLAIN, kl_estimator="full"), 0.3)
    rows = zip(rows_of(given.kl), rows_of(token_rewards(given)))
    assert_rows(found.returns, [to_go([r - 0.3 * kl for kl, r in zip(*row)]) for row in rows])


@pytest.mark.parametrize("estimator", ["k1", "k3+", "full"])
@pytest.mark.parametrize("kind", ["gae", "grpo_no_std"])
def test_a_penalty_in_the_loss_is_not_in_the_reward_too(estimator, kind):
    """verl#211: it was counted twice."""
    sizes = {"advantage": kind, "num_generations": 2, "per_device_train_batch_size": 4} if kind != "gae" else {}
    config = ppo_config("m", **PLAIN, kl_in="loss", kl_estimator=estimator, **sizes)
    given = experience()
    if kind != "gae":
        given = given.rows(torch.tensor([0, 1]))
    found, without = (with_advantages(given, replace(config, kl_coef=c), c) for c in (0.3, 0.0))
    assert torch.equal(found.advantages, without.advantages)
    in_reward = replace(config, kl_in="reward", kl_estimator=estimator.removesuffix("+"))
    assert not torch.equal(with_advantages(given, in_reward, 0.3).advantages, without.advantages)


def distributions(model, batch, temperature: float) -> torch.Tensor:  # (B, R, V) log-probabilities
    found = torch.zeros(len(batch), batch.width, model.vocab_size)
    for row, (prompt, n) in enumerate(zip(batch.prompt_lengths.tolist(), batch.response_lengths.tolist())):
        ids = batch.ids[row : row + 1, : prompt + n]
        logits = model.module(ids).logits[0, prompt - 1 : -1, : model.vocab_size]
        found[row, :n] = torch.log_softmax(logits / temperature, -1)
    return found


@pytest.mark.parametrize("estimator", [*VALUES, "full"])
def test_a_rollout_is_scored_as_by_hand(tiny_model, estimator):
    """Details 5, 12, 17: from transformers' own forward of each sequence alone, at the temperature of sampling."""
    config = ppo_config(tiny_model, kl_estimator=estimator, temperature=0.7)
    models = models_of(config)
    rollout = sampled(models, config)
    found, _ = score(rollout, models, config)
    batch = rollout.sequences
    with torch.no_grad():
        ours, theirs = (distributions(model, batch, 0.7) for model in (models.policy, models.reference))
    exact = (ours.exp() * (ours - theirs)).sum(-1)
    for row, ids in enumerate(rollout.completion_ids):
        at = torch.arange(len(ids))
        lp, ref = (x[row, at, torch.tensor(ids)] for x in (ours, theirs))
        kl = exact[row, at].tolist() if estimator == "full" else [VALUES[estimator](x) for x in (lp - ref).tolist()]
        for ours_, expected in ((found.logprobs, lp), (found.ref_logprobs, ref), (found.kl, torch.tensor(kl))):
            torch.testing.assert_close(ours_[row, at], expected, rtol=1e-4, atol=2e-6)
            assert not ours_[row, len(ids) :].any()
    assert float(found.kl.abs().max()) > 1e-3


# Groups


def group(scores: list[float], kind: str) -> list[float]:
    mean, n = statistics.fmean(scores), len(scores)
    if kind == "rloo":
        return [s - (sum(scores) - s) / (n - 1) for s in scores]
    scale = statistics.stdev(scores) + 1e-4 if kind == "grpo" else 1.0
    return [(s - mean) / scale for s in scores]


@pytest.mark.parametrize("kind", ["grpo", "grpo_no_std", "rloo"])
@pytest.mark.parametrize("coef", [0.0, 0.3])
def test_a_response_is_compared_with_the_others_to_its_prompt(kind, coef):
    """The reward of a response is its score less its KL, summed over its tokens; every token gets its advantage."""
    config = ppo_config("m", advantage=kind, num_generations=3, per_device_train_batch_size=6, kl_coef=coef)
    lengths = [3, 5, 1, 2, 2, 4]
    batch = pad_sequences([[4]] * 6, [[7] * n for n in lengths], 0)
    kl, scores = torch.rand(6, 5) * batch.response_mask, [2.0, -1.0, 0.5, 10.0, 10.0, 11.0]
    given = Experience(batch, torch.zeros(6, 5), torch.zeros(6, 5), kl, torch.tensor(scores))
    found = with_advantages(given, config, coef)
    total = [s - coef * float(row.sum()) for s, row in zip(scores, kl)]
    expected = group(total[:3], kind) + group(total[3:], kind)
    rows = torch.tensor([[a] * n + [0.0] * (5 - n) for a, n in zip(expected, lengths)])
    torch.testing.assert_close(found.advantages, rows, rtol=1e-4, atol=1e-5)
    assert found.returns is None and found.values is None


def test_copies_of_a_prompt_stand_side_by_side(tiny_model, corpus):
    """Batch after batch, so that neighbours are a group."""
    config = ppo_config(tiny_model, advantage="rloo", num_generations=3, per_device_train_batch_size=6)
    tokenizer = load_tokenizer(tiny_model)
    data = load(Source((corpus,)), Reader(tokenizer, (2,)), "prompt", 8)
    for step in (0, 1, 5):
        one, two = data.window(2 * step, 2 * step + 2, config.seed)
        assert prompts_of(data, step, config) == [one, one, one, two, two, two] and one.prompt != two.prompt


# Whitening


def whitened(values: list[float], shift: bool = True) -> list[float]:
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [(v - mean) / deviation + (0.0 if shift else mean) for v in values]


def test_whitening_is_of_the_tokens_alone():
    """Detail 14, trlX, OR#1250: advantages of a ragged batch as one flat list, without padding, to mean 0 and deviation
    1; rewards to deviation 1 with their mean; the default is on with gae."""
    given = replace(experience(), values=torch.rand(3, WIDTH))
    config = ppo_config("m", **PLAIN | {"lam": 0.9, "gamma": 0.95})
    raw = rows_of(with_advantages(given, config, 0.3).advantages)
    flat = iter(whitened([a for row in raw for a in row]))
    white = with_advantages(given, replace(config, whiten_advantages=None), 0.3)
    assert_rows(white.advantages, [[next(flat) for _ in row] for row in raw])
    given = experience()
    pairs = zip(*map(rows_of, (given.logprobs, given.ref_logprobs, token_rewards(given))))
    rewards = [[r - 0.3 * (a - b) for a, b, r in zip(*row)] for row in pairs]
    flat = iter(whitened([r for row in rewards for r in row], shift=False))
    scaled = [[next(flat) for _ in row] for row in rewards]
    found = with_advantages(given, ppo_config("m", **PLAIN, whiten_rewards=True), 0.3)
    assert_rows(found.returns, [to_go(row) for row in scaled])


def test_group_advantages_are_whitened_on_request_alone():
    config = ppo_config("m", advantage="rloo", num_generations=3, per_device_train_batch_size=3, kl_coef=0.0)
    given = experience()
    raw = group([2.0, -1.0, 0.5], "rloo")
    assert_rows(with_advantages(given, config, 0.0).advantages, [[a] * n for a, n in zip(raw, LENGTHS)])
    flat = iter(whitened([a for a, n in zip(raw, LENGTHS) for _ in range(n)]))
    white = with_advantages(given, replace(config, whiten_advantages=True), 0.0)
    assert_rows(white.advantages, [[next(flat) for _ in range(n)] for n in LENGTHS])


def test_generalised_advantages_by_hand():
    """Detail 13: delta = r + gamma V' - V, A = delta + gamma lam A', V' 0 after the end, return = A + V."""
    given = replace(experience(), values=torch.rand(3, WIDTH))
    config = ppo_config("m", **PLAIN | {"lam": 0.9, "gamma": 0.95})
    found = with_advantages(given, config, 0.3)
    pairs = zip(*map(rows_of, (given.logprobs, given.ref_logprobs, token_rewards(given), given.values)))
    advantages, returns = [], []
    for lp, ref, paid, values in pairs:
        row, after, value_after = [], 0.0, 0.0
        for a, b, r, v in reversed(list(zip(lp, ref, paid, values))):
            after = r - 0.3 * (a - b) + 0.95 * value_after - v + 0.95 * 0.9 * after
            value_after = v
            row.append(after)
        advantages.append(row[::-1])
        returns.append([a + v for a, v in zip(row[::-1], values)])
    assert_rows(found.advantages, advantages)
    assert_rows(found.returns * given.sequences.response_mask, returns)
