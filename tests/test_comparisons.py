"""Comparisons: what rows say, the loss against closed forms and double loops, and passes that change no gradient."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_models import sentence, write_jsonl
from torch.nn.functional import binary_cross_entropy_with_logits

from rlhf.comparisons import Judged, collate, load_judged, of_ranking, passes, place_scores
from rlhf.config import ConfigError, RewardConfig, RunConfig
from rlhf.data import DataError, TokenExample
from rlhf.init import InitConfig, init
from rlhf.losses import COMPARISON_STATS, comparison_loss
from rlhf.model import load_scorer
from rlhf.reward import step_ends

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = RunConfig(output_dir="o", device="cpu")


def config_for(rows: str = "d", **changes) -> RewardConfig:
    return RewardConfig(
        **{"model_name_or_path": "m", "dataset_name": rows, "output_dir": "o", "max_length": 48} | changes
    )


def ranked(count: int, number: int = 0, **columns) -> TokenExample:
    completions = [
        [3 + (number + i * i + j) % 11 for j in range(1 + (number + i) % 4)] + [20 + i] for i in range(count)
    ]
    return TokenExample([4, 5 + number % 3], completions, "", columns, where=f"rows.jsonl:{number}")


def judged(example: TokenExample, *objectives: str) -> Judged:
    return of_ranking(example, list(objectives), Counter())


class Fixed:
    """As much of a scorer as a batch needs."""

    pad_id, device = 0, torch.device("cpu")

    def __init__(self, heads: int = 1):
        self.module = torch.nn.Module()
        self.module.score = torch.nn.Linear(2, heads)


def loss_of(rows: list[Judged], scores: torch.Tensor, **options) -> tuple[torch.Tensor, dict[str, float]]:
    """Of float64 scores (places, heads)."""
    batch = collate(rows, Fixed(scores.shape[1]))
    batch = replace(batch, margins=batch.margins.double(), weights=batch.weights.double())
    loss, stats = comparison_loss(scores, batch, sum(row.weight for row in rows), **options)
    return loss, dict(zip(COMPARISON_STATS, stats.tolist()))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# The loss


def test_a_pair_is_bradley_terry():
    scores = torch.tensor([[2.0], [0.5], [-1.0], [1.0]], dtype=torch.float64, requires_grad=True)
    loss, stats = loss_of([judged(ranked(2)), judged(ranked(2, 1))], scores, center=0.01)
    expected = (-math.log(sigmoid(1.5)) - math.log(sigmoid(-2.0)) + 0.01 * (2.5**2 + 0.0**2)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert stats == pytest.approx({"chosen": 1.0, "rejected": 1.5, "margins": -0.5, "accuracies": 1.0})
    loss.backward()
    assert float(scores.grad[0]) == pytest.approx((-sigmoid(-1.5) + 0.02 * 2.5) / 2, rel=1e-12)


def test_a_margin_is_what_a_pair_should_be_apart():
    """TRL's -log sigmoid(chosen - rejected - margin); without the column it is 0."""
    scores = torch.tensor([[2.0], [0.5], [-1.0], [1.0]], dtype=torch.float64)
    loss, stats = loss_of([judged(ranked(2, margin=0.7)), judged(ranked(2, 1))], scores)
    assert loss.item() == pytest.approx((-math.log(sigmoid(0.8)) - math.log(sigmoid(-2.0))) / 2, rel=1e-7)
    assert stats["margins"] == pytest.approx(-0.5)


def test_smoothing_is_that_of_cdpo():
    scores = torch.tensor([[2.0], [0.5]], dtype=torch.float64)
    loss, _ = loss_of([judged(ranked(2))], scores, smoothing=0.2)
    assert loss.item() == pytest.approx(-0.8 * math.log(sigmoid(1.5)) - 0.2 * math.log(sigmoid(-1.5)), rel=1e-12)


