"""Rows to examples: a prompt and its answers as text.

A row is standard (strings) or conversational (lists of messages), with the columns `prompt`, `completion`, `chosen`,
`rejected`, `messages`, `text`, `ranking` or `completions`, as the form that a command asks for needs them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from rlhf.chat import Chat, check_messages
from rlhf.read import DataError, check_text

# What a row is read as. A dialogue is a completion, but of `messages` every turn of the assistant is one.
Form = Literal["prompt", "completion", "dialogue", "unpaired", "preference", "ranking", "steps"]
ANSWERS: dict[Form, tuple[str, ...]] = {  # the columns of its answers
    "prompt": (), "completion": ("completion",), "dialogue": ("completion",), "unpaired": ("completion",),
    "preference": ("chosen", "rejected"), "ranking": ("ranking",), "steps": ("completions",),
}  # fmt: skip
MESSAGES = ("prompt", "messages", "completion", "chosen", "rejected")  # what may be a list of them
OPTIONS = ("tools", "chat_template_kwargs")  # of the chat template
ROW_COLUMNS = {"prompt", "messages", "text", *OPTIONS, *chain.from_iterable(ANSWERS.values())}
DIALOGUE_TURN = "\n\nAssistant:"  # marks the answer in dialogues written as one string, hh-rlhf's format


@dataclass(frozen=True)
class Example:
    where: str  # file:line
    prompt: str
    completions: list[str]
    templated: bool  # a chat template wrote the special tokens
    columns: dict  # the row's others
    spans: list[tuple[int, int]] | None = None  # characters of prompt + completion that count; None: the completion


def parse(where: str, row: dict, form: Form, tokenizer) -> Example:
    """A row as a prompt and answers.

    `messages` are a prompt and a last turn, or for no answers a prompt alone unless the assistant has the last turn;
    `text` has an empty prompt; chosen and rejected without a prompt have their common beginning taken as the prompt.
    prompt + completion gives the row's text back exactly.
    """
    answers, row = ANSWERS[form], {name: value for name, value in row.items() if value is not None}
    if empty := [name for name in MESSAGES if row.get(name) == []]:
        raise DataError(f"{where}: {empty[0]}: expected messages, got an empty list")
    derived = "prompt" not in row
    if form == "dialogue" and derived and "messages" in row:
        return _dialogue(where, row, tokenizer)
    row = _with_prompt(where, row, form) if derived else row
    if form == "ranking" and "ranking" not in row and {"chosen", "rejected"} <= row.keys():
        row["ranking"] = [row.pop("chosen"), row.pop("rejected")]
    missing = [name for name in ("prompt", *answers) if name not in row]
    if missing:
        wanted = f"{missing[0]!r}" + ", or 'chosen' and 'rejected'" * (missing[0] == "ranking")
        raise DataError(f"{where}: expected the column {wanted}, got {', '.join(row) or 'an empty row'}")
    if not answers and derived and not row["prompt"]:
        raise DataError(f"{where}: no prompt to continue: give rows with a column `prompt`, or messages of the user")
    kind = list if isinstance(row["prompt"], list) else str
    prompt = _typed(where, row, "prompt", kind)
    if form in ("ranking", "steps"):
        completions = _listed(where, row, answers[0], kind, 2 if form == "ranking" else 1)
    else:
        completions = [_typed(where, row, name, kind) for name in answers]
    _check_labels(where, row, form)
    if kind is list:
        prompt, completions = Chat.of(where, row, tokenizer).answers(prompt, completions)
    for text in (prompt, *completions):
        check_text(where, text)
    return Example(where, prompt, completions, kind is list, _others(row))


def _dialogue(where: str, row: dict, tokenizer) -> Example:
    text, spans = Chat.of(where, row, tokenizer).dialogue(_typed(where, row, "messages", list))
    check_text(where, text)
    start = spans[0][0]
    return Example(where, text[:start], [text[start:]], True, _others(row), spans)


def _others(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ROW_COLUMNS}


def _with_prompt(where: str, row: dict, form: Form) -> dict:
    """The prompt that stands in another column."""
    if "messages" in row:
        turns = _typed(where, row, "messages", list)
        answered = turns[-1]["role"] == "assistant"
        if ANSWERS[form] == ("completion",) and not answered:
            raise DataError(f"{where}: messages: expected a last turn of the assistant, got {turns[-1]['role']!r}")
        return row | ({"prompt": turns[:-1], "completion": turns[-1:]} if answered else {"prompt": turns})
    if "text" in row:
        return row | {"prompt": "", "completion": _typed(where, row, "text", str)}
    if "chosen" in row and "rejected" in row:
        kind = type(row["chosen"])
        chosen, rejected = _typed(where, row, "chosen", kind), _typed(where, row, "rejected", kind)
        cut = _shared_prompt(chosen, rejected)
        return row | {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
    return dict(row)


def _listed(where: str, row: dict, name: str, kind: type, least: int) -> list:
    values = row[name]
    if not isinstance(values, list) or len(values) < least:
        raise DataError(f"{where}: {name}: expected a list of at least {least}, got {values!r:.80}")
    return [_typed(where, {f"{name}[{i}]": value}, f"{name}[{i}]", kind) for i, value in enumerate(values)]


def _check_labels(where: str, row: dict, form: Form) -> None:
    if form == "unpaired" and not isinstance(row.get("label"), bool):
        raise DataError(f"{where}: label: expected true (desired) or false, got {row.get('label')!r:.80}")
    if form == "steps":
        labels, count = row.get("labels"), len(row["completions"])
        if not isinstance(labels, list) or len(labels) != count or not all(isinstance(x, bool) for x in labels):
            raise DataError(f"{where}: labels: expected {count} of true and false, one a step, got {labels!r:.80}")


def _typed(where: str, row: dict, name: str, kind: type):
    value = row[name]
    if kind not in (str, list) or not isinstance(value, kind):
        raise DataError(f"{where}: {name}: expected {'messages' if kind is list else 'text'}, got {value!r:.80}")
    return check_messages(where, name, value) if kind is list else value


def _shared_prompt(chosen: str | list, rejected: str | list) -> int:
    """Length of the common prompt: whole messages, or text up to the answer's turn or else to a word's beginning."""
    shorter = min(len(chosen), len(rejected))
    shared = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, list):
        return min(shared, shorter - 1)
    head = chosen[:shared]
    if (turn := head.rfind(DIALOGUE_TURN)) >= 0:
        return turn + len(DIALOGUE_TURN)
    words = re.match(r".*\s", head, re.DOTALL)
    return len(words[0].rstrip()) if words else 0
