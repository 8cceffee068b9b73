"""Which tokens of a dialogue are the assistant's, by the template's marks or by growing prefixes where it has none."""

from __future__ import annotations

import pytest
from tiny_models import write_jsonl

from rlhf.config import InitConfig
from rlhf.data import load, tokenize
from rlhf.init import init
from rlhf.model import load_tokenizer
from rlhf.read import DataError, Source
from rlhf.rows import parse
from rlhf.tokens import Reader, TokenExample

HEAD = "{% for m in messages %}<{{ m.role }}>\n"
PROMPT = "{% if add_generation_prompt %}<assistant>\n{% endif %}"
NEWLINE = HEAD + "{{ m.content }}{{ eos_token }}\n{% endfor %}" + PROMPT
ANSWER = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
ASKED = "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}"
MARKED = HEAD + "{% if m.role == 'assistant' %}" + ANSWER + "{% endif %}" + ASKED + "{{ '\n' }}{% endfor %}" + PROMPT
BARE = MARKED.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")  # the end unmarked
ENDLESS = HEAD + "{{ m.content }}\n{% endfor %}" + PROMPT  # no token ends a turn

SYSTEM = {"role": "system", "content": "be  good"}
TURNS = [
    {"role": "user", "content": "the film?"},
    {"role": "assistant", "content": "very good,\n\nnaïve 漢字"},
    {"role": "user", "content": "the plot?"},
    {"role": "assistant", "content": " fine and\tdull "},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level pairs, where one character may be several tokens and one token several words."""
    folder = tmp_path_factory.mktemp("bytes")
    text = "<user> the film? <assistant> very good and fine, dull\n<system> be good the plot? naïve 漢字\n"
    (folder / "text.txt").write_text(text * 20)
    sizes = {"vocab_size": 320, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    name = str(folder / "text.txt")
    return load_tokenizer(str(init(InitConfig(dataset_name=name, output_dir=str(folder / "model"), **sizes))))


def dialogue(tokenizer, template: str, turns: list[dict], max_length: int = 512, **columns) -> TokenExample:
    tokenizer.chat_template = template
    reader = Reader(tokenizer, (tokenizer.eos_token_id,))
    return tokenize([("f:1", {"messages": turns, **columns})], reader, "dialogue", max_length).examples[0]


def counted_texts(tokenizer, example: TokenExample) -> list[str]:
    """Each run of tokens that count, as text."""
    ids = example.completions[0]
    marks = example.counted or [True] * len(ids)
    starts = [i for i, mark in enumerate(marks) if mark and not (i and marks[i - 1])]
    stops = [i + 1 for i, mark in enumerate(marks) if mark and not (i + 1 < len(marks) and marks[i + 1])]
    return [tokenizer.decode(ids[start:stop]) for start, stop in zip(starts, stops)]


@pytest.mark.parametrize("template", [NEWLINE, MARKED, BARE])
@pytest.mark.parametrize("turns", [TURNS, [SYSTEM, *TURNS], TURNS[:2]], ids=["two", "system", "one"])
def test_the_assistants_turns_and_their_ends_count_and_nothing_else(tokenizer, template, turns):
    example = dialogue(tokenizer, template, turns)
    eos, answers = tokenizer.eos_token, [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert counted_texts(tokenizer, example) == [answer + eos for answer in answers]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    sequence = example.prompt + example.completions[0]
    assert sequence == ids[: len(sequence)] and tokenizer.decode(ids[len(sequence) :]) == "\n"
    assert sequence[-1] == tokenizer.eos_token_id and example.counted[0] and example.counted[-1]


def test_a_mask_equals_that_of_the_tokenizer(tokenizer):
    example = dialogue(tokenizer, MARKED, TURNS)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    masks = tokenizer.apply_chat_template(TURNS, **options)["assistant_masks"]
    ours = [0] * len(example.prompt) + list(map(int, example.counted))
    assert ours == masks[: len(ours)] and not any(masks[len(ours) :])


def test_one_turn_is_what_a_completion_is(tokenizer):
    for template in (NEWLINE, MARKED, ENDLESS):
        example = dialogue(tokenizer, template, TURNS[:2])
        reader = Reader(tokenizer, (tokenizer.eos_token_id,))
        same = tokenize([("f:1", {"messages": TURNS[:2]})], reader, "completion", 512).examples[0]
        assert (example.prompt, example.completions, example.text) == (same.prompt, same.completions, same.text)
        assert all(example.counted)


def test_turns_after_the_last_answer_are_left_out_and_end_nothing(tokenizer):
    example = dialogue(tokenizer, NEWLINE, TURNS[:3])
    assert (example.prompt, example.completions) == (lambda e: (e.prompt, e.completions))(
        dialogue(tokenizer, NEWLINE, TURNS[:2])
    )
    unended = dialogue(tokenizer, ENDLESS, TURNS[:3])
    assert counted_texts(tokenizer, unended) == [TURNS[1]["content"] + "\n"]


def test_a_word_tokenizer_whose_tokens_leave_the_spaces_out(tiny_model):
    words = load_tokenizer(tiny_model)
    template = MARKED.replace(ANSWER, "{% generation %} {{ m.content }} {{ eos_token }} \n{% endgeneration %}")
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ("the film", "good", "plot", "bad"))]
    example = dialogue(words, template, turns)
    assert counted_texts(words, example) == [f"good {words.eos_token}", f"bad {words.eos_token}"]


def test_an_answer_that_holds_the_end_token_counts_whole(tokenizer):
    turns = [TURNS[0], {"role": "assistant", "content": f"a{tokenizer.eos_token}b"}]
    for template in (NEWLINE, MARKED, BARE):
        example = dialogue(tokenizer, template, turns)
        assert counted_texts(tokenizer, example) == [f"a{tokenizer.eos_token}b{tokenizer.eos_token}"]


def test_a_dialogue_that_the_assistant_begins_has_a_prompt(tokenizer):
    example = dialogue(tokenizer, NEWLINE, TURNS[1:])
    assert example.prompt == [tokenizer.bos_token_id] and example.counted[0]


def test_a_cut_dialogue_loses_its_tail_and_its_marks_with_it(tokenizer):
    whole = dialogue(tokenizer, NEWLINE, TURNS)
    length = len(whole.prompt) + whole.counted.index(False) + 2
    cut = dialogue(tokenizer, NEWLINE, TURNS, max_length=length)
    assert (cut.prompt, cut.completions[0]) == (whole.prompt, whole.completions[0][: length - len(whole.prompt)])
    assert cut.counted == whole.counted[: len(cut.completions[0])] and not cut.counted[-1]


def test_rows_that_are_no_messages_are_completions(tokenizer, tmp_path):
    reader = Reader(tokenizer, (tokenizer.eos_token_id,))
    for row in ({"prompt": "the film", "completion": " good"}, {"text": "the film"}):
        ours, theirs = (tokenize([("f:1", row)], reader, form, 64).examples for form in ("dialogue", "completion"))
        assert ours == theirs and ours[0].counted is None
    tokenizer.chat_template = NEWLINE
    pair = {"prompt": TURNS[:1], "completion": TURNS[1:2]}
    rows = write_jsonl(tmp_path / "rows.jsonl", [pair, {"messages": TURNS}, pair])
    masks = [example.counted is None for example in load(Source((rows,)), reader, "dialogue", 512).examples]
    assert masks == [True, False, True]


def test_a_template_that_renders_earlier_turns_otherwise_is_named(tokenizer):
    only_last = HEAD + "{{ m.content if loop.last else m.content[:3] }}{{ eos_token }}{% endfor %}" + PROMPT
    with pytest.raises(DataError, match=r"^f:1: messages\[1\]: the chat template renders .* \{% generation %\}"):
        dialogue(tokenizer, only_last, TURNS)
    silent = HEAD + "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="writes nothing of the assistant's turns"):
        dialogue(tokenizer, silent.replace("<{{ m.role }}>\n", ""), TURNS[:2])
    with pytest.raises(DataError, match="f:1: messages: expected a turn of the assistant"):
        dialogue(tokenizer, NEWLINE, TURNS[:1])


TOOLS = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{{ mood or '' }}"


@pytest.mark.parametrize("template", [TOOLS + NEWLINE, TOOLS + MARKED])
@pytest.mark.parametrize("tools", [[{"name": "look_up"}], '[{"name": "look_up"}]'], ids=["list", "json"])
def test_tools_and_options_of_a_row_reach_the_template(tokenizer, template, tools):
    columns = {"tools": tools, "chat_template_kwargs": {"mood": "calm"}}
    example = dialogue(tokenizer, template, TURNS, **columns, note=1)
    assert example.text.startswith("[look_up]calm<user>\n") and example.columns == {"note": 1}
    for form in ("completion", "prompt"):
        assert parse("f:1", {"messages": TURNS, **columns}, form, tokenizer).prompt.startswith("[look_up]calm<user>\n")
    assert dialogue(tokenizer, template, TURNS).text.startswith("<user>\n")


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"tools": "[{"}, "tools: expected a list of objects, or one as JSON"),
        ({"tools": [3]}, r"tools: expected a list of objects, got \[3\]"),
        ({"tools": {"name": "f"}}, "tools: expected a list of objects"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs: expected an object, got 3"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: tokenize: says how to render"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs: chat_template: says how to render"),
    ],
)
def test_tools_and_options_that_are_none_are_refused(tokenizer, columns, problem):
    tokenizer.chat_template = NEWLINE
    with pytest.raises(DataError, match=f"^f:1: .*{problem}"):
        parse("f:1", {"messages": TURNS, **columns}, "completion", tokenizer)


@pytest.mark.parametrize("form", ["completion", "dialogue"])
def test_a_template_that_leaves_the_answer_out_is_named(tokenizer, form):
    """Its rows would teach to end at once."""
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"^f:1: .*the chat template writes nothing of the assistant's turns"):
        parse("f:1", {"messages": TURNS[:2]}, form, tokenizer)


def test_a_call_of_tools_has_no_content_and_nulls_are_absent(tokenizer):
    called = "{{ m.content }}{% if m.tool_calls is defined %}[{{ m.tool_calls[0].name }}]{% endif %}"
    template = HEAD + called + "{{ eos_token }}{% endfor %}" + PROMPT
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look_up"}]}
    turns = [TURNS[0] | {"tool_calls": None}, call, {"role": "tool", "content": "7"}, TURNS[3]]
    example = dialogue(tokenizer, template, turns)
    eos = tokenizer.eos_token
    assert counted_texts(tokenizer, example) == [f"[look_up]{eos}", TURNS[3]["content"] + eos]
    assert "None" not in tokenizer.decode(example.prompt + example.completions[0])
    with pytest.raises(DataError, match="expected messages with role and content"):
        parse("f:1", {"messages": [TURNS[0], {"role": "assistant", "content": None}]}, "dialogue", tokenizer)
