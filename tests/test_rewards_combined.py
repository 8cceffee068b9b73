"""Several rewards at once: weights, normalisation, rewards of tokens and of steps, the order of clip and penalties."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from test_losses import ppo_config
from test_reward import RUN, two_responses
from tiny_models import sentence, write_jsonl

from rlhf.config import InitConfig, UsageError
from rlhf.forward import sequence_scores
from rlhf.init import init
from rlhf.model import load_language_model, load_scorer
from rlhf.reward import (
    Reward,
    RewardError,
    Shaping,
    function_reward,
    load_rewards,
    process_reward,
    score_rollout,
    step_ends,
)
from rlhf.types import PromptBatch, Rollout, pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_language_model(tiny_model, RUN)


@pytest.fixture
def rollout(policy) -> Rollout:
    return two_responses(policy)


def of(name: str) -> Reward:
    return function_reward(f"rewards_for_tests:{name}")


def fixed(name: str, scores: list, weight: float = 1.0) -> Reward:
    return Reward(name, lambda _: torch.tensor(scores, dtype=torch.float32), weight)


def some(rows: int, lengths: list[int] | None = None, finished: list[bool] | None = None) -> Rollout:
    """A rollout of which nothing but lengths and ends matters."""
    responses = [[5] * n for n in lengths or [2] * rows]
    prompts = PromptBatch([[4]] * rows, ["p"] * rows, {})
    ends = torch.tensor(finished or [True] * rows)
    return Rollout(pad_sequences(prompts.token_ids, responses, 0), ends, prompts, ["c"] * rows, responses)


# Sums


def test_a_sum_of_weighted_rewards(rollout):
    """`good good` and `dull`, labels 1 and 2: 0.5 * (2, 0) - 2 * (10, 20)."""
    rewards = [replace(of("count_good"), weight=0.5), replace(of("add_label"), weight=-2.0)]
    found = score_rollout(rewards, rollout)
    assert found.scores.tolist() == [-19.0, -40.0]
    means = {"rewards/rewards_for_tests:count_good": 1.0, "rewards/rewards_for_tests:add_label": 15.0}
    assert found.parts == means  # before weights


def test_weights_are_in_the_order_of_functions_models_process_models(tiny_model, tiny_reward_model, policy):
    config = ppo_config(
        tiny_model,
        reward=["rewards_for_tests:ten", "rewards_for_tests:lengths"],
        reward_model_path=[tiny_reward_model, tiny_reward_model],
        process_reward_model_path=tiny_reward_model,
        reward_weights=[1.0, 2.0, 3.0, 4.0, 5.0],
    )
    found = [(reward.name, reward.weight) for reward in load_rewards(config, policy)]
    names = ["rewards_for_tests:ten", "rewards_for_tests:lengths", "model", "model_2", "process"]
    assert found == list(zip(names, [1.0, 2.0, 3.0, 4.0, 5.0]))
    plain = load_rewards(replace(config, reward_weights=[]), policy)
    assert [reward.weight for reward in plain] == [1.0] * 5


# Normalisation


def test_normalisation_over_the_batch():
    """Each reward by its own mean and deviation over n, then weighted; a constant one keeps its scale and adds 0."""
    one, two = [1.0, 2.0, 6.0], [-300.0, 100.0, 500.0]
    rewards = [fixed("one", one, 2.0), fixed("two", two, -1.0), fixed("three", [0.1] * 3, 7.0)]
    found = score_rollout(rewards, some(3), normalization="batch")
    a, b = statistics.pstdev(one), statistics.pstdev(two)
    expected = [2 * (x - 3) / a - (y - 100) / b for x, y in zip(one, two)]
    torch.testing.assert_close(found.scores, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert found.parts["rewards/one"] == 3.0 and found.parts["rewards/two"] == 100.0


def test_normalisation_over_all_episodes_so_far():
    """Three batches of different sizes: each by the moments of what came up to it, itself included."""
    batches = [[1.0, 2.0, 6.0], [50.0, -1.0], [7.0, 7.5, 8.0, 8.25]]
    moments, so_far = {}, []
    for scores in batches:
        so_far += scores
        found = score_rollout([fixed("one", scores)], some(len(scores)), normalization="running", moments=moments)
        mean, deviation = statistics.fmean(so_far), statistics.pstdev(so_far)
        expected = [(score - mean) / deviation for score in scores]
        torch.testing.assert_close(found.scores, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert moments["one"] == pytest.approx([9, mean, 9 * deviation**2])


def test_normalisation_does_not_cancel():
    """Squares of values near a million would leave nothing of a deviation of 1 in float32, and little in float64."""
    moments = {}
    for shift in (0.0, 1.0, 2.0):
        scores = [1e6 + shift, 1e6 + shift + 3]
        score_rollout([fixed("one", scores)], some(2), normalization="running", moments=moments)
    values = [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    assert moments["one"] == pytest.approx([6, 1e6 + 2.5, 6 * statistics.pvariance(values)], rel=1e-12)


@pytest.mark.parametrize("kind", ["batch", "running"])
def test_rewards_of_tokens_are_scaled_and_not_shifted(kind):
    """By the deviation of the responses' sums: a token that earned nothing stays at 0."""
    tokens = [[1.0, 0.0, 2.0], [0.0, 5.0, 0.0]]
    found = score_rollout([fixed("one", tokens)], some(2, [3, 2]), normalization=kind, moments={})
    torch.testing.assert_close(found.rewards, torch.tensor(tokens) / 1.0)  # sums 3 and 5
    doubled = [[2 * x for x in row] for row in tokens]
    found = score_rollout([fixed("one", doubled)], some(2, [3, 2]), normalization=kind, moments={})
    torch.testing.assert_close(found.rewards, torch.tensor(tokens))


