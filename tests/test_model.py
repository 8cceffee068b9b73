"""The forward passes that sampling and training share, and real checkpoints' oddities."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.config import InitConfig, RunConfig, UsageError
from rlhf.forward import response_logprobs, response_values, sequence_scores
from rlhf.init import init
from rlhf.model import (
    ModelError,
    check_context,
    choose_device,
    frozen_copy,
    load_language_model,
    load_scorer,
    save,
)
from rlhf.types import pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = RunConfig(output_dir="unused", device="cpu")
PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 5], [4, 4]]
RESPONSES = [[5, 6, 2], [9, 10, 11, 12, 4, 2], [6], [7, 8]]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_language_model(tiny_model, RUN)


@pytest.fixture
def edited(tiny_model, tmp_path):
    """A copy of the model with changes to its JSON files."""

    def edit(**changes: dict) -> str:
        folder = shutil.copytree(tiny_model, tmp_path / "edited")
        for name, change in changes.items():
            path = folder / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        return str(folder)

    return edit


def by_hand(model, prompt: list[int], response: list[int], temperature: float):
    """Log-probabilities and entropies of one unpadded sequence, in plain torch."""
    with torch.no_grad():
        logits = model.module(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, : model.vocab_size]
    logp = torch.log_softmax(logits.double() / temperature, -1)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_logprobs_of_a_padded_batch_are_those_of_each_sequence_alone(corpus, tmp_path, model_type):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = InitConfig(dataset_name=corpus, output_dir=str(tmp_path), tokenizer="word", model_type=model_type, **sizes)
    model = load_language_model(str(init(config)), RUN)
    batch = pad_sequences(PROMPTS, RESPONSES, model.pad_id)
    logprobs, entropy = response_logprobs(model, batch, temperature=0.7)
    assert logprobs.shape == entropy.shape == (4, 6)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        for ours, expected in zip((logprobs, entropy), by_hand(model, prompt, response, 0.7)):
            torch.testing.assert_close(ours[row, : len(response)].double(), expected, rtol=0, atol=2e-6)
            assert not ours[row, len(response) :].any()


def test_padding_is_known_by_length_even_where_pad_is_a_real_token(model):
    """The pad id may equal EOS or a word: the same numbers come out."""
    expected, _ = response_logprobs(model, pad_sequences(PROMPTS, RESPONSES, model.pad_id))
    for pad in (2, 9):
        assert torch.equal(response_logprobs(model, pad_sequences(PROMPTS, RESPONSES, pad))[0], expected)


def test_rows_of_a_batch_are_trimmed_to_their_own_longest(model):
    batch = pad_sequences(PROMPTS, RESPONSES, model.pad_id)
    part = batch.rows(torch.tensor([0, 3]))
    assert part.ids.tolist() == [[4, 5, 6, 5, 6, 2], [4, 4, 7, 8, model.pad_id, model.pad_id]]
    assert part.response_mask.tolist() == [[True, True, True], [True, True, False]]


def test_padded_vocabulary_has_no_probability(tiny_model, model):
    module = load_language_model(tiny_model, RUN).module
    module.resize_token_embeddings(model.vocab_size + 13)
    with torch.no_grad():
        module.get_output_embeddings().weight[model.vocab_size :] = 50.0
    batch = pad_sequences(PROMPTS, RESPONSES, model.pad_id)
    ours, entropy = response_logprobs(replace(model, module=module.eval()), batch)
    expected, expected_entropy = response_logprobs(model, batch)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-6)


def test_every_eos_id_counts_and_a_missing_pad_token_does_no_harm(edited):
    path = edited(generation_config={"eos_token_id": [2, 5]}, config={"eos_token_id": [7, 2, 9999]})
    model = load_language_model(path, RUN)
    assert model.eos_ids == (2, 5, 7)
    path = edited_tokenizer = Path(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (edited_tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_language_model(str(path), RUN).pad_id == 2


def test_a_saved_model_reloads_in_transformers_with_the_same_logits(model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save(model, tmp_path / "final")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.tensor([[4, 5, 6, 7]])
    assert torch.equal(other(ids).logits, model.module(ids).logits)
    assert other.generation_config.eos_token_id == [2] and other.generation_config.bos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "final").get_vocab() == model.tokenizer.get_vocab()


def test_sampling_options_of_the_base_model_do_not_stand_in_the_way_of_saving(edited, tmp_path):
    model = load_language_model(edited(generation_config={"temperature": 0.6, "top_p": 0.9}), RUN)
    save(model, tmp_path / "final")
    saved = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert {"temperature", "top_p"}.isdisjoint(saved) and saved["pad_token_id"] == model.pad_id


def test_a_saved_reward_model_without_pad_token_scores_batches_in_transformers(tiny_reward_model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = shutil.copytree(tiny_reward_model, tmp_path / "unpadded")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    save(load_scorer(str(folder), RUN), tmp_path / "final")
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert other(torch.tensor([[4, 5, 6], [5, 6, 7]])).logits.shape == (2, 1)


def test_scores_are_taken_at_the_last_token_by_length(tiny_reward_model):
    """With pad == eos, transformers' own forward takes the token before the EOS."""
    scorer = load_scorer(tiny_reward_model, RUN)
    eos = scorer.eos_ids[0]
    batch = pad_sequences(PROMPTS, RESPONSES, pad_id=eos)
    config = scorer.module.config
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        raw = scorer.module(torch.tensor([prompt + response])).logits[0, 0]
        expected = (raw - config.reward_mean) / config.reward_std
        torch.testing.assert_close(sequence_scores(scorer, batch)[row], expected, rtol=1e-5, atol=1e-5)


