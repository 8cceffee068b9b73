"""What is cut to length and what ends: bugs of other trainers, by name, and real dialogues."""

from __future__ import annotations

import pytest
from conftest import SHARED_DATA

from rlhf.config import InitConfig
from rlhf.data import Dataset, load, tokenize
from rlhf.init import init
from rlhf.model import load_tokenizer
from rlhf.read import Source, read_rows
from rlhf.rows import parse
from rlhf.tokens import Reader, fit

TURNS = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was very good"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def reader(tiny_model) -> Reader:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = TEMPLATE
    return Reader(tokenizer, (tokenizer.eos_token_id,))


def read(reader: Reader, form: str, max_length: int, **row) -> Dataset:
    return tokenize([("f:1", row)], reader, form, max_length)


def words(reader: Reader, text: str) -> list[int]:
    return reader.tokenizer.convert_tokens_to_ids(text.split())


def test_no_last_token_is_dropped(reader):
    """TRL#2332: what fits keeps its last token and its EOS."""
    eos = reader.eos_ids[0]
    for max_length in (6, 7):
        (example,) = read(
            reader, "preference", max_length, prompt="the film", chosen=" was very good", rejected=""
        ).examples
        assert example.completions == [[*words(reader, "was very good"), eos], [eos]]
        assert example.prompt == words(reader, "the film")


def test_a_long_prompt_leaves_the_completion(reader):
    """TRL#3382 and #5662: keeping the end zeroed completions, and a long prompt left rows without any token of them."""
    data = read(reader, "completion", 8, prompt="the film " * 50, completion=" was very good")
    (example,) = data.examples
    assert example.completions == [[*words(reader, "was very good"), *reader.eos_ids]]
    assert example.prompt == words(reader, "the film the film")
    assert data.notes == {"rows": 1, "cut_prompts": 1, "cut_completions": 0}
    (example,) = read(reader, "completion", 8, prompt="the film " * 50, completion=" was very" * 50).examples
    assert (len(example.prompt), example.completions) == (4, [words(reader, "was very was very")])


@pytest.mark.parametrize("form", ["preference", "ranking"])
def test_answers_that_are_the_same_once_cut_are_dropped(reader, form):
    """Their loss is log 2 whatever the model: nothing is learnt, and an accuracy counts them as wrong."""
    row = {"prompt": "the film", "chosen": " was very good", "rejected": " was very bad"}
    data = read(reader, form, 4, **row)
    assert (len(data), data.notes["dropped_identical"]) == (0, 1)
    assert len(read(reader, form, 6, **row)) == 1


@pytest.mark.parametrize("blanks", ["", "\n", " \n\n "])
def test_blanks_after_the_end_are_no_text(corpus, tmp_path, blanks):
    """A template may write any after its EOS; a second EOS behind them would teach a model to go on after its end."""
    folder = init(InitConfig(dataset_name=corpus, output_dir=str(tmp_path), vocab_size=300, hidden_size=8))
    tokenizer = load_tokenizer(str(folder))
    turn = "<{{ m.role }}> {{ m.content }}{{ eos_token }}{{ blanks }}"
    tokenizer.chat_template = TEMPLATE.replace("<{{ m.role }}> {{ m.content }} {{ eos_token }}\n", turn)
    rows = {"messages": TURNS, "chat_template_kwargs": {"blanks": blanks}}
    for form in ("completion", "dialogue"):
        (example,) = read(Reader(tokenizer, (tokenizer.eos_token_id,)), form, 64, **rows).examples
        (answer,) = example.completions
        assert tokenizer.decode(answer).lstrip() == "was very good<|eos|>"


def test_a_chat_is_the_tokens_of_its_rendering(reader):
    """TRL#4908: no EOS or template token more than the whole rendering has, but for the newline after the last EOS."""
    (example,) = read(reader, "completion", 64, messages=TURNS).examples
    whole = reader.tokenizer.apply_chat_template(TURNS, tokenize=False)
    ids = reader.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert example.prompt + example.completions[0] == ids and ids.count(reader.eos_ids[0]) == 2


def test_a_pair_is_cut_by_its_longer_side_alone(reader):
    """TRL#6548: CPO and ORPO cut by the sum of both completions."""
    data = read(reader, "preference", 6, prompt="the film", chosen=" was very good", rejected=" was very bad")
    assert data.notes == {"rows": 1, "cut_prompts": 0, "cut_completions": 0}
    assert [len(completion) for completion in data.examples[0].completions] == [4, 4]


def test_completions_that_differ_where_they_are_cut_are_dropped(reader):
    """No loss of pairs learns from them but by its NLL term: both are the same tokens."""
    more = {"prompt": "the film", "chosen": f"{' very' * 9} good", "rejected": f"{' very' * 9} bad"}
    for form in ("preference", "ranking"):
        data = read(reader, form, 8, **more)
        assert len(data) == 0 and data.notes == {"rows": 1, "dropped_identical": 1}
        assert len(read(reader, form, 12, **more)) == 1


@pytest.mark.parametrize("completion", [" was very good", " was very good <|eos|>", " was <|eos|> good", ""])
def test_an_end_stands_once_and_not_on_what_was_cut(reader, completion):
    eos = reader.eos_ids[0]
    ids = words(reader, completion)
    (example,) = read(reader, "completion", 32, prompt="the film", completion=completion).examples
    assert example.completions == [ids if ids[-1:] == [eos] else [*ids, eos]]
    for max_length in range(4, 7):
        data = read(reader, "completion", max_length, prompt="the film", completion=completion)
        (cut,) = data.examples
        room = max(max_length - 2, max_length // 2)
        assert cut.completions[0] == example.completions[0][:room]
        assert data.notes["cut_completions"] == (len(example.completions[0]) > room)


def test_rankings_are_cut_one_by_one(reader):
    data = read(reader, "ranking", 6, prompt="the film", ranking=[" was good", " was" * 9, " very" * 9])
    assert [len(completion) for completion in data.examples[0].completions] == [3, 4, 4]
    assert data.notes == {"rows": 1, "cut_prompts": 0, "cut_completions": 1}


def test_a_long_prompt_loses_its_head_and_a_completion_its_tail():
    assert fit([1, 2, 3, 4], [[5, 6]], 5) == ([2, 3, 4], [[5, 6]])
    assert fit([1, 2, 3, 4], [[5, 6, 7, 8, 9]], 6) == ([2, 3, 4], [[5, 6, 7]])
    assert fit([1], [[5, 6, 7, 8, 9], [5]], 4) == ([1], [[5, 6, 7], [5]])
    assert fit([1, 2, 3], [], 2) == ([2, 3], [])


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real data are not here")
def test_real_dialogues_split_exactly_at_the_last_answer(tiny_model):
    path = str(SHARED_DATA / "hh-harmless-base-1500.jsonl.gz")
    rows = list(read_rows(path))
    assert len(rows) == 1_500
    for where, row in rows:
        example = parse(where, row, "preference", None)
        assert example.prompt.endswith("\n\nAssistant:")
        assert [example.prompt + c for c in example.completions] == [row["chosen"], row["rejected"]]
    data = load(Source((path,)), Reader(load_tokenizer(tiny_model), (2,)), "preference", 10_000)
    assert data.notes["rows"] == 1_500 and not data.notes["cut_prompts"] and not data.notes["cut_completions"]