# Rewards of tokens


def test_rewards_of_tokens_stand_where_they_were_given(rollout):
    """A score of the whole response goes to its last token."""
    found = score_rollout([of("of_tokens"), replace(of("add_label"), weight=0.5)], rollout)
    rows = [[token / 10 for token in ids] for ids in rollout.completion_ids]
    rows[0][-1] += 5.0
    rows[1][-1] += 10.0
    expected = torch.tensor([rows[0], rows[1] + [0.0] * 3])
    torch.testing.assert_close(found.rewards, expected)
    torch.testing.assert_close(found.scores, expected.sum(1))
    assert found.parts["rewards/rewards_for_tests:of_tokens"] == pytest.approx(
        sum(sum(ids) for ids in rollout.completion_ids) / 20
    )


def test_tokens_go_to_functions_that_ask_for_them(rollout):
    assert of("lengths").score(rollout).tolist() == [4.0, 1.0]  # with the EOS
    assert of("count_good").score(rollout).tolist() == [2.0, 0.0]  # whose **columns are those of the rows


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("of_words", "expected 4 numbers, one a token, got 3 in row 0"),
        ("of_tokens_sometimes", "expected numbers or lists of one number a token, got both"),
        ("of_tokens_not_finite", "expected finite scores, got inf in row 0 for 'was good good'"),
    ],
)
def test_bad_rewards_of_tokens_are_named(rollout, name, problem):
    with pytest.raises(RewardError) as error:
        of(name).score(rollout)
    assert str(error.value) == f"reward rewards_for_tests:{name}: {problem}"


def test_a_function_without_completion_ids_may_return_one_number_a_token(rollout):
    whole = replace(
        rollout, completion_ids=[ids[:-1] for ids in rollout.completion_ids[:1]] + rollout.completion_ids[1:]
    )
    assert of("of_words").score(whole).tolist() == [[3.0, 4.0, 4.0, 0.0], [4.0, 0.0, 0.0, 0.0]]


# Clip, then the length's penalty, then that of a missing EOS


ENDS = {"lengths": [2, 5], "finished": [True, False]}


def test_the_clip_is_of_the_sum_and_comes_before_the_penalties():
    rewards = [fixed("one", [4.0, -9.0]), fixed("two", [-3.0, 2.0])]
    shaping = Shaping(score_clip=2.0, missing_eos_penalty=0.5, length_penalty=0.25, length_penalty_after=1)
    found = score_rollout(rewards, some(2, **ENDS), shaping)
    assert found.scores.tolist() == [1.0 - 0.25, -2.0 - 0.25 * 4 - 0.5]
    assert found.parts == {"rewards/one": -2.5, "rewards/two": -0.5}  # as the rewards gave them


def test_a_penalty_for_length_is_of_the_tokens_beyond():
    shaping = Shaping(length_penalty=0.5, length_penalty_after=3)
    found = score_rollout([fixed("one", [1.0, 1.0, 1.0])], some(3, [2, 3, 5]), shaping)
    assert found.scores.tolist() == [1.0, 1.0, 0.0]


def test_minus_the_penalty_may_be_the_whole_score():
    """Detail 7, arXiv 2403.17031: whatever it earned, and however long it is."""
    shaping = Shaping(missing_eos_penalty=1.5, missing_eos="replace", length_penalty=0.25)
    assert score_rollout([fixed("one", [4.0, 9.0])], some(2, **ENDS), shaping).scores.tolist() == [3.5, -1.5]
    tokens = [[1.0, 2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]]
    found = score_rollout([fixed("one", tokens), fixed("two", [4.0, 9.0])], some(2, **ENDS), shaping)
    assert found.rewards.tolist() == [[1.0, 2.0 + 3.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, -1.5]]


@pytest.mark.parametrize("kind", ["subtract", "replace"])
def test_no_penalty_and_a_penalty_of_0_are_two_things(kind):
    """OR#1219: 0.0 is a value. Nothing is taken off by null, and replaced by 0."""
    rewards, rows = [fixed("one", [4.0, 9.0])], some(2, **ENDS)
    assert score_rollout(rewards, rows, Shaping(None, None, kind)).scores.tolist() == [4.0, 9.0]
    expected = 9.0 if kind == "subtract" else 0.0
    assert score_rollout(rewards, rows, Shaping(None, 0.0, kind)).scores.tolist() == [4.0, expected]


