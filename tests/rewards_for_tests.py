"""Reward functions as a user would write them, good ones and broken ones."""

from __future__ import annotations

import random

import numpy

NOT_A_FUNCTION = 3


def count_good(prompts: list[str], completions: list[str], **columns) -> list[float]:
    return [float(completion.split().count("good")) for completion in completions]


def add_label(prompts: list[str], completions: list[str], label: list[int]) -> list[float]:
    return [10.0 * value for value in label]


def ten(prompts, completions, **columns):
    return [10.0] * len(completions)


def too_few(prompts, completions, **columns):
    return [0.0]


def not_finite(prompts, completions, **columns):
    return [0.0] * (len(completions) - 1) + [float("nan")]


def not_numbers(prompts, completions, **columns):
    return [None] * len(completions)


def no_list(prompts, completions, **columns):
    return 1.0


def fails(prompts, completions, **columns):
    raise KeyError("answer")


def noisy(prompts, completions, **columns):
    """Draws from the global generators, as a judge with sampling would."""
    return [len(text) / 10 + random.random() + float(numpy.random.rand()) for text in completions]


def lengths(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def of_tokens(prompts, completions, completion_ids, **columns):
    """A tenth of its id for each token."""
    return [[token / 10 for token in ids] for ids in completion_ids]


def of_words(prompts, completions, **columns):
    """One number a word: as many as tokens but for the EOS, which the text does not show."""
    return [[float(len(word)) for word in completion.split()] for completion in completions]


def of_tokens_sometimes(prompts, completions, completion_ids, **columns):
    return [[0.0] * len(completion_ids[0]), *[1.0] * (len(completions) - 1)]


def of_tokens_not_finite(prompts, completions, completion_ids, **columns):
    return [[float("inf")] * len(ids) for ids in completion_ids]


def completions_first(completions, prompts, **columns):
    return [float(len(text)) for text in completions]


def completions_alone(completions, **columns):
    return [float(len(text)) for text in completions]