def test_rankings_are_all_pairs_of_a_prompt_and_the_mean_over_prompts():
    """Against the double loop of arXiv 2203.02155, eq. 1: rankings of 2, 3 and 5 in one batch."""
    sizes = (2, 3, 5)
    scores = torch.randn(sum(sizes), 1, dtype=torch.float64, requires_grad=True)
    loss, _ = loss_of([judged(ranked(k, i)) for i, k in enumerate(sizes)], scores, center=0.03, smoothing=0.1)
    expected = 0.0
    for part in scores[:, 0].split(sizes):
        total, pairs = 0.0, 0
        for i in range(len(part)):
            for j in range(i + 1, len(part)):
                difference, pairs = part[i] - part[j], pairs + 1
                smooth = 0.9 * torch.log(torch.sigmoid(difference)) + 0.1 * torch.log(torch.sigmoid(-difference))
                total = total - smooth + 0.03 * (part[i] + part[j]) ** 2
        expected = expected + total / pairs / len(sizes)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    got, wanted = (torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_objectives_are_means_over_rows_and_objectives():
    rows = [
        judged(ranked(2, objective="a"), "a", "b"),
        judged(ranked(2, 1, objective={"a": 1, "b": -3}), "a", "b"),
        judged(ranked(2, 2, objective={"a": 0, "b": 0.5}), "a", "b"),
    ]
    s = torch.randn(6, 2, dtype=torch.float64)
    differences = [s[0, 0] - s[1, 0], s[2, 0] - s[3, 0], s[3, 1] - s[2, 1], s[4, 1] - s[5, 1]]
    expected = -torch.nn.functional.logsigmoid(torch.stack(differences)).mean()
    torch.testing.assert_close(loss_of(rows, s)[0], expected, rtol=1e-12, atol=0)


# Rows


def test_a_completion_that_stands_twice_counts_at_its_better_place():
    notes = Counter()
    row = of_ranking(TokenExample([4], [[5], [6], [5], [7]], "", {}), [], notes)
    assert row.completions == [[5], [6], [7]] and len(row.comparisons) == 3 and notes["duplicate_completions"] == 1
    assert of_ranking(TokenExample([4], [[5], [5], [5]], "", {}), [], notes) is None
    assert notes["dropped_without_comparison"] == 1 and notes["duplicate_completions"] == 3


@pytest.mark.parametrize(
    ("count", "columns", "objectives", "problem"),
    [
        (2, {"margin": "wide"}, [], "margin: expected a number, got 'wide'"),
        (2, {"margin": True}, [], "margin: expected a number, got True"),
        (2, {"margin": float("nan")}, [], "margin: expected a number, got nan"),
        (3, {"margin": 1.0}, [], "margin: belongs to one pair in one objective, chosen first"),
        (
            2,
            {"margin": 1.0, "objective": {"a": -1}},
            ["a"],
            "margin: belongs to one pair in one objective, chosen first",
        ),
        (2, {}, ["a"], "objective: expected a name, or numbers by name, got None"),
        (2, {"objective": {"a": "yes"}}, ["a"], "objective: expected a name, or numbers by name, got {'a': 'yes'}"),
        (2, {"objective": "c"}, ["a", "b"], "objective: expected some of ['a', 'b'], got 'c'"),
        (2, {"objective": "a"}, [], "objective: the row names 'a': give --objectives the names"),
    ],
)
def test_a_bad_column_is_named_with_its_row(count, columns, objectives, problem):
    with pytest.raises(DataError) as error:
        judged(ranked(count, 7, **columns), *objectives)
    assert str(error.value).startswith(f"rows.jsonl:7: {problem}")


def test_bad_rows_end_a_run_before_it_writes(tiny_model, tmp_path):
    rows = [{"prompt": "the", "chosen": " good", "rejected": " bad", "margin": m} for m in (1, None, "x")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: margin: expected a number, got 'x'"):
        load_judged(config_for(path), load_scorer(tiny_model, RUN, head="zero"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"label_smoothing": 0.5}, "label_smoothing: expected a number in"),
        ({"objectives": ["a", "a"]}, "objectives: expected names that differ"),
        ({"objectives": ["a", "b"], "objective_weights": [1.0]}, "objective_weights: expected 2 numbers"),
        ({"objective_weights": [1.0]}, "objective_weights: expected 0 numbers"),
        ({"reward_type": "process", "objectives": ["a"]}, "objectives: belongs to reward_type outcome"),
        ({"reward_type": "process", "center_rewards_coefficient": 0.1}, "center_rewards_coefficient: belongs to"),
        ({"step_separator": ""}, "step_separator: expected a text"),
        ({"eval_steps": 5, "eval_fraction": 0.0}, "eval_steps: expected held-out rows"),
        ({"lora_r": 0}, "lora_r: expected a number >= 1"),
    ],
)
def test_settings_that_make_no_sense(changes, problem):
    with pytest.raises(ConfigError, match=problem):
        config_for(**changes)


