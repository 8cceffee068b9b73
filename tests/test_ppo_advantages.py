"""ppo_advantages: the battery, then what it promises beyond its parts."""

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import AdvantageOptions, gae, masked_whiten, ppo_advantages, testing, token_kl

BACKENDS = testing.available_backends("ppo_advantages")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rlhf_kernels.backend(request.param):
        yield request.param


@battery("ppo_advantages")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def _batch(shape=(3, 6)):
    return [torch.randn(shape) for _ in range(3)]


def test_is_the_composition_of_its_parts(backend):
    logprobs, ref, values = _batch()
    scores, mask = torch.randn(3), torch.tensor([[True] * 4 + [False] * 2, [True] * 6, [True] + [False] * 5])
    out = ppo_advantages(logprobs, ref, values, scores, mask, options=AdvantageOptions(kl_coef=0.2, gamma=0.99))
    kl = torch.where(mask, token_kl(logprobs, ref), 0)
    rewards = -0.2 * kl
    rewards[[0, 1, 2], [3, 5, 0]] += scores
    advantages, returns = gae(rewards, values, mask, gamma=0.99)
    for mine, parts in zip(out, (masked_whiten(advantages, mask), returns, rewards, kl)):
        torch.testing.assert_close(mine, parts, rtol=1e-5, atol=1e-5)


def test_score_lands_on_the_last_counted_token(backend):
    """With left padding, with trailing tool output, and never on a sequence without counted tokens."""
    mask = torch.tensor([[False, False, True, True], [True, True, False, False], [False] * 4])
    zeros = torch.zeros(3, 4)
    options = AdvantageOptions(whiten_advantages=False)
    rewards = ppo_advantages(zeros, zeros, zeros, torch.tensor([1.0, 2.0, 3.0]), mask, options=options).rewards
    assert rewards.tolist() == [[0, 0, 0, 1], [0, 2, 0, 0], [0, 0, 0, 0]]


def test_kl_coefficient_may_stay_on_the_device(backend):
    logprobs, ref, values = _batch()
    scores = torch.randn(3)
    number = ppo_advantages(logprobs, ref, values, scores, options=AdvantageOptions(kl_coef=0.25))
    tensor = ppo_advantages(logprobs, ref, values, scores, options=AdvantageOptions(kl_coef=torch.tensor(0.25)))
    for a, b in zip(number, tensor):
        assert torch.equal(a, b)


def test_no_penalty_is_no_penalty(backend):
    """With kl_coef 0 an infinite estimate stays a statistic."""
    logprobs, ref, values = _batch()
    ref[0, 0] = 200.0
    for coef in (0.0, torch.tensor(0.0)):
        options = AdvantageOptions(kl_coef=coef, kl_estimator="k3", whiten_advantages=False)
        out = ppo_advantages(logprobs, ref, values, torch.ones(3), options=options)
        assert out.rewards.tolist() == [[0.0] * 5 + [1.0]] * 3 and out.kl[0, 0] == float("inf")


def test_scores_shift_leaves_reward_whitened_mean(backend):
    """Reward whitening keeps the mean of the rewards, advantage whitening removes that of the advantages."""
    logprobs, ref, values = _batch((8, 16))
    out = ppo_advantages(logprobs, ref, values, torch.randn(8) + 3, options=AdvantageOptions(whiten_rewards=True))
    plain = ppo_advantages(logprobs, ref, values, torch.zeros(8), options=AdvantageOptions())
    assert out.rewards.mean() > plain.rewards.mean()
    assert out.advantages.mean().abs() < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"scores": torch.zeros(4)},
            ValueError,
            r"scores: expected \(2,\), one a sequence, or \(2, 3\), one a token, got \(4,\)",
        ),
        ({"values": torch.zeros(2, 2)}, ValueError, "values: expected the shape"),
        ({"ref_logprobs": None}, TypeError, "ref_logprobs: expected a tensor, got NoneType"),
        ({"mask": torch.ones(2, 3, dtype=torch.uint8)}, TypeError, "mask: expected bool"),
    ],
)
def test_bad_input(change, error, words):
    zeros = torch.zeros(2, 3)
    arguments = {"logprobs": zeros, "ref_logprobs": zeros, "values": zeros, "scores": torch.zeros(2), **change}
    with pytest.raises(error, match=words):
        ppo_advantages(**arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kl_estimator": "k3+"}, "kl_estimator: expected one of k1, abs, k2, k3, got 'k3\\+'"),
        ({"lam": 2.0}, "lam: expected a number in"),
        ({"score_clip": 0.0}, "score_clip: expected a number above 0"),
        ({"kl_coef": torch.ones(2)}, "kl_coef: expected a number or a 0-dim tensor"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        AdvantageOptions(**options)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="kl_coeff"):
        AdvantageOptions(kl_coeff=0.1)
