"""Rows to token examples to batches.

A row is standard (strings) or conversational (lists of messages, rendered by the tokenizer's chat template), with the
columns `prompt`, `completion`, `chosen`, `rejected`, `messages` or `text`. The order of examples is a function of
(seed, epoch), so a run continues from one integer: how many examples it has seen.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal

from rlhf.config import TrainConfig, UsageError
from rlhf.types import PromptBatch

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
TABLE_SUFFIXES = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
Form = Literal["prompt", "completion", "unpaired", "preference", "ranking", "steps"]  # what a row is read as
ANSWERS: dict[Form, tuple[str, ...]] = {  # the columns of its answers
    "prompt": (), "completion": ("completion",), "unpaired": ("completion",), "preference": ("chosen", "rejected"),
    "ranking": ("ranking",), "steps": ("completions",),
}  # fmt: skip
ROW_COLUMNS = ("prompt", "messages", "text", *dict.fromkeys(chain.from_iterable(ANSWERS.values())))
MESSAGES = ("prompt", "messages", "completion", "chosen", "rejected")  # what may be a list of them
DIALOGUE_TURN = "\n\nAssistant:"  # marks the answer in dialogues written as one string, hh-rlhf's format


class DataError(UsageError):
    """A file or row that can't be used; the message begins with file:line."""


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    names: tuple[str, ...]  # files or hub ids, one after the other
    split: str = "train"  # of a hub dataset

    @staticmethod
    def of(config: TrainConfig) -> Source:
        return Source(tuple(config.dataset_name), config.dataset_split)


@dataclass(frozen=True)
class Reader:
    """What rows become tokens by. A language model and a scorer have these, too."""

    tokenizer: object
    eos_ids: tuple[int, ...]
    vocab_size: int | None = None  # ids that the model can read


@dataclass(frozen=True)
class Example:
    where: str  # file:line
    prompt: str
    completions: list[str]
    templated: bool  # a chat template wrote the special tokens
    columns: dict


@dataclass(frozen=True)
class TokenExample:
    prompt: list[int]  # never empty
    completions: list[list[int]]  # one; chosen and rejected; best first; or steps. With its EOS unless it was cut
    text: str
    columns: dict
    where: str = ""  # file:line


@dataclass(frozen=True)
class Dataset:
    examples: list[TokenExample]
    notes: dict[str, int]  # what was cut or dropped, and how often

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def longest_prompt(self) -> int:
        return max(len(example.prompt) for example in self.examples)

    def window(self, start: int, stop: int, seed: int) -> list[TokenExample]:
        """Examples start..stop of the endless stream of epochs, each epoch in its own order."""
        n = len(self.examples)
        return [self.examples[permutation(n, f"{seed}/{i // n}")[i % n]] for i in range(start, stop)]

    def split(self, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """(rest, held out), both in file order."""
        held = set(permutation(len(self), f"{seed}/eval")[: int(len(self) * fraction)])
        parts = [[e for i, e in enumerate(self.examples) if (i in held) == side] for side in (False, True)]
        return Dataset(parts[0], self.notes), Dataset(parts[1], {})

    def fingerprint(self) -> str:
        """Of all that training reads. Of a column that is no JSON the type counts: its repr may hold an address."""
        return fingerprint((e.prompt, e.completions, e.text, e.columns) for e in self.examples)


def fingerprint(rows: Iterable) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()


def prompt_batch(examples: list[TokenExample]) -> PromptBatch:
    names = {name for e in examples for name in e.columns}
    columns = {name: [e.columns.get(name) for e in examples] for name in sorted(names)}
    return PromptBatch([e.prompt for e in examples], [e.text for e in examples], columns)


def plan(count: int, batch_size: int, epochs: float, max_steps: int) -> list[tuple[int, int]]:
    """The window of each optimizer step: `epochs` passes exactly, the last step cut short, or else max_steps steps."""
    seen = max_steps * batch_size if max_steps > 0 else math.ceil(count * epochs)
    return [(start, min(start + batch_size, seen)) for start in range(0, seen, batch_size)]


@lru_cache(maxsize=4)
def permutation(n: int, key: str) -> list[int]:
    order = list(range(n))
    random.Random(key).shuffle(order)
    return order


# Reading


def read_text(path: str) -> str:
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_rows(name: str, split: str = "train") -> Iterator[tuple[str, dict]]:
    """(file:line, row) of a local file or a hub dataset. A plain text is one row with the column `text`."""
    known = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *TABLE_SUFFIXES)
    if not Path(name).is_file() and (name.endswith(known) or name.startswith((".", "/", "~"))):
        raise DataError(f"{name}: no such file")
    if name.endswith(TEXT_SUFFIXES):
        yield name, {"text": read_text(name)}
    elif name.endswith(JSONL_SUFFIXES):
        yield from _read_jsonl(name)
    elif Path(name).is_file() and not name.endswith(known):
        raise DataError(f"{name}: expected a file ending in one of {', '.join(known)}")
    else:
        yield from _read_with_datasets(name, split)