# Steps


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A scorer with a byte-level tokenizer, some of whose words hold line breaks."""
    folder = tmp_path_factory.mktemp("bpe")
    text = "\n".join(sentence(i, 3) + ".\n" for i in range(30))
    corpus = write_jsonl(folder / "corpus.jsonl", [{"text": text}])
    sizes = {"vocab_size": 330, "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 128}
    path = init(InitConfig(dataset_name=corpus, output_dir=str(folder / "model"), tokenizer="bpe", **sizes))
    return load_scorer(str(path), RUN, head="random")


def stepped(folder, model, *rows: dict, **changes):
    path = write_jsonl(folder / "steps.jsonl", [{"prompt": "the film. ", **row} for row in rows])
    return load_judged(config_for(path, reward_type="process", **{"max_length": 64} | changes), model)


@pytest.mark.parametrize("separator", ["\n", "\n\n", " and "])
def test_steps_end_where_ppo_reads_them(bpe, tmp_path, separator):
    """In the tokens of the same text: those of the joined response, and those that step_ends finds in them."""
    steps = ["good play.", "very bad. so", "fine"]
    row = {"completions": steps, "labels": [True, False, True]}
    found = stepped(tmp_path, bpe, row, max_length=64, step_separator=separator).examples[0]
    ids, ends = found.completions[0], [token for _, token in found.places]
    assert bpe.tokenizer.decode(ids[:-1]) == separator.join(steps) and ids[-1] in bpe.eos_ids
    assert ends == step_ends(ids, bpe.tokenizer, separator)
    texts = [bpe.tokenizer.decode(ids[: end + 1], skip_special_tokens=True) for end in ends]
    assert texts == [separator.join([*steps[:1], ""]), separator.join([*steps[:2], ""]), separator.join(steps)]


def test_steps_are_binary_cross_entropy(bpe, tmp_path):
    labels = [[True, False, True], [False]]
    rows = [{"completions": ["good", "bad", "fine"][: len(row)], "labels": row} for row in labels]
    found = stepped(tmp_path, bpe, *rows).examples
    scores = torch.randn(4, 1, dtype=torch.float64)
    loss, stats = loss_of(found, scores)
    target = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(loss, binary_cross_entropy_with_logits(scores[:, 0], target), rtol=1e-12, atol=0)
    assert stats["accuracies"] / 4 == pytest.approx(float(((scores[:, 0] > 0) == target.bool()).double().mean()))
    smoothed = binary_cross_entropy_with_logits(scores[:, 0], target * 0.8 + 0.1)
    torch.testing.assert_close(loss_of(found, scores, smoothing=0.1)[0], smoothed, rtol=1e-12, atol=0)


def test_a_response_that_is_too_long_loses_its_last_steps(bpe, tmp_path):
    row = {"completions": ["good play and bad film"] * 8, "labels": [True] * 8}
    whole = stepped(tmp_path, bpe, row, max_length=128).examples[0]
    room = 30
    data = stepped(tmp_path, bpe, row, max_length=room)
    cut = data.examples[0]
    assert 1 < len(cut.places) < 8 and cut.lengths[0] <= room and data.notes["cut_steps"] == 8 - len(cut.places)
    assert cut.completions[0] == whole.completions[0][: len(cut.completions[0])]
    assert cut.places == whole.places[: len(cut.places)] and cut.places[-1][1] == len(cut.completions[0]) - 1
    with pytest.raises(DataError, match=r"no usable row: .*'dropped_without_step': 1"):
        stepped(tmp_path, bpe, row, max_length=8)


@pytest.mark.parametrize("steps", [["good\nbad", "fine"], ["good", ""], ["good\n", "fine"]])
def test_a_step_that_holds_the_separator_is_refused(bpe, tmp_path, steps):
    with pytest.raises(DataError, match=r"steps\.jsonl:1: completions: a step is empty or holds the step_separator"):
        stepped(tmp_path, bpe, {"completions": steps, "labels": [True, False]})


def test_a_separator_that_the_tokenizer_loses_is_refused(tiny_model, tmp_path):
    row = {"completions": ["good", "bad"], "labels": [True, False]}
    with pytest.raises(DataError, match="step_separator: expected a text that the tokenizer keeps"):
        stepped(tmp_path, load_scorer(tiny_model, RUN, head="zero"), row)


# Passes


def rankings() -> list[Judged]:
    return [judged(ranked(2 + i % 4, i)) for i in range(9)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [24, 40, 400])
def test_a_pass_has_whole_rows_and_keeps_to_its_tokens(packed, tokens):
    rows = rankings()
    parts = list(passes(rows, config_for(micro_batch_tokens=tokens), packed))
    assert sorted(row.where for part in parts for row in part) == [row.where for row in rows]
    for part in parts:
        lengths = [n for row in part for n in row.lengths]
        assert len(part) == 1 or (sum(lengths) if packed else len(lengths) * max(lengths)) <= tokens
    assert len(parts) == 1 if tokens == 400 else len(parts) > 1


def test_without_a_budget_a_pass_has_so_many_rows():
    rows = rankings()
    parts = list(passes(rows, config_for(per_device_train_batch_size=4), packed=True))
    assert [[row.where for row in part] for part in parts] == [[r.where for r in rows[i : i + 4]] for i in (0, 4, 8)]


def test_gradients_do_not_depend_on_the_passes(tiny_model):
    """Rankings of different sizes: a mean over the pairs of a pass would differ."""
    rows = [
        judged(TokenExample([4, 5], [[3 + (i * j + j) % 14, 2] for j in range(2 + i % 4)], "", {})) for i in range(9)
    ]
    rows, total, gradients = [row for row in rows if row], 0.0, []
    total = sum(row.weight for row in rows)
    ways = ({"per_device_train_batch_size": 16}, {"per_device_train_batch_size": 2}, {"micro_batch_tokens": 20})
    for settings in (*ways, {"micro_batch_tokens": 20, "padding_free": False}):
        scorer = load_scorer(tiny_model, config_for(device="cpu", **settings), head="random")
        assert scorer.packed == settings.get("padding_free", True)
        parts = list(passes(rows, config_for(**settings), scorer.packed))
        assert len(parts) == 1 if settings == ways[0] else len(parts) > 2
        for part in parts:
            batch = collate(part, scorer)
            comparison_loss(place_scores(scorer, batch), batch, total, 0.01, 0.1)[0].backward()
        gradients.append([p.grad for p in scorer.module.parameters()])
    for other in gradients[1:]:
        for expected, got in zip(gradients[0], other):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
