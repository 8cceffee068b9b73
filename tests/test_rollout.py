"""Sampling: the distribution is that of the training log-probabilities, and nothing else leaks in."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from rlhf.config import RunConfig
from rlhf.forward import response_logprobs
from rlhf.model import ModelError, load_language_model
from rlhf.rollout import Sampling, draw, generate
from rlhf.types import PromptBatch, pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = RunConfig(output_dir="unused", device="cpu")
PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 5]]


@pytest.fixture
def model(tiny_model):
    return load_language_model(tiny_model, RUN)


def prompt_batch(prompts: list[list[int]]) -> PromptBatch:
    return PromptBatch(prompts, ["text"] * len(prompts), {})


def sharpen(model, factor: float = 20.0):
    """Random weights are nearly uniform: a larger head makes probabilities differ."""
    with torch.no_grad():
        model.module.get_output_embeddings().weight.mul_(factor)
    return model


def test_a_response_ends_at_its_first_eos_of_any_kind(model):
    model = replace(model, eos_ids=(2, 5, 9, 11, 12))
    rollout = generate(model, prompt_batch(PROMPTS * 20), Sampling(8))
    lengths = rollout.sequences.response_lengths.tolist()
    assert len(set(lengths)) > 3 and not all(rollout.finished) and any(rollout.finished)
    for row, (prompt, length, finished) in enumerate(zip(PROMPTS * 20, lengths, rollout.finished.tolist())):
        ids = rollout.sequences.ids[row].tolist()
        response = ids[len(prompt) : len(prompt) + length]
        assert ids[: len(prompt)] == prompt
        assert [token in model.eos_ids for token in response] == [False] * (length - 1) + [finished]
        assert finished or length == 8
        assert rollout.completions[row] == model.tokenizer.decode(
            response[: length - finished], skip_special_tokens=True
        )


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_follow_the_training_logprobs(model, temperature):
    """Total variation between 20,000 samples of one token and exp(log-probability); the bound is 3x chance."""
    sharpen(model)
    rollout = generate(model, prompt_batch([[4, 5]] * 20_000), Sampling(1, temperature))
    seen = torch.bincount(rollout.sequences.ids[:, 2], minlength=model.vocab_size) / 20_000
    every = pad_sequences([[4, 5]] * model.vocab_size, [[i] for i in range(model.vocab_size)], model.pad_id)
    expected = response_logprobs(model, every, temperature)[0][:, 0].exp()
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))
    chance = (expected * (1 - expected) / 20_000).sqrt().sum() / 2 * 0.8
    assert (seen - expected).abs().sum() / 2 < 3 * chance
    assert (seen - torch.ones_like(expected) / model.vocab_size).abs().sum() / 2 > 0.1  # the test can tell


def test_padded_vocabulary_is_never_sampled(model):
    module, known = model.module, model.vocab_size
    module.resize_token_embeddings(known + 13)
    with torch.no_grad():
        module.get_output_embeddings().weight[known:] = module.get_output_embeddings().weight[:13] * 50
    rollout = generate(model, prompt_batch(PROMPTS * 10), Sampling(8))
    assert int(rollout.sequences.ids.max()) < known


def test_the_models_own_generation_config_has_no_say(model):
    expected = generate(model, prompt_batch(PROMPTS), Sampling(8), seed=(1, 2)).sequences.ids
    own = model.module.generation_config
    own.top_k, own.temperature, own.repetition_penalty, own.min_new_tokens = 1, 0.01, 5.0, 7
    assert torch.equal(generate(model, prompt_batch(PROMPTS), Sampling(8), seed=(1, 2)).sequences.ids, expected)
    assert model.module.generation_config is own


def test_samples_depend_on_the_seed_alone(model):
    before = torch.get_rng_state()
    first = generate(model, prompt_batch(PROMPTS), Sampling(8), seed=(1, 2)).sequences.ids
    torch.manual_seed(5)
    assert torch.equal(generate(model, prompt_batch(PROMPTS), Sampling(8), seed=(1, 2)).sequences.ids, first)
    assert not torch.equal(generate(model, prompt_batch(PROMPTS), Sampling(8), seed=(1, 3)).sequences.ids, first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_left_padding_changes_nothing(model):
    together = generate(sharpen(model), prompt_batch(PROMPTS), Sampling(6, temperature=0)).sequences
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt_batch([prompt]), Sampling(6, temperature=0)).sequences
        assert together.rows(torch.tensor([row])).ids.tolist() == alone.ids.tolist()


def test_stopping_cuts_responses_short(model):
    model = replace(model, eos_ids=())
    rollout = generate(model, prompt_batch(PROMPTS), Sampling(8), should_stop=lambda: True)
    assert rollout.sequences.response_lengths.tolist() == [1, 1, 1]


def test_logits_that_are_not_finite_are_refused(model):
    """A draw from NaN would be the last id, token after token."""
    broken = replace(model, module=copy.deepcopy(model.module))
    broken.module.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match="logits that are NaN or infinite"):
        generate(broken, PromptBatch([[4, 5]], ["x"], {}), Sampling(3))


def test_logits_of_bfloat16_are_divided_by_the_temperature_in_float32():
    logits = (20 + 6 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))).bfloat16()
    uniform = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1, None]
    tokens, expected = (draw(x.expand(2000, -1), 0.7, 5000, uniform)[0] for x in (logits, logits.float()))
    assert torch.equal(tokens, expected)
