"""Rows to tokens: what is read, what is refused and where, and the order of examples."""

from __future__ import annotations

import gzip
import math
from collections import Counter
from itertools import chain

import pytest
from tiny_models import write_jsonl

from rlhf.config import ConfigError, SFTConfig
from rlhf.data import Dataset, load, plan, tokenize
from rlhf.model import load_tokenizer
from rlhf.read import DataError, Source, read_rows
from rlhf.rows import Example, parse
from rlhf.tokens import Reader, TokenExample

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "a", \n', "not valid JSON"),
        (b'["a"]\n', "expected a JSON object, got list"),
        (b'{"completion": "a"}\n', "expected the column 'prompt', got completion"),
        (b'{"prompt": "a"}\n', "expected the column 'completion'"),
        (b'{"prompt": 3, "completion": "a"}\n', "prompt: expected text, got 3"),
        (b'{"prompt": [1], "completion": [2]}\n', "prompt: expected messages with role and content"),
        (b'{"prompt": "\xff", "completion": "a"}\n', "not UTF-8"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "the tokenizer has none"),
        (b'{"messages": []}\n', "messages: expected messages, got an empty list"),
        (b'{"prompt": "a", "completion": "new"}\n', "the model's embedding of 18 tokens has none for 'new' (18)"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, tokenizer, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "the", "completion": "film"}\n\n' + line)
    vocab_size = len(tokenizer)
    tokenizer.add_tokens(["new"])
    with pytest.raises(DataError) as error:
        load(Source((str(path),)), Reader(tokenizer, (2,), vocab_size), "completion", 16)
    assert str(error.value).startswith(f"{path}:3: ") and problem in str(error.value)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        list(read_rows("absent.jsonl"))
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(DataError, match="expected a file ending in one of"):
        list(read_rows(str(tmp_path / "rows.xml")))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"cut.jsonl.gz:\d+: cannot be read"):
        list(read_rows(str(tmp_path / "cut.jsonl.gz")))
    damaged = bytearray(gzip.compress(b'{"prompt": "a"}\n' * 1000))
    damaged[10] ^= 0xFF  # the first byte of the deflated stream
    for name in ("bad.jsonl.gz", "bad.txt.gz"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name}.*: cannot be read"):
            list(read_rows(str(tmp_path / name)))
    with pytest.raises(DataError, match=r"empty\.jsonl: no usable row"):
        load(Source((write_jsonl(tmp_path / "empty.jsonl", []),)), Reader(tokenizer, (2,)), "prompt", 16)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("\n\nHuman: Hi\n\nAssistant: I am", "\n\nHuman: Hi\n\nAssistant: I was", "\n\nHuman: Hi\n\nAssistant:"),
        ("the film was great", "the film was grim", "the film was"),
        ("the film was great", "the film was great indeed", "the film was"),
        ("yes", "no", ""),
    ],
)
def test_the_shared_beginning_is_the_prompt(chosen, rejected, prompt):
    example = parse("f:1", {"chosen": chosen, "rejected": rejected}, "preference", None)
    assert example.prompt == prompt
    assert [example.prompt + completion for completion in example.completions] == [chosen, rejected]


def test_messages_are_rendered_and_end_once(tokenizer):
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was good"}]
    example = parse("f:1", {"messages": turns}, "completion", tokenizer)
    assert example.prompt.endswith("<assistant> ") and example.completions == [f"was good {tokenizer.eos_token}\n"]
    data = tokenize([("f:1", {"messages": turns})], Reader(tokenizer, (tokenizer.eos_token_id,)), "completion", 32)
    assert data.examples[0].completions[0].count(tokenizer.eos_token_id) == 1
    pair = {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "was bad"}]}
    assert parse("f:1", pair, "preference", tokenizer).prompt == example.prompt


def test_a_prompt_alone_keeps_its_last_turn_unless_that_is_the_answer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    system, user, assistant = ({"role": r, "content": r} for r in ("system", "user", "assistant"))
    for turns in ([user], [system, user], [user, assistant, user]):
        expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert parse("f:1", {"messages": turns}, "prompt", tokenizer).prompt == expected
        assert parse("f:1", {"messages": [*turns, assistant]}, "prompt", tokenizer).prompt == expected


@pytest.mark.parametrize(
    "row",
    [
        {"text": "the film"},
        {"messages": [{"role": "assistant", "content": "good"}]},
        {"chosen": "yes", "rejected": "no"},
    ],
)
def test_a_row_without_a_prompt_gives_none(tokenizer, row):
    with pytest.raises(DataError, match=r"^f:1: no prompt to continue: give rows"):
        parse("f:1", row, "prompt", tokenizer)
    assert parse("f:1", {"prompt": ""}, "prompt", tokenizer).prompt == ""  # what is asked for is given


