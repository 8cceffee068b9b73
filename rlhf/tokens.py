"""Rows to token examples: tokenized in blocks, cut to length, what is cut or dropped counted."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from rlhf.read import DataError, Source, Tally, kind_of, read_rows, read_text
from rlhf.rows import Example, Form, parse

BLOCK = 1024  # rows that are tokenized in one call: enough for every core, and what memory holds of text beside tokens


@dataclass(frozen=True)
class Reader:
    """What rows become tokens by. A language model and a scorer have these, too."""

    tokenizer: object
    eos_ids: tuple[int, ...]
    vocab_size: int | None = None  # ids that the model can read


@dataclass(frozen=True)
class TokenExample:
    prompt: list[int]  # never empty
    completions: list[list[int]]  # one; chosen and rejected; best first; or steps. With its EOS unless it was cut
    text: str
    columns: dict
    counted: list[bool] | None = None  # which tokens of the one completion count; None: all


def file_examples(
    name: str,  # a file, or a hub dataset
    source: Source,
    reader: Reader,
    form: Form,
    max_length: int,
    tally: Tally,
) -> Iterator[TokenExample]:
    """At least one: a file of no usable row is an error. A plain text for completions is cut into blocks."""
    if kind_of(name) == ".txt" and form in ("completion", "dialogue"):
        found = _text_blocks(name, reader, max_length, tally.notes)
    else:
        found = token_examples(
            read_rows(name, source.split, tally.bad, source.streamed > 0), reader, form, max_length, tally
        )
    empty, notes, reasons = True, Counter(tally.notes), len(tally.reasons)
    for example in found:
        empty = False
        yield example
    if empty:
        counts = (tally.notes - notes).items()
        told = [f"{count} {note}" for note, count in counts if note != "rows"] + tally.reasons[reasons:][:1]
        raise DataError(f"{name}: no usable row{': ' * bool(told)}{'; '.join(told)}")


def token_examples(
    rows: Iterable[tuple[str, dict]],
    reader: Reader,
    form: Form,
    max_length: int,
    tally: Tally,  # brought up to date
) -> Iterator[TokenExample]:
    """Rows (file:line, row) as tokens, cut to max_length: a prompt loses its head, a completion its tail, steps whole
    ones from their end."""
    rows, templated = iter(rows), None
    while block := list(islice(rows, BLOCK)):
        examples: list[Example] = []
        for where, row in block:
            try:
                example = parse(where, row, form, reader.tokenizer)
                templated = example.templated if templated is None else templated
                if example.templated != templated:
                    raise DataError(f"{where}: mixes messages and text in one dataset")
                examples.append(example)
            except DataError as error:
                tally.bad(error)
        for example, tokens in _encode(examples, reader):
            try:
                _refuse_unknown(example.where, chain(tokens.prompt, *tokens.completions), reader)
            except DataError as error:
                tally.bad(error)
            else:
                tally.notes["rows"] += 1
                yield from _cut(example, tokens, form, max_length, tally.notes)


def _cut(example: Example, tokens: TokenExample, form: Form, max_length: int, notes: Counter) -> Iterator[TokenExample]:
    """The example within max_length, or nothing where nothing is to be learnt from it."""
    prompt, completions = tokens.prompt, tokens.completions
    kept_prompt, kept = (fit_steps if form == "steps" else fit)(prompt, completions, max_length)
    if tokens.counted == [] or (not example.prompt and not all(example.completions)):
        notes["dropped_empty"] += 1
    elif form in ("preference", "ranking") and all(c == kept[0] for c in kept[1:]):
        notes["dropped_identical"] += 1  # as given, or in what was kept of them
    else:
        notes["cut_prompts"] += len(kept_prompt) < len(prompt)
        notes["cut_completions"] += sum(map(len, kept)) < sum(map(len, completions))
        if form == "steps" and not kept:
            notes["dropped_long"] += 1
            return
        columns = tokens.columns
        if len(kept) < len(completions):
            columns = columns | {"labels": columns["labels"][: len(kept)]}
        counted = tokens.counted and tokens.counted[: len(kept[0])]
        yield TokenExample(kept_prompt, kept, tokens.text, columns, counted)


def fit(prompt: list[int], completions: list[list[int]], max_length: int) -> tuple[list[int], list[list[int]]]:
    """Both within max_length together. The completions keep what the prompt leaves, and at least half of the room."""
    room = max(max_length - len(prompt), max_length // 2)
    completions = [c[:room] for c in completions]
    return prompt[-(max_length - max(map(len, completions), default=0)) :], completions


def fit_steps(prompt: list[int], steps: list[list[int]], max_length: int) -> tuple[list[int], list[list[int]]]:
    """All within max_length together, in the same way, but a step stays whole or goes: its label is about its end."""
    room, kept, total = max(max_length - len(prompt), max_length // 2), [], 0
    for step in steps:
        if (total := total + len(step)) > room:
            break
        kept.append(step)
    return prompt[-(max_length - sum(map(len, kept))) :], kept


def _encode(examples: list[Example], reader: Reader) -> Iterator[tuple[Example, TokenExample]]:
    """Prompt and completion tokens. They are tokenized together, as a model reads them, where that keeps the prompt's
    tokens; otherwise apart, as a model that continues the prompt writes them."""
    tokenizer, special = reader.tokenizer, not (examples and examples[0].templated)
    plain, dialogues = [e for e in examples if not e.spans], [e for e in examples if e.spans]
    marked = _encode_dialogues(dialogues, reader)
    prompts = _token_ids(tokenizer, [e.prompt for e in plain], special)
    for ids in prompts:
        if special and len(ids) > 1 and ids[-1] in reader.eos_ids:  # one alone begins the text: BOS may equal EOS
            del ids[-1]  # tokenizers that end every text end the prompt too
    pairs = [(ids, e.prompt, c) for ids, e in zip(prompts, plain) for c in e.completions]
    wholes = _token_ids(tokenizer, [prompt + completion for _, prompt, completion in pairs], special)
    joint = [whole[: len(ids)] == ids for (ids, *_), whole in zip(pairs, wholes)]
    alone = iter(_token_ids(tokenizer, [c for (*_, c), fits in zip(pairs, joint) if not fits], False))
    answers = (whole[len(ids) :] if fits else next(alone) for (ids, *_), whole, fits in zip(pairs, wholes, joint))
    beginnings = iter(prompts)
    for example in examples:
        if example.spans:
            yield example, next(marked)
        else:
            prompt = next(beginnings) or [_start_id(reader, example.where)]
            completions = [_ended(next(answers), reader) for _ in example.completions]
            yield example, TokenExample(prompt, completions, example.prompt, example.columns)


def _token_ids(tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []


def _encode_dialogues(examples: list[Example], reader: Reader) -> Iterator[TokenExample]:
    """One sequence each: the prompt ends before the first token that counts, the completion with the last.

    A token counts that has a character of a span, and so does the EOS token right after one; blanks that
    follow the EOS token of a span do not.
    """
    if not examples:
        return
    if not reader.tokenizer.is_fast:
        raise DataError(f"{examples[0].where}: telling the assistant's tokens needs a fast tokenizer")
    texts = [e.prompt + e.completions[0] for e in examples]
    encoded = reader.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for example, text, ids, offsets in zip(examples, texts, encoded["input_ids"], encoded["offset_mapping"]):
        begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
        counted = [False] * len(ids)
        for start, stop in example.spans:
            first, after = bisect_right(ends, start), bisect_left(begins, stop)
            over = [i for i in range(first, after) if ids[i] in reader.eos_ids]
            if over and not text[ends[over[-1]] : stop].strip():
                after = over[-1] + 1
            elif after < len(ids) and ids[after] in reader.eos_ids:
                after += 1
            counted[first:after] = [True] * (after - first)
        last = max((i + 1 for i, counts in enumerate(counted) if counts), default=0)
        first = counted.index(True) if last else 0
        answer, counted = ids[first:last], counted[first:last]
        if answer and not text[ends[last - 1] :].strip():
            answer = _ended(answer, reader)
            counted = [*counted, True][: len(answer)]
        prompt = ids[:first] or [_start_id(reader, example.where)]
        yield TokenExample(prompt, [answer], example.prompt, example.columns, counted)


def _ended(ids: list[int], reader: Reader) -> list[int]:
    """One EOS at the end. Chat templates write theirs, often with a newline after it; tokenizers that end every text
    write another."""
    ends, end = [token in reader.eos_ids for token in ids], len(ids)
    if ends[-2:] == [True, False] and not reader.tokenizer.decode(ids[-1:]).strip():
        end -= 1
    while ends[max(end - 2, 0) : end] == [True, True]:
        end -= 1
    return ids[:end] if end and ends[end - 1] else [*ids[:end], *reader.eos_ids[:1]]


def _start_id(reader: Reader, where: str) -> int:
    """What stands before an empty prompt: something has to be there for the first token to be predicted from."""
    start = next((i for i in (reader.tokenizer.bos_token_id, *reader.eos_ids) if i is not None), None)
    if start is None:
        raise DataError(f"{where}: an empty prompt needs a tokenizer with a BOS or EOS token")
    return start


def _refuse_unknown(where: str, ids: Iterable[int], reader: Reader) -> None:
    highest = max(ids, default=0)
    if reader.vocab_size is not None and highest >= reader.vocab_size:
        token = reader.tokenizer.convert_ids_to_tokens(highest)
        raise DataError(
            f"{where}: the model's embedding of {reader.vocab_size} tokens has none for {token!r} ({highest}): resize "
            "the embedding, or take that token out of the tokenizer"
        )


def _text_blocks(path: str, reader: Reader, max_length: int, notes: Counter) -> Iterator[TokenExample]:
    """A plain text in consecutive blocks, the first token of each its prompt. What fills no block is dropped."""
    ids = _token_ids(reader.tokenizer, [read_text(path)], False)[0]
    _refuse_unknown(path, ids, reader)
    count = len(ids) // max_length
    if not count:
        raise DataError(f"{path}: {len(ids)} tokens are fewer than one block: lower max_length from {max_length}")
    notes["blocks"] += count
    notes["dropped_tokens"] += len(ids) - count * max_length
    for start in range(0, count * max_length, max_length):
        yield TokenExample(ids[start : start + 1], [ids[start + 1 : start + max_length]], "", {})