def _read_jsonl(path: str) -> Iterator[tuple[str, dict]]:
    opener = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
                yield f"{path}:{number}", row
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number}: cannot be read: {error}") from error


def _read_with_datasets(name: str, split: str) -> Iterator[tuple[str, dict]]:
    import datasets  # a second of imports that JSONL does without

    kind = TABLE_SUFFIXES.get(Path(name).suffix)
    source = {"path": kind, "data_files": name, "split": "train"} if kind else {"path": name, "split": split}
    try:
        table = datasets.load_dataset(**source)
    except Exception as error:  # datasets raises a dozen unrelated types for "it is not there" and "it is not valid"
        raise DataError(f"{name}: neither a file nor a dataset that loads: {' '.join(str(error).split())}") from error
    for number, row in enumerate(table, start=1):
        yield f"{name} row {number}", row


# Rows to examples


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
    if derived and "messages" in row:
        turns = _typed(where, row, "messages", list)
        open_ended = not answers and turns[-1]["role"] != "assistant"
        row |= {"prompt": turns} if open_ended else {"prompt": turns[:-1], "completion": turns[-1:]}
    elif derived and "text" in row:
        row |= {"prompt": "", "completion": _typed(where, row, "text", str)}
    elif derived and "chosen" in row and "rejected" in row:
        kind = type(row["chosen"])
        chosen, rejected = _typed(where, row, "chosen", kind), _typed(where, row, "rejected", kind)
        cut = _shared_prompt(chosen, rejected)
        row |= {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
    if form == "ranking" and "ranking" not in row and {"chosen", "rejected"} <= row.keys():
        row["ranking"] = [row.pop("chosen"), row.pop("rejected")]
    missing = [name for name in ("prompt", *answers) if name not in row]
    if missing:
        raise DataError(f"{where}: expected the column {missing[0]!r}, got {', '.join(row) or 'an empty row'}")
    if not answers and derived and not row["prompt"]:
        raise DataError(f"{where}: no prompt to continue: give rows with a column `prompt`, or messages of the user")
    kind = list if isinstance(row["prompt"], list) else str
    prompt = _typed(where, row, "prompt", kind)
    if form in ("ranking", "steps"):
        completions = _listed(where, row, answers[0], kind, 2 if form == "ranking" else 1)
    else:
        completions = [_typed(where, row, name, kind) for name in answers]
    _check_labels(where, row, form)
    columns = {name: value for name, value in row.items() if name not in ROW_COLUMNS}
    if kind is list:
        prompt, completions = _render(where, prompt, completions, tokenizer)
    return Example(where, prompt, completions, kind is list, columns)


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
    if kind is list and not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        raise DataError(f"{where}: {name}: expected messages with role and content, got {value!r:.80}")
    return value


def _shared_prompt(chosen: str | list, rejected: str | list) -> int:
    """Length of the common prompt: whole messages, or text up to the answer's turn or else to a word's beginning."""
    shorter = min(len(chosen), len(rejected))
    shared = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, list):
        return min(shared, shorter - 1)
    head = chosen[:shared]
    if (turn := head.rfind(DIALOGUE_TURN)) >= 0:
        return turn + len(DIALOGUE_TURN)
    while head and not head[-1].isspace():
        head = head[:-1]
    return len(head.rstrip())


def _render(where: str, prompt: list, completions: list[list], tokenizer) -> tuple[str, list[str]]:
    if not tokenizer.chat_template:
        raise DataError(f"{where}: messages need a chat template and the tokenizer has none: use text columns instead")
    try:
        head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if prompt else ""
        wholes = [tokenizer.apply_chat_template(prompt + c, tokenize=False) for c in completions]
    except Exception as error:  # templates are programs: jinja2 raises what their authors chose
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from error
    if not all(whole.startswith(head) for whole in wholes):
        raise DataError(f"{where}: the chat template renders the prompt otherwise once an answer follows")
    return head, [whole[len(head) :] for whole in wholes]


# Examples to tokens


def load(source: Source, reader: Reader, form: Form, max_length: int) -> Dataset:
    """Every row of the source, by `tokenize`; a plain text for completions becomes blocks of max_length."""
    examples, notes = [], Counter()
    for name in source.names:
        if name.endswith(TEXT_SUFFIXES) and form == "completion":
            part = _blocks(name, reader, max_length)
        else:
            part = tokenize(read_rows(name, source.split), reader, form, max_length)
        examples += part.examples
        notes.update(part.notes)
    if not examples:
        raise DataError(f"{', '.join(source.names)}: no usable row")
    return Dataset(examples, dict(notes))


