"""Messages to text by the tokenizer's chat template, and which part of a dialogue the assistant wrote."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass

from rlhf.read import DataError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the block by which a template marks what the assistant writes


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template, as one row has it filled in."""

    where: str
    tokenizer: object
    options: dict  # tools, and the row's chat_template_kwargs

    @staticmethod
    def of(where: str, row: dict, tokenizer) -> Chat:
        if not tokenizer.chat_template:
            way_out = "use text columns instead"
            raise DataError(f"{where}: messages need a chat template and the tokenizer has none: {way_out}")
        options, tools = row.get("chat_template_kwargs") or {}, row.get("tools")
        if not isinstance(options, dict):
            raise DataError(f"{where}: chat_template_kwargs: expected an object, got {options!r:.80}")
        arguments = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"documents"}
        if taken := sorted(options.keys() & arguments):
            raise DataError(f"{where}: chat_template_kwargs: {taken[0]}: says how to render, which rows do not choose")
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: tools: expected a list of objects, or one as JSON: {error}") from error
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise DataError(f"{where}: tools: expected a list of objects, got {tools!r:.80}")
        return Chat(where, tokenizer, options | ({"tools": tools} if tools else {}))

    def render(self, turns: list[dict], prompt: bool = False) -> str:
        """The turns as text; for a prompt with the beginning of the assistant's next turn. No turns are no text."""
        try:
            options = {"tokenize": False, "add_generation_prompt": prompt}
            return self.tokenizer.apply_chat_template(turns, **options, **self.options) if turns else ""
        except Exception as error:  # templates are programs: jinja2 raises what their authors chose
            told = " ".join(str(error).split())
            raise DataError(f"{self.where}: the chat template refuses these messages: {told}") from error

    def answers(self, turns: list[dict], completions: list[list[dict]]) -> tuple[str, list[str]]:
        head = self.render(turns, prompt=True)
        wholes = [self.render(turns + completion) for completion in completions]
        if not all(whole.startswith(head) for whole in wholes):
            raise DataError(f"{self.where}: the chat template renders the prompt otherwise once an answer follows")
        if any(turns and whole == head for turns, whole in zip(completions, wholes)):
            raise DataError(f"{self.where}: the chat template writes nothing of the assistant's turns")
        return head, [whole[len(head) :] for whole in wholes]

    def dialogue(self, turns: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The text of all turns, and the characters of it that the assistant wrote, at least some.

        They are what the template puts in its {% generation %} blocks; where it has none, what each turn of the
        assistant adds to the turns before it with the beginning of an answer.
        """
        if not any(turn["role"] == "assistant" for turn in turns):
            raise DataError(f"{self.where}: messages: expected a turn of the assistant, whose tokens count")
        if GENERATION.search(self.tokenizer.get_chat_template(tools=self.options.get("tools"))):
            text, spans = self._marked(turns)
        else:
            text = self.render(turns)
            spans = [self._added(text, turns, i) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        spans = [(start, stop) for start, stop in spans if start < stop]
        if not spans:
            raise DataError(f"{self.where}: messages: the chat template writes nothing of the assistant's turns")
        return text, spans

    def _marked(self, turns: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        # The tokenizer's own mask starts from these characters, and loses blocks that begin or end in a space which is
        # in no token.
        from transformers.utils.chat_template_utils import render_jinja_template

        tools = self.options.get("tools")
        given = self.tokenizer.special_tokens_map | {"tools": tools} | self.options
        template = self.tokenizer.get_chat_template(tools=tools)
        try:
            texts, spans = render_jinja_template(
                [turns], chat_template=template, return_assistant_tokens_mask=True, **given
            )
        except Exception as error:  # as in render
            told = " ".join(str(error).split())
            raise DataError(f"{self.where}: the chat template refuses these messages: {told}") from error
        return texts[0], spans[0]

    def _added(self, text: str, turns: list[dict], i: int) -> tuple[int, int]:
        head, body = self.render(turns[:i], prompt=True), self.render(turns[: i + 1])
        if not (text.startswith(body) and body.startswith(head)):
            raise DataError(
                f"{self.where}: messages[{i}]: the chat template renders the turns up to here otherwise once others "
                "follow, so that the assistant's tokens cannot be told: mark them by {% generation %} in the template"
            )
        return len(head), len(body)


def check_messages(where: str, name: str, value: list) -> list[dict]:
    """Turns without the nulls that a table puts in for keys which other rows have. A turn that only calls tools has
    an empty content: templates would write None for null."""
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise DataError(f"{where}: {name}: expected messages with role and content, got {value!r:.80}")
        turn = {key: entry for key, entry in turn.items() if entry is not None}
        if "tool_calls" in turn:
            turn = {"content": ""} | turn
        content = turn.get("content")
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not isinstance(turn.get("role"), str) or not (isinstance(content, str) or parts):
            raise DataError(f"{where}: {name}: expected messages with role and content, got {value!r:.80}")
        turns.append(turn)
    return turns