def test_values_stand_before_each_response_token(tiny_reward_model):
    scorer = load_scorer(tiny_reward_model, RUN)
    values = response_values(scorer, pad_sequences(PROMPTS, RESPONSES, scorer.pad_id))
    prefix = pad_sequences([PROMPTS[1]], [RESPONSES[1][:3]], scorer.pad_id)
    torch.testing.assert_close(values[1, 3], sequence_scores(scorer, prefix)[0], rtol=1e-5, atol=1e-5)
    assert not values[0, 3:].any()


def test_new_heads(tiny_model):
    random = load_scorer(tiny_model, RUN, head="random").module.score.weight
    assert 0.7 < float(random.detach().std()) * 33**0.5 < 1.3
    assert torch.equal(random, load_scorer(tiny_model, RUN, head="random").module.score.weight)
    assert not load_scorer(tiny_model, RUN, head="zero").module.score.weight.any()
    with pytest.raises(ModelError, match="has no reward head: train one with `rlhf reward`"):
        load_scorer(tiny_model, RUN)


def test_loading_leaves_the_global_generator_alone(tiny_model):
    before = torch.get_rng_state()
    load_scorer(tiny_model, RUN, head="random")
    load_language_model(tiny_model, RUN)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_reference_does_not_follow_the_policy(model):
    reference = frozen_copy(model)
    assert not any(p.requires_grad for p in reference.module.parameters())
    pointers = {p.data_ptr() for p in model.module.parameters()}
    assert not any(p.data_ptr() in pointers for p in reference.module.parameters())


def test_what_is_no_model_is_refused_in_one_line(tmp_path, edited):
    with pytest.raises(ModelError, match="not a model directory: no such directory"):
        load_language_model(str(tmp_path / "absent"), RUN)
    with pytest.raises(ModelError, match=r"not a model directory: has no config\.json"):
        load_language_model(str(tmp_path), RUN)
    broken = Path(edited())
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_language_model(str(broken), RUN)
    assert "\n" not in str(error.value)
    (broken / "model.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_language_model(str(broken), RUN)


def test_weights_that_are_not_there_are_not_made_up(tiny_reward_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_reward_model, tmp_path / "incomplete")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"has no weights for lm_head\.weight: is it a model of another kind\?"):
        load_language_model(str(folder), RUN)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"has no weights for model\.norm\.weight"):
        load_scorer(str(folder), RUN)


def test_a_classifier_of_several_labels_is_no_reward_model(tiny_reward_model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = shutil.copytree(tiny_reward_model, tmp_path / "three")
    AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True
    ).save_pretrained(folder)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_scorer(str(folder), RUN)


def test_lengths_beyond_the_positions_are_refused(model):
    check_context(model, 64, "max_length")
    with pytest.raises(ModelError, match="max_length: 65 tokens are more than the 64 positions"):
        check_context(model, 65, "max_length")


def test_devices_and_types():
    assert choose_device(RUN) == (torch.device("cpu"), torch.float32)
    assert choose_device(replace(RUN, dtype="bfloat16"))[1] == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="torch finds no GPU"):
            choose_device(replace(RUN, device="cuda"))


def test_bfloat16_computes_over_float32_weights(tiny_model, model):
    half = load_language_model(tiny_model, replace(RUN, dtype="bfloat16"))
    batch = pad_sequences(PROMPTS, RESPONSES, model.pad_id)
    logprobs, _ = response_logprobs(half, batch)
    assert logprobs.dtype == torch.float32 and half.module.lm_head.weight.dtype == torch.float32
    exact = response_logprobs(model, batch)[0]
    assert 0 < float((logprobs - exact).detach().abs().max()) < 0.02