def tokenize(rows: Iterable[tuple[str, dict]], reader: Reader, form: Form, max_length: int) -> Dataset:
    """Rows (file:line, row) as tokens, cut to max_length: a prompt loses its head, a completion its tail."""
    examples = [parse(where, row, form, reader.tokenizer) for where, row in rows]
    if mixed := next((e for e in examples if e.templated != examples[0].templated), None):
        raise DataError(f"{mixed.where}: mixes messages and text in one dataset")
    kept, notes = [], Counter(rows=len(examples))
    for example, prompt, completions in _encode(examples, reader):
        _refuse_unknown(example.where, chain(prompt, *completions), reader)
        if not example.prompt and not all(example.completions):
            notes["dropped_empty"] += 1
        elif len(completions) == 2 and completions[0] == completions[1]:
            notes["dropped_identical"] += 1
        else:
            whole = len(prompt), sum(map(len, completions))
            prompt, completions = fit(prompt, completions, max_length)
            notes["cut_prompts"] += len(prompt) < whole[0]
            notes["cut_completions"] += sum(map(len, completions)) < whole[1]
            kept.append(TokenExample(prompt, completions, example.prompt, example.columns, example.where))
    return Dataset(kept, dict(notes))


def fit(prompt: list[int], completions: list[list[int]], max_length: int) -> tuple[list[int], list[list[int]]]:
    """Both within max_length together. The completions keep what the prompt leaves, and at least half of the room."""
    room = max(max_length - len(prompt), max_length // 2)
    completions = [c[:room] for c in completions]
    return prompt[-(max_length - max(map(len, completions), default=0)) :], completions


def _encode(examples: list[Example], reader: Reader) -> Iterator[tuple[Example, list, list]]:
    """Prompt and completion tokens. They are tokenized together, as a model reads them, where that keeps the prompt's
    tokens; otherwise apart, as a model that continues the prompt writes them."""
    tokenizer, eos_ids = reader.tokenizer, reader.eos_ids
    special = not (examples and examples[0].templated)
    prompts = _token_ids(tokenizer, [e.prompt for e in examples], special)
    texts = [e.prompt + c for e in examples for c in e.completions]
    whole = iter(_token_ids(tokenizer, texts, special))
    alone = iter(_token_ids(tokenizer, list(chain.from_iterable(e.completions for e in examples)), False))
    for example, prompt in zip(examples, prompts):
        if special and len(prompt) > 1 and prompt[-1] in eos_ids:  # one alone begins the text: BOS may equal EOS
            prompt = prompt[:-1]  # tokenizers that end every text end the prompt too
        completions = []
        for _ in example.completions:
            joint, own = next(whole), next(alone)
            ids = joint[len(prompt) :] if joint[: len(prompt)] == prompt else own
            completions.append(_ended(ids, eos_ids))
        yield example, prompt or [_start_id(tokenizer, eos_ids)], completions


def _token_ids(tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []


def _ended(ids: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """One EOS at the end. Chat templates write theirs, often with a newline after it."""
    for end in (len(ids), len(ids) - 1):
        if end > 0 and ids[end - 1] in eos_ids:
            return ids[:end]
    return [*ids, *eos_ids[:1]]


def _start_id(tokenizer, eos_ids: tuple[int, ...]) -> int:
    """What stands before an empty prompt: something has to be there for the first token to be predicted from."""
    start = next((i for i in (tokenizer.bos_token_id, *eos_ids) if i is not None), None)
    if start is None:
        raise DataError("an empty prompt needs a tokenizer with a BOS or EOS token")
    return start


def _refuse_unknown(where: str, ids: Iterable[int], reader: Reader) -> None:
    highest = max(ids, default=0)
    if reader.vocab_size is not None and highest >= reader.vocab_size:
        token = reader.tokenizer.convert_ids_to_tokens(highest)
        raise DataError(
            f"{where}: the model's embedding of {reader.vocab_size} tokens has none for {token!r} ({highest}): resize "
            "the embedding, or take that token out of the tokenizer"
        )


def _blocks(path: str, reader: Reader, max_length: int) -> Dataset:
    """A plain text in consecutive blocks, the first token of each its prompt. What fills no block is dropped."""
    ids = _token_ids(reader.tokenizer, [read_text(path)], False)[0]
    _refuse_unknown(path, ids, reader)
    blocks = [ids[i : i + max_length] for i in range(0, len(ids) - max_length + 1, max_length)]
    if not blocks:
        raise DataError(f"{path}: {len(ids)} tokens are fewer than one block: lower max_length from {max_length}")
    dropped = len(ids) - len(blocks) * max_length
    return Dataset(
        [TokenExample(b[:1], [b[1:]], "", {}) for b in blocks], {"blocks": len(blocks), "dropped_tokens": dropped}
    )