def test_tokens_are_clipped_one_by_one():
    rewards = [fixed("one", [[3.0, -3.0], [0.5, 1.0]]), fixed("two", [9.0, 0.0])]
    found = score_rollout(rewards, some(2), Shaping(score_clip=2.0))
    assert found.rewards.tolist() == [[2.0, -2.0 + 2.0], [0.5, 1.0]]


# Steps


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    """A byte-level tokenizer whose words hold line breaks, and a model."""
    folder = tmp_path_factory.mktemp("bpe")
    text = "\n".join(sentence(i, 3) + ".\n" for i in range(30))
    corpus = write_jsonl(folder / "corpus.jsonl", [{"prompt": text, "completion": text}])
    sizes = {"vocab_size": 330, "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 128}
    return str(init(InitConfig(dataset_name=corpus, output_dir=str(folder / "model"), tokenizer="bpe", **sizes)))


@pytest.mark.parametrize("separator", ["\n", ".\n", "\n\n", "good", "o"])
def test_step_ends_on_a_byte_level_tokenizer(bpe, separator):
    """Wherever its tokens cut the text: each end is the first token with which one more separator is complete."""
    tokenizer = load_language_model(bpe, RUN).tokenizer
    text = "the film was good.\n\nvery bad.\nand\ngood play.\n\n\n\ndull"
    ids = tokenizer(text)["input_ids"]
    counts = [tokenizer.decode(ids[:n]).count(separator) for n in range(len(ids) + 1)]
    expected = [n for n in range(len(ids)) if counts[n + 1] > counts[n]]
    assert len(expected) > 1 and any(len(tokenizer.decode([i])) > 1 for i in ids)
    last = len(ids) - 1
    assert step_ends(ids, tokenizer, separator) == sorted({*expected, last} if last - 1 not in expected else expected)


def test_a_separator_of_several_bytes_is_found(bpe):
    """No token of this tokenizer is the whole of it, nor of the characters beside it."""
    tokenizer = load_language_model(bpe, RUN).tokenizer
    ids = tokenizer("the。film é。was good")["input_ids"]
    assert all("。" not in tokenizer.decode([i]) for i in ids)
    counts = [tokenizer.decode(ids[:n]).count("。") for n in range(len(ids) + 1)]
    ends = [n for n in range(len(ids)) if counts[n + 1] > counts[n]]
    assert len(ends) == 2 and step_ends(ids, tokenizer, "。") == sorted({*ends, len(ids) - 1})


def test_step_ends_on_a_word_tokenizer(policy):
    """One step a word `and`; what follows the last is a step of its own, but not an EOS by itself."""
    encode, eos = lambda text: policy.tokenizer(text)["input_ids"], policy.eos_ids[0]
    assert step_ends(encode("good and bad film and dull play"), policy.tokenizer, "and") == [1, 4, 6]
    assert step_ends([*encode("good and bad and"), eos], policy.tokenizer, "and") == [1, 3]
    assert step_ends([*encode("good and bad"), eos], policy.tokenizer, "and") == [1, 3]
    assert step_ends(encode("good film"), policy.tokenizer, "and") == [1]
    assert step_ends([eos], policy.tokenizer, "and") == [0]
    # decoded alone, its words have no space
    assert step_ends(encode("good was very bad was very dull film"), policy.tokenizer, "was very") == [2, 5, 7]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_step_earns_the_score_of_the_text_up_to_its_end(policy, tiny_reward_model, batch_size):
    scorer, eos = load_scorer(tiny_reward_model, RUN), policy.eos_ids[0]
    encode = lambda text: policy.tokenizer(text)["input_ids"]  # noqa: E731
    prompts = [encode(text) for text in ("the film", "play", "was very bad")]
    responses = [[*encode("good and bad and dull"), eos], encode("great"), encode("plot and story and")]
    batch = PromptBatch(prompts, ["p"] * 3, {})
    rows = Rollout(pad_sequences(prompts, responses, 0), torch.ones(3).bool(), batch, ["c"] * 3, responses)
    found = process_reward(scorer, policy, batch_size, None, "and").score(rows)
    expected = torch.zeros(3, 6)
    for row, ends in enumerate([[1, 3, 5], [0], [1, 3]]):
        for end in ends:
            with torch.no_grad():
                prefix = pad_sequences([prompts[row]], [responses[row][: end + 1]], 0)
                expected[row, end] = sequence_scores(scorer, prefix)[0]
    assert int((found != 0).sum()) == 6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    scored = score_rollout([process_reward(scorer, policy, batch_size, None, "and")], rows)
    torch.testing.assert_close(scored.scores, expected.sum(1), rtol=1e-5, atol=1e-6)


def test_a_process_reward_model_of_another_vocabulary_is_refused(policy, bpe):
    scorer = load_scorer(bpe, RUN, head="random")
    with pytest.raises(UsageError, match=r"process_reward_model_path: .* has another vocabulary than the policy"):
        process_reward(scorer, policy, 1, None, "\n")