def test_tokens_and_text_of_a_row(tokenizer):
    eos = tokenizer.eos_token_id
    row = {"prompt": "the film", "completion": " was good", "label": 7}
    example = tokenize([("f:1", row)], Reader(tokenizer, (eos,)), "completion", 16).examples[0]
    ids = tokenizer.convert_tokens_to_ids(["the", "film", "was", "good"])
    assert (example.prompt, example.completions) == (ids[:2], [[*ids[2:], eos]])
    assert (example.text, example.columns) == ("the film", {"label": 7})


def test_an_empty_prompt_starts_with_bos(tokenizer):
    data = tokenize([("f:1", {"text": "the film"})], Reader(tokenizer, (tokenizer.eos_token_id,)), "completion", 16)
    assert data.examples[0].prompt == [tokenizer.bos_token_id]


def test_a_beginning_that_equals_the_end_stands_once(tokenizer):
    """As OPT's tokenizer does: </s> before every text, and as EOS."""
    from tokenizers.processors import TemplateProcessing

    eos = tokenizer.eos_token_id
    begin = TemplateProcessing(single="<|eos|> $A", special_tokens=[("<|eos|>", eos)])
    tokenizer.backend_tokenizer.post_processor = begin
    example = tokenize([("f:1", {"text": "the film"})], Reader(tokenizer, (eos,)), "completion", 16).examples[0]
    assert (example.prompt, example.completions) == ([eos], [[*tokenizer.convert_tokens_to_ids(["the", "film"]), eos]])


def test_what_is_cut_or_dropped_is_counted(tokenizer):
    pair = {"prompt": "the film", "chosen": "was good", "rejected": "was good"}
    rows = [pair, pair | {"rejected": "was bad"}, pair | {"chosen": "was very very very good"}]
    data = tokenize([("f", row) for row in rows], Reader(tokenizer, (tokenizer.eos_token_id,)), "preference", 6)
    assert data.notes == {"rows": 3, "dropped_identical": 1, "cut_prompts": 0, "cut_completions": 1}
    assert tokenizer.eos_token_id not in data.examples[1].completions[0]  # what was cut did not end


def test_a_plain_text_becomes_blocks(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("the film was good " * 5)
    data = load(Source((str(path),)), Reader(tokenizer, (2,)), "completion", 8)
    assert [len(e.prompt + e.completions[0]) for e in data.examples] == [8, 8]
    assert data.notes == {"blocks": 2, "dropped_tokens": 4}
    with pytest.raises(DataError, match="lower max_length from 64"):
        load(Source((str(path),)), Reader(tokenizer, (2,)), "completion", 64)


def make_dataset(n: int) -> Dataset:
    return Dataset([TokenExample([i], [[i]], str(i), {}) for i in range(n)], {})


def test_windows_visit_every_example_once_an_epoch_in_a_new_order():
    data = make_dataset(10)
    first, second = ([e.prompt[0] for e in data.window(10 * k, 10 * k + 10, seed=1)] for k in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    across = [e.prompt[0] for e in data.window(7, 13, seed=1)]
    assert across == first[7:] + second[:3]
    assert [e.prompt[0] for e in data.window(0, 10, seed=2)] != first


@pytest.mark.parametrize(("weight", "taken"), [(0.5, 5), (2.0, 20), (2.5, 25), (0.3, 3), (1.0, 10)])
def test_a_weight_is_how_often_a_datasets_rows_stand_in_an_epoch(weight, taken):
    parts = ((4, 4), (10, taken))
    data = Dataset(make_dataset(14).examples, {}, parts)
    assert len(data) == 4 + taken
    epochs = [[e.prompt[0] for e in data.window(k * len(data), (k + 1) * len(data), seed=1)] for k in range(20)]
    for epoch in epochs:
        counts = Counter(epoch)
        assert all(counts[i] == 1 for i in range(4))
        twice = weight == 0.3  # where an epoch ends one pass over the dataset and begins the next
        assert all(math.floor(weight) <= counts[i] <= math.ceil(weight) + twice for i in range(4, 14))
    if taken == 5:  # another half each time
        assert set(epochs[0]) | set(epochs[1]) == set(range(14)) and set(epochs[0]) != set(epochs[2])
    assert Counter(chain.from_iterable(epochs))[4] == 20 * weight and epochs[0] != epochs[1]
    middle = data.window(len(data) + 3, 2 * len(data) + 2, seed=1)  # from anywhere, as a resumed run asks for it
    assert [e.prompt[0] for e in middle] == epochs[1][3:] + epochs[2][:2]


def test_weights_of_one_change_no_order():
    data = make_dataset(10)
    assert Dataset(data.examples, {}, ((3, 3), (7, 7))).window(0, 25, 1) == data.window(0, 25, 1)


def test_a_source_weighs_its_datasets(tmp_path, tokenizer):
    names = [write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name}] * 4) for name in ("film", "plot")]
    config = SFTConfig(model_name_or_path="m", dataset_name=names, output_dir="o", dataset_weights=[0.5, 2])
    data = load(Source.of(config), Reader(tokenizer, (2,)), "prompt", 8)
    assert (len(data), data.parts) == (10, ((4, 2), (4, 8)))
    assert Counter(e.text for e in data.window(0, 20, 1)) == {"film": 4, "plot": 16}
    rest, held = data.split(0.25, seed=1)
    assert (len(held), len(rest.examples)) == (2, 6) and rest.parts == tuple(
        (n, round(n * w)) for (n, _), w in zip(rest.parts, (0.5, 2))
    )
    with pytest.raises(DataError, match=r"plot.jsonl: dataset_weights: 0.1 of 4 rows is none"):
        load(Source(tuple(names), weights=(1.0, 0.1)), Reader(tokenizer, (2,)), "prompt", 8)


