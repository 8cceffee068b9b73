"""Scores of rollouts: functions, models, sums, penalties; and the KL controller."""

from __future__ import annotations

import pytest
import torch

from rlhf.config import InitConfig, RunConfig
from rlhf.forward import sequence_scores
from rlhf.init import init
from rlhf.model import load_language_model, load_scorer
from rlhf.reward import KLController, RewardError, Shaping, function_reward, model_reward, score_rollout
from rlhf.rollout import decode
from rlhf.types import PromptBatch, Rollout, pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = RunConfig(output_dir="unused", device="cpu")


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_language_model(tiny_model, RUN)


def two_responses(policy) -> Rollout:
    prompts, eos = ["the film", "very bad"], policy.eos_ids[0]
    ids = [policy.tokenizer(text)["input_ids"] for text in prompts]
    responses = [[*policy.tokenizer("was good good")["input_ids"], eos], policy.tokenizer("dull")["input_ids"]]
    return Rollout(
        sequences=pad_sequences(ids, responses, policy.pad_id),
        finished=torch.tensor([True, False]),
        prompts=PromptBatch(ids, prompts, {"label": [1, 2]}),
        completions=[decode(policy.tokenizer, r) for r in responses],
        completion_ids=responses,
    )


@pytest.fixture
def rollout(policy) -> Rollout:
    return two_responses(policy)


def test_rewards_are_summed_and_a_missing_eos_costs(rollout):
    rewards = [function_reward("rewards_for_tests:count_good"), function_reward("rewards_for_tests:add_label")]
    found = score_rollout(rewards, rollout, Shaping(missing_eos_penalty=0.5))
    assert found.scores.tolist() == [12.0, 19.5] and found.rewards is None
    assert found.parts == {"rewards/rewards_for_tests:count_good": 1.0, "rewards/rewards_for_tests:add_label": 15.0}
    assert score_rollout(rewards, rollout).scores.tolist() == [12.0, 20.0]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("too_few", "expected 2 scores, one a completion, got 1"),
        ("not_finite", "expected finite scores, got nan in row 1 for 'dull'"),
        ("not_numbers", "expected a list of 2 numbers"),
        ("no_list", "expected a list of 2 numbers"),
        ("fails", "KeyError at rewards_for_tests.py:"),
    ],
)
def test_a_bad_reward_function_is_named(rollout, name, problem):
    with pytest.raises(RewardError) as error:
        function_reward(f"rewards_for_tests:{name}").score(rollout)
    assert str(error.value).startswith(f"reward rewards_for_tests:{name}: ") and problem in str(error.value)


def test_the_clip_is_on_the_rewards_and_leaves_the_penalty(rollout):
    rewards = [function_reward("rewards_for_tests:add_label")] * 2
    assert score_rollout(rewards, rollout).scores.tolist() == [20.0, 40.0]  # a reward named twice counts twice
    assert score_rollout(rewards, rollout, Shaping(3.0, missing_eos_penalty=0.5)).scores.tolist() == [3.0, 2.5]


@pytest.mark.parametrize(
    "name", ["no_module:f", ".x:f", "rewards_for_tests:absent", "rewards_for_tests:NOT_A_FUNCTION"]
)
def test_a_reward_function_that_is_not_there(name):
    with pytest.raises(RewardError, match=f"reward {name}: "):
        function_reward(name)


@pytest.mark.parametrize(("code", "problem"), [("def f(:", "SyntaxError"), ("absent", "NameError: name 'absent'")])
def test_a_reward_module_that_fails_is_named(tmp_path, monkeypatch, code, problem):
    (tmp_path / "broken_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=f"reward broken_rewards:f: {problem}"):
        function_reward("broken_rewards:f")


def test_reward_functions_are_found_in_the_current_directory(tmp_path, monkeypatch, rollout):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, **_):\n    return map(len, completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert function_reward("my_rewards:length").score(rollout).tolist() == [13.0, 4.0]


def test_a_reward_model_with_the_policys_tokens_reads_them_directly(policy, tiny_reward_model, rollout):
    scorer = load_scorer(tiny_reward_model, RUN)
    expected = sequence_scores(scorer, rollout.sequences).tolist()
    assert model_reward(scorer, policy, batch_size=2).score(rollout).tolist() == expected
    one_by_one = model_reward(scorer, policy, batch_size=1).score(rollout).tolist()
    assert one_by_one == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_with_its_own_tokenizer_reads_text(policy, corpus, tmp_path, rollout):
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}
    path = init(InitConfig(dataset_name=corpus, output_dir=str(tmp_path), tokenizer="bpe", **sizes))
    scorer = load_scorer(str(path), RUN, head="random")
    eos, encode = scorer.eos_ids[0], lambda text: scorer.tokenizer(text)["input_ids"]
    texts = [[*encode("the film" + rollout.completions[0]), eos], encode("very bad" + rollout.completions[1])]
    batch = pad_sequences([t[:1] for t in texts], [t[1:] for t in texts], scorer.pad_id)
    with torch.no_grad():
        expected = sequence_scores(scorer, batch).tolist()
    assert model_reward(scorer, policy, batch_size=2).score(rollout).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_kl_controller_steers_to_its_target():
    fixed = KLController(0.1)
    assert fixed.update(100.0, 512) == fixed
    adaptive = KLController(0.1, target=6.0, horizon=10_000)
    assert adaptive.update(6.0, 512).coef == 0.1
    assert adaptive.update(6.6, 1000).coef == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adaptive.update(100.0, 1000).coef == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adaptive.update(0.0, 1000).coef == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert adaptive.update(float("nan"), 1000) == adaptive


def test_texts_go_by_name_where_a_function_names_them(rollout):
    """In the order of TRL's functions, or the completions alone."""
    length = rollout.completions, [float(len(text)) for text in rollout.completions]
    assert function_reward("rewards_for_tests:completions_first").score(rollout).tolist() == length[1]
    assert function_reward("rewards_for_tests:completions_alone").score(rollout).tolist() == length[1]
