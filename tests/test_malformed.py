"""Malformed input of every kind: one line that names the place, or a row that is left out and counted, never more."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_jsonl

from rlhf.cli import main
from rlhf.data import Dataset, load
from rlhf.model import load_tokenizer
from rlhf.read import DataError, Source, Tally, read_rows
from rlhf.rows import ANSWERS
from rlhf.tokens import Reader, token_examples

pytestmark = pytest.mark.usefixtures("one_thread")

STRICT = (  # as templates of models are: a system message first, then turns in alternation, nothing else
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('a system message comes first') }}{% endif %}"
    "{{ '<' + m.role + '> ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
GOOD = {
    "prompt": {"prompt": "the film"},
    "completion": {"prompt": "the film", "completion": " was good"},
    "dialogue": {"prompt": "the film", "completion": " was good"},
    "unpaired": {"prompt": "the film", "completion": " was good", "label": True},
    "preference": {"prompt": "the film", "chosen": " was good", "rejected": " was bad"},
    "ranking": {"prompt": "the film", "ranking": [" was good", " was dull", " was bad"]},
    "steps": {"prompt": "the film", "completions": [" was", " good"], "labels": [True, False]},
}
SYSTEM, USER, ANSWER = ({"role": role, "content": "the film"} for role in ("system", "user", "assistant"))


@pytest.fixture(scope="module")
def reader(tiny_model) -> Reader:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = STRICT
    return Reader(tokenizer, (tokenizer.eos_token_id,), len(tokenizer))


def read(path: Path | str, reader: Reader, form: str, on_bad_row: str = "error", max_length: int = 16) -> Dataset:
    return load(Source((str(path),), on_bad_row=on_bad_row), reader, form, max_length)


def refusal(path: Path | str, reader: Reader, form: str, on_bad_row: str = "error") -> str:
    with pytest.raises(DataError) as error:
        read(path, reader, form, on_bad_row)
    told = str(error.value)
    assert "\n" not in told and told.startswith(str(path)) and len(told) < 1_000
    return told


def changed(form: str, **columns) -> bytes:
    return json.dumps(GOOD[form] | columns).encode()


def without(form: str, name: str) -> bytes:
    return json.dumps({key: value for key, value in GOOD[form].items() if key != name}).encode()


LINES = [  # bytes of a line, and what is said of it, whatever the form
    (b"{", "not valid JSON"),
    (b"{}}", "not valid JSON"),
    (b"nonsense", "not valid JSON"),
    (b'{"prompt": "the" "completion": "film"}', "not valid JSON"),
    (b'{"prompt": "the", }', "not valid JSON"),
    (b"{'prompt': 'the'}", "not valid JSON"),
    (b'{"prompt": "the\x00film"}', "not valid JSON"),
    (b'{"prompt": "\\x"}', "not valid JSON"),
    (b'{"prompt": "\\ud8"}', "not valid JSON"),
    (b"\xef\xbb\xbf" * 2 + b"{}", "not valid JSON"),
    (b"null", "expected a JSON object, got NoneType"),
    (b"true", "expected a JSON object, got bool"),
    (b"7", "expected a JSON object, got int"),
    (b'"the film"', "expected a JSON object, got str"),
    (b"[]", "expected a JSON object, got list"),
    (b'[{"prompt": "the"}]', "expected a JSON object, got list"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b'{"prompt": "\xe9t\xe9"}', "not UTF-8"),
    (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
    ('{"prompt": "the"}'.encode("utf-16"), "not UTF-8"),
    (b'{"prompt": "the", "prompt": "film"}', "the key 'prompt' stands twice"),
    (b'{"prompt": "the", "x": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
    (b'{"prompt": "the", "x": NaN}', "NaN is no number of JSON: write null"),
    (b'{"prompt": "the", "x": -Infinity}', "-Infinity is no number of JSON"),
    (b'{"prompt": "the", "x": ' + b"9" * 5_000 + b"}", "not valid JSON"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
    (b'{"x": ' + b'{"x": ' * 200 + b"0" + b"}" * 200 + b"}", "more than 64 deep"),
    (b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}", "more than 64 deep"),
    (b"{}", "got an empty row"),
    (b'{"prompt": null, "completion": null, "chosen": null}', "got an empty row"),
    (b'{"Prompt": "the", "completion ": "film"}', "expected the column 'prompt'"),
    (b'{"prompt": 3}', None),
    (b'{"prompt": true}', None),
    (b'{"prompt": 0.5}', None),
    (b'{"prompt": {"text": "the"}}', None),
    (b'{"prompt": ["the", "film"]}', None),
    (b'{"prompt": [["the"]]}', None),
    (b'{"prompt": []}', "prompt: expected messages, got an empty list"),
    (b'{"messages": []}', "messages: expected messages, got an empty list"),
    (b'{"messages": "the film"}', "messages: expected messages, got 'the film'"),
    (b'{"messages": {"role": "user", "content": "the"}}', "messages: expected messages"),
    (b'{"messages": [[{"role": "user", "content": "the"}]]}', "messages with role and content"),
    (b'{"messages": ["the", "film"]}', "messages with role and content"),
    (b'{"messages": [{}]}', "messages with role and content"),
    (b'{"messages": [{"role": "user"}]}', "messages with role and content"),
    (b'{"messages": [{"content": "the"}]}', "messages with role and content"),
    (b'{"messages": [{"role": 3, "content": "the"}]}', "messages with role and content"),
    (b'{"messages": [{"role": null, "content": "the"}]}', "messages with role and content"),
    (b'{"messages": [{"role": ["user"], "content": "the"}]}', "messages with role and content"),
    (b'{"messages": [{"role": "user", "content": null}]}', "messages with role and content"),
    (b'{"messages": [{"role": "user", "content": 7}]}', "messages with role and content"),
    (b'{"messages": [{"role": "user", "content": ["the"]}]}', "messages with role and content"),
    (b'{"messages": [{"role": "user", "content": {"text": "the"}}]}', "messages with role and content"),
    (b'{"messages": [{"from": "human", "value": "the"}]}', "messages with role and content"),
]


@pytest.mark.parametrize("form", ["prompt", "preference"])
@pytest.mark.parametrize(("line", "problem"), LINES, ids=range(len(LINES)))
def test_a_line_that_is_no_row_is_named_or_skipped(tmp_path, reader, form, line, problem):
    path, good = tmp_path / "rows.jsonl", json.dumps(GOOD[form]).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    told = refusal(path, reader, form)
    assert told.startswith(f"{path}:2: ") and (problem or "expected") in told
    data = read(path, reader, form, "skip")
    assert data.notes["skipped_rows"] == 1 and data.reasons == (told,)
    assert data.examples[0] == data.examples[1] and len(data) == 2
    path.write_bytes(line)
    refusal(path, reader, form, "skip")


def turns(*roles: str) -> list[dict]:
    return [{"role": role, "content": "the film"} for role in roles]


ROWS = [  # form, a row of it, what is said
    ("prompt", without("prompt", "prompt"), "got an empty row"),
    ("prompt", b'{"text": "the film"}', "no prompt to continue"),
    ("prompt", b'{"chosen": "yes", "rejected": "no"}', "no prompt to continue"),
    ("prompt", json.dumps({"messages": turns("user", "bot")}).encode(), "unknown role bot"),
    ("prompt", json.dumps({"messages": turns("system", "system", "user")}).encode(), "a system message comes first"),
    ("prompt", json.dumps({"messages": turns("assistant")}).encode(), "no prompt to continue"),
    ("prompt", changed("prompt", prompt="\ud800"), r"not text: '\ud800' stands for no character"),
    ("prompt", changed("prompt", prompt="film \udfff"), r"not text: '\udfff'"),
    ("completion", without("completion", "completion"), "expected the column 'completion', got prompt"),
    ("completion", without("completion", "prompt"), "expected the column 'prompt', got completion"),
    ("completion", changed("completion", completion=None), "expected the column 'completion'"),
    ("completion", changed("completion", completion=3), "completion: expected text, got 3"),
    ("completion", changed("completion", completion=["a"]), "completion: expected text"),
    ("completion", changed("completion", completion=[ANSWER]), "completion: expected text"),
    ("completion", changed("completion", completion="\ud83d"), "not text"),
    ("completion", changed("completion", prompt=[USER]), "completion: expected messages, got ' was good'"),
    ("completion", json.dumps({"text": 3}).encode(), "text: expected text, got 3"),
    ("completion", json.dumps({"text": ["the"]}).encode(), "text: expected text"),
    ("completion", json.dumps({"messages": turns("system")}).encode(), "expected a last turn of the assistant"),
    ("completion", json.dumps({"messages": turns("user")}).encode(), "of the assistant, got 'user'"),
    ("completion", json.dumps({"messages": turns("user", "assistant", "user")}).encode(), "last turn of the assistant"),
    ("completion", json.dumps({"messages": turns("tool", "assistant")}).encode(), "unknown role tool"),
    ("completion", json.dumps({"messages": [USER, ANSWER | {"content": "\udc00"}]}).encode(), "not text"),
    ("completion", json.dumps({"prompt": [USER], "completion": [SYSTEM]}).encode(), "a system message comes first"),
    ("dialogue", json.dumps({"messages": turns("user", "system")}).encode(), "expected a turn of the assistant"),
    ("dialogue", json.dumps({"messages": turns("user", "assistant", "bot")}).encode(), "unknown role bot"),
    ("dialogue", json.dumps({"messages": [USER, ANSWER], "tools": "["}).encode(), "tools: expected a list of objects"),
    ("dialogue", json.dumps({"messages": [USER, ANSWER], "tools": 3}).encode(), "tools: expected a list of objects"),
    ("dialogue", json.dumps({"messages": [USER, ANSWER], "chat_template_kwargs": 3}).encode(), "expected an object"),
    ("dialogue", without("dialogue", "completion"), "expected the column 'completion'"),
    ("unpaired", without("unpaired", "label"), "label: expected true (desired) or false, got None"),
    ("unpaired", changed("unpaired", label=None), "label: expected true (desired) or false, got None"),
    ("unpaired", changed("unpaired", label=1), "label: expected true (desired) or false, got 1"),
    ("unpaired", changed("unpaired", label="true"), "label: expected true (desired) or false, got 'true'"),
    ("unpaired", changed("unpaired", label=[True]), "label: expected true (desired) or false"),
    ("preference", without("preference", "rejected"), "expected the column 'rejected'"),
    ("preference", b'{"chosen": "the film"}', "expected the column 'prompt', got chosen"),
    ("preference", b'{"chosen": 3, "rejected": 4}', "chosen: expected text, got 3"),
    ("preference", b'{"chosen": "a", "rejected": ["b"]}', "rejected: expected text"),
    ("preference", b'{"chosen": {"a": 1}, "rejected": {"a": 1}}', "chosen: expected text"),
    ("preference", b'{"chosen": true, "rejected": false}', "chosen: expected text, got True"),
    ("preference", b'{"chosen": [], "rejected": []}', "chosen: expected messages, got an empty list"),
    ("preference", json.dumps({"chosen": [USER, ANSWER], "rejected": "b"}).encode(), "rejected: expected messages"),
    ("preference", json.dumps({"chosen": turns("user", "bot"), "rejected": [USER]}).encode(), "unknown role bot"),
    ("preference", changed("preference", chosen="\ud800a"), "not text"),
    ("ranking", changed("ranking", ranking=[]), "ranking: expected a list of at least 2"),
    ("ranking", changed("ranking", ranking=["a"]), "ranking: expected a list of at least 2"),
    ("ranking", changed("ranking", ranking="ab"), "ranking: expected a list of at least 2, got 'ab'"),
    ("ranking", changed("ranking", ranking=["a", None]), "ranking[1]: expected text, got None"),
    ("ranking", changed("ranking", ranking=["a", ["b"]]), "ranking[1]: expected text"),
    ("ranking", changed("ranking", ranking=["a", "\ud800"]), "not text"),
    ("steps", without("steps", "labels"), "labels: expected 2 of true and false, one a step, got None"),
    ("steps", changed("steps", labels=[True]), "labels: expected 2 of true and false"),
    ("steps", changed("steps", labels=[1, 0]), "labels: expected 2 of true and false"),
    ("steps", changed("steps", labels="tf"), "labels: expected 2 of true and false"),
    ("steps", changed("steps", completions=[], labels=[]), "completions: expected a list of at least 1"),
    ("steps", changed("steps", completions=["a", 3]), "completions[1]: expected text, got 3"),
    ("steps", changed("steps", completions={"a": 1}), "completions: expected a list of at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "line", "problem"), ROWS, ids=range(len(ROWS)))
def test_a_row_of_another_shape_is_named_or_skipped(tmp_path, reader, form, line, problem):
    path = tmp_path / "rows.jsonl"
    chat = b'"role"' in line and form in ("prompt", "completion", "dialogue")
    good = json.dumps({"messages": [USER, ANSWER]} if chat else GOOD[form]).encode()
    path.write_bytes(good + b"\n\n" + line)
    told = refusal(path, reader, form)
    assert told.startswith(f"{path}:3: ") and problem in told
    data = read(path, reader, form, "skip")
    assert data.notes["skipped_rows"] == 1 and data.reasons == (told,) and len(data) == 1
    path.write_bytes(line)
    assert problem in refusal(path, reader, form, "skip")


def test_a_dataset_that_mixes_messages_and_text_keeps_what_came_first(tmp_path, reader):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD["completion"], {"messages": [USER, ANSWER]}, GOOD["completion"]])
    assert refusal(path, reader, "completion") == f"{path}:2: mixes messages and text in one dataset"
    data = read(path, reader, "completion", "skip")
    assert (data.notes["skipped_rows"], data.notes["rows"]) == (1, 2)


HUGE, LONG = "very " * 200_000, "x" * 1_000_000
ODD = [  # form, a row that can be used, what is counted
    ("completion", changed("completion", completion="\u0000 good\u0000"), {}),
    ("completion", changed("completion", completion=""), {}),
    ("completion", changed("completion", prompt=""), {}),
    ("completion", changed("completion", prompt="", completion=""), {"dropped_empty": 1}),
    ("completion", changed("completion", completion=HUGE), {"cut_completions": 1}),
    ("completion", changed("completion", prompt=HUGE), {"cut_prompts": 1}),
    ("completion", changed("completion", prompt=HUGE, completion=HUGE), {"cut_prompts": 1, "cut_completions": 1}),
    ("completion", changed("completion", completion="x" * 1_000_000), {}),
    ("completion", changed("completion", completion="\u2028\u0085\ufeff\U0001f642"), {}),
    ("completion", changed("completion", extra={"a": [1, None, {"b": "\ud800"}]}), {}),
    ("completion", b"  \t" + changed("completion") + b"\r", {}),
    ("completion", b'{"text": ""}', {"dropped_empty": 1}),
    ("preference", changed("preference", rejected=" was good"), {"dropped_identical": 1}),
    ("preference", b'{"chosen": "the film", "rejected": "the film"}', {"dropped_identical": 1}),
    ("preference", changed("preference", chosen=""), {}),
    ("preference", changed("preference", chosen=HUGE), {"cut_completions": 1}),
    ("preference", changed("preference", rejected=HUGE), {"cut_completions": 1}),
    ("preference", changed("preference", prompt=HUGE), {"cut_prompts": 1}),
    ("preference", b'{"chosen": "the film was good", "rejected": "the film was"}', {}),
    ("preference", b'{"chosen": "the film was", "rejected": "the film was good"}', {}),
    ("preference", json.dumps({"chosen": LONG, "rejected": LONG}).encode(), {"dropped_identical": 1}),
    ("ranking", changed("ranking", ranking=["a", "a", "a"]), {"dropped_identical": 1}),
    ("ranking", changed("ranking", ranking=[HUGE, "a"]), {"cut_completions": 1}),
    ("steps", changed("steps", completions=[" was", " was"]), {}),
    ("steps", changed("steps", completions=[" was", HUGE]), {"cut_completions": 1}),
    ("steps", changed("steps", completions=[HUGE, " was"]), {"cut_completions": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "line", "counted"), ODD, ids=range(len(ODD)))
def test_an_odd_row_is_used_or_counted(tmp_path, reader, form, line, counted):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\n" + json.dumps(GOOD[form]).encode())
    data = read(path, reader, form)
    dropped = sum(count for name, count in data.notes.items() if name.startswith("dropped"))
    assert {name: count for name, count in data.notes.items() if count} == {"rows": 2} | counted
    assert len(data) == 2 - dropped
    for example in data.examples:
        check(example, form, 16)
    path.write_bytes(line)
    if dropped:
        told = "; ".join(f"{count} {name}" for name, count in counted.items())
        assert refusal(path, reader, form) == f"{path}: no usable row: {told}"


def check(example, form: str, max_length: int) -> None:
    lengths = [len(completion) for completion in example.completions]
    longest = max(lengths, default=0)
    assert example.prompt and len(example.prompt) + longest <= max_length
    assert all(lengths) and len(lengths) >= {"prompt": 0, "preference": 2, "ranking": 2}.get(form, 1)
    if form == "steps":
        assert len(example.columns["labels"]) == len(lengths)
    assert example.counted is None or len(example.counted) == lengths[0]


FILES = {  # a file's name, its bytes, what is said whether rows are skipped or not
    "empty.jsonl": (b"", "no usable row"),
    "blank.jsonl": (b"\n\n  \n", "no usable row"),
    "mark.jsonl": (b"\xef\xbb\xbf", "no usable row"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "the"}\n' * 9)[:-9], "cannot be read"),
    "none.jsonl.gz": (b'{"prompt": "the"}\n', "cannot be read: Not a gzipped file"),
    "empty.jsonl.gz": (b"", "no usable row"),
    "none.jsonl.zst": (b'{"prompt": "the"}\n', "cannot be read"),
    "none.parquet": (b'{"prompt": "the"}\n', "cannot be read"),
    "empty.parquet": (b"", "cannot be read"),
    "empty.json": (b"", "not valid JSON"),
    "list.json": (b"[]", "no usable row"),
    "cut.json": (b'[{"prompt": "the"}', "not valid JSON"),
    "number.json": (b"7", "expected a JSON object, got int"),
    "data.json": (b'{"data": []}', "no usable row"),
    "latin.json": (b'[{"prompt": "\xe9"}]', "not UTF-8"),
    "deep.json": (b"[" * 100_000, "not valid JSON"),
    "empty.csv": (b"", "no usable row"),
    "head.csv": (b"prompt,completion\n", "no usable row"),
    "twice.csv": (b"prompt,prompt\nthe,film\n", "a column stands twice"),
    "wide.csv": (b"prompt\nthe,film\n", "row 1: more cells than the 1 columns"),
    "latin.csv": (b"prompt\n\xe9\n", "row 1: prompt: not UTF-8"),
    "other.csv": (b"question\nthe film\n", "row 1: expected the column 'prompt', got question"),
    "latin.txt": (b"\xe9t\xe9", "not UTF-8"),
    "text.txt": (b"the film", "no prompt to continue"),
    "rows.xml": (b"<a/>", "expected a file ending in one of"),
    "rows.parquet.gz": (b"", "expected a file ending in one of"),
    "rows": (b'{"prompt": "the"}\n', "expected a file ending in one of"),
}


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_no_use_is_always_an_error(tmp_path, reader, name, on_bad_row):
    content, problem = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert problem in refusal(tmp_path / name, reader, "prompt", on_bad_row)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_names_that_are_no_files(tmp_path, reader, on_bad_row):
    (tmp_path / "folder.jsonl").mkdir()
    told = refusal(tmp_path / "folder.jsonl", reader, "prompt", on_bad_row)
    assert "a directory without a file ending in one of" in told
    (tmp_path / "folder.jsonl" / "notes.md").touch()
    assert told == refusal(tmp_path / "folder.jsonl", reader, "prompt", on_bad_row)
    assert "no such file" in refusal(tmp_path / "absent.csv.gz", reader, "prompt", on_bad_row)
    (tmp_path / "state.json").write_text("{")  # says that datasets saved it
    assert "neither a file nor a dataset that loads" in refusal(tmp_path, reader, "prompt", on_bad_row)


def test_only_the_first_reasons_are_kept(tmp_path, reader):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "the"}\n' + b"{\n" * 3 + b'{"prompt": 3}\n' * 3)
    data = read(path, reader, "prompt", "skip")
    assert data.notes["skipped_rows"] == 6
    assert [reason.split(": ")[0] for reason in data.reasons] == [f"{path}:{line}" for line in range(2, 7)]


TEXT = st.text(st.characters() | st.sampled_from("\ud800\udfff\x00 \n"), max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "bot"]) | VALUE, "content": TEXT | VALUE}
)
COLUMN = TEXT | VALUE | st.lists(TEXT, max_size=3) | st.lists(TURN, max_size=4) | st.lists(st.booleans(), max_size=3)
NAMES = ("prompt", "completion", "chosen", "rejected", "messages", "text", "ranking", "completions", "labels", "label")
ROW = st.dictionaries(st.sampled_from([*NAMES, "tools", "chat_template_kwargs"]), COLUMN, max_size=6)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("form", ANSWERS)
def test_any_row_is_used_or_counted_or_named(tmp_path_factory, reader, form, on_bad_row):
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(ROW.map(lambda row: GOOD[form] | row) | ROW, min_size=1, max_size=4))
    def holds(rows):
        write_jsonl(path, rows)
        tally = Tally(on_bad_row)
        try:
            found = list(token_examples(read_rows(str(path), bad=tally.bad), reader, form, 16, tally))
        except DataError as error:
            assert on_bad_row == "error" and str(error).startswith(f"{path}:") and "\n" not in str(error)
            return
        for example in found:
            check(example, form, 16)
        dropped = sum(count for name, count in tally.notes.items() if name.startswith("dropped"))
        assert len(found) + dropped + tally.notes["skipped_rows"] == len(rows)

    holds()


@pytest.mark.parametrize(
    ("command", "line", "problem"),
    [
        ("sft", b'{"prompt": "the", "completion": "\\ud800"}', "rows.jsonl:1: not text"),
        ("sft", b'{"messages": [{"role": "user", "content": null}]}', "rows.jsonl:1: messages: expected messages"),
        ("reward", b'{"prompt": "the", "chosen": "film", "rejected": "film"}', "rows.jsonl: no usable row: "),
        ("ppo", b'{"prompt": ["the"]}', "rows.jsonl:1: prompt: expected messages with role and content"),
        ("generate", b'{"prompt": "\xff"}', "rows.jsonl:1: not UTF-8"),
        ("init", b'{"text": ["the", {"film": "\\ud800"}]}', "rows.jsonl:1: not text"),
    ],
)
def test_a_command_says_one_line_and_exits_with_2(tmp_path, capsys, tiny_model, command, line, problem):
    (tmp_path / "rows.jsonl").write_bytes(line)
    arguments = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    arguments += [] if command == "init" else ["--model_name_or_path", tiny_model]
    arguments += {"ppo": ["--reward", "rewards_for_tests:ten"], "sft": ["--max_length", "16"]}.get(command, [])
    arguments += ["--max_length", "16"] if command == "reward" else []
    with pytest.raises(SystemExit) as stop:
        main([command, *arguments])
    told = [text for text in capsys.readouterr().err.splitlines() if text and "Loading weights" not in text]
    assert stop.value.code == 2 and len(told) == 1 and problem in told[0], told


def test_a_run_says_what_it_skipped(tmp_path, capsys, tiny_model):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "the", "completion": " film"}\n{\n' * 3)
    model = ["--model_name_or_path", tiny_model, "--output_dir", str(tmp_path / "out"), "--max_length", "16"]
    main(["sft", *model, "--dataset_name", str(tmp_path / "rows.jsonl"), "--on_bad_row", "skip", "--max_steps", "1"])
    told = capsys.readouterr().err
    assert "3 skipped_rows" in told and f"skipped {tmp_path}/rows.jsonl:4: not valid JSON" in told