def test_a_plan_is_exactly_its_epochs():
    assert plan(10, 4, 1.0, -1) == [(0, 4), (4, 8), (8, 10)]
    assert plan(10, 4, 0.5, -1) == [(0, 4), (4, 5)]
    assert plan(10, 4, 1.0, 5) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]


def test_the_fingerprint_covers_text_and_columns():
    def digest(text: str, label: object) -> str:
        return Dataset([TokenExample([1], [[2]], text, {"label": label})], {}).fingerprint()

    assert len({digest("a", 1), digest("a", 2), digest("b", 1)}) == 3
    assert digest("a", object()) == digest("a", object())


def test_held_out_examples_are_apart():
    rest, held = make_dataset(20).split(0.25, seed=3)
    ids = [e.prompt[0] for e in rest.examples], [e.prompt[0] for e in held.examples]
    assert (len(ids[0]), len(ids[1])) == (15, 5) and sorted(ids[0] + ids[1]) == list(range(20))


def test_every_dataset_with_rows_left_keeps_one_and_a_split_leaves_some_to_train_on():
    examples = [TokenExample([i], [], "", {}) for i in range(10)]
    rest, held = Dataset(examples, {}, ((10, 1),)).split(0.6, seed=1)  # 4 rows left, each a tenth of a time
    assert (len(held), rest.parts, len(rest.window(0, 3, 1))) == (6, ((4, 1),), 3)
    with pytest.raises(ConfigError, match=r"^eval_fraction: 0.5 of 0 rows leaves none to train on"):
        Dataset([], {}).split(0.5, seed=1)


def test_held_out_rows_that_are_trained_on_too_are_counted():
    rows = [*range(8), 7, 7]
    data = Dataset([TokenExample([i], [[i, 2]], str(n), {}) for n, i in enumerate(rows)], {"rows": 10})
    rest, held = data.split(0.5, seed=1)
    kept = {e.prompt[0] for e in rest.examples}
    expected = sum(e.prompt[0] in kept for e in held.examples)
    assert expected and rest.notes == {"rows": 10, "held_out_rows_also_trained": expected}
    assert make_dataset(20).split(0.25, seed=3)[0].notes["held_out_rows_also_trained"] == 0


def read(row: dict, form: str, tokenizer=None) -> Example:
    return parse("f:1", row, form, tokenizer)


def test_a_row_is_read_in_the_form_that_a_command_asks_for():
    ranked = read({"prompt": "a", "ranking": [" b", " c", " d"]}, "ranking")
    assert (ranked.prompt, ranked.completions) == ("a", [" b", " c", " d"])
    pair = read({"chosen": "the film was good", "rejected": "the film was bad", "margin": 2.0}, "ranking")
    assert (pair.completions, pair.columns) == ([" good", " bad"], {"margin": 2.0})
    judged = read({"prompt": "a", "completion": " b", "label": False}, "unpaired")
    assert (judged.completions, judged.columns) == ([" b"], {"label": False})
    steps = read({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, "steps")
    assert (steps.completions, steps.columns) == (["b", "c"], {"labels": [True, False]})


@pytest.mark.parametrize(
    ("form", "row", "problem"),
    [
        ("ranking", {"ranking": ["b"]}, "f:1: ranking: expected a list of at least 2"),
        ("ranking", {"ranking": ["b", 3]}, "f:1: ranking[1]: expected text, got 3"),
        ("ranking", {"completion": "b"}, "f:1: expected the column 'ranking', or 'chosen' and 'rejected', got "),
        ("unpaired", {"completion": "b", "label": 1}, "f:1: label: expected true (desired) or false, got 1"),
        ("steps", {"completions": [], "labels": []}, "f:1: completions: expected a list of at least 1"),
        ("steps", {"completions": ["b"], "labels": [True, False]}, "f:1: labels: expected 1 of true and false"),
    ],
)
def test_a_row_of_another_form_is_refused(form, row, problem):
    with pytest.raises(DataError) as error:
        read({"prompt": "a"} | row, form)
    assert problem in str(error.value)
