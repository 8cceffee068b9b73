"""What `rlhf sft` can do beside completions: dialogues, held-out rows, adapters, less memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import write_jsonl
from torch.nn.functional import cross_entropy

from rlhf import generate, ppo, reward_model
from rlhf.config import ConfigError, GenerateConfig, PPOConfig, RewardConfig, SFTConfig, UsageError
from rlhf.data import load, tokenize
from rlhf.forward import token_logprobs
from rlhf.layout import recomputing
from rlhf.model import load_language_model
from rlhf.read import DataError, Source
from rlhf.sft import Fit, collate, evaluate, load_rows, load_trained, measure, train
from rlhf.tokens import Reader
from rlhf.types import SequenceBatch

pytestmark = pytest.mark.usefixtures("one_thread")


def config_for(tiny_model, corpus, folder, **changes) -> SFTConfig:
    base = {"model_name_or_path": tiny_model, "dataset_name": corpus, "output_dir": str(folder), "max_length": 32}
    base |= {"report_to": "none", "device": "cpu", "learning_rate": 3e-3, "max_steps": 1}
    return SFTConfig(**base | changes)


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.module.parameters()]


def trained(config: SFTConfig) -> tuple[dict, list[torch.Tensor]]:
    """(the last metrics, the weights)"""
    last = []
    metrics = train(config, on_step=lambda step, model, _: last.append(weights_of(model))).metrics
    return metrics, last[-1]


# Dialogues


def by_hand(model, examples, kinds: list[list[bool]]) -> tuple[float, int]:
    """The mean of -log p over the chosen tokens of prompt + completion, and their number."""
    total, count = 0.0, 0
    for example, chosen in zip(examples, kinds):
        ids = torch.tensor(example.prompt + example.completions[0])
        labels = torch.where(torch.tensor(chosen), ids, -100)
        with torch.no_grad():
            logits = model.module(ids[None]).logits[0, :-1, : model.vocab_size]
        total += float(cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
        count += sum(chosen)
    return total / count, count


def marks_of(examples) -> list[list[bool]]:
    return [[False] * len(e.prompt) + (e.counted or [True] * len(e.completions[0])) for e in examples]


def test_a_dialogue_is_scored_on_every_turn_of_the_assistant(chat_model, dialogues, tmp_path):
    """The words of the roles and of the user do not count; the four rows are 7 turns, each with its end."""
    changes = {"assistant_only_loss": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    config = config_for(chat_model, dialogues, tmp_path, **changes)
    model = load_language_model(chat_model, config)
    data, _ = load_rows(config, model)
    loss, count = by_hand(model, data.examples, marks_of(data.examples))
    answers = ("was good", "was very dull", "was fine", "was bad", "great", "dull", "was good")
    assert count == sum(len(text.split()) + 1 for text in answers)
    metrics = train(config).metrics
    assert count == metrics["tokens"] and metrics["loss"] == pytest.approx(loss, abs=1e-6)


def test_without_it_the_last_turn_is_the_completion_and_on_request_all_turns_count(chat_model, dialogues, tmp_path):
    rows = [json.loads(line) for line in Path(dialogues).read_text().splitlines()]
    path = write_jsonl(tmp_path / "rows.jsonl", rows[:3])
    model, found = None, {}
    for name, only in (("last", True), ("all", False)):
        changes = {"completion_only_loss": only, "per_device_train_batch_size": 3}
        config = config_for(chat_model, path, tmp_path / name, **changes)
        model = model or load_language_model(chat_model, config)
        data, _ = load_rows(config, model)
        found[name] = train(config).metrics
    texts = [e.prompt + e.completions[0] for e in data.examples]
    last, every = marks_of(data.examples), [[False] + [True] * (len(text) - 1) for text in texts]
    for name, marks in (("last", last), ("all", every)):
        loss, count = by_hand(model, data.examples, marks)
        assert found[name]["tokens"] == count and found[name]["loss"] == pytest.approx(loss, abs=1e-6)
    assert found["last"]["tokens"] == sum(map(len, (["was", "very", "dull", 2], ["was", "fine", 2], ["dull", 2])))


@pytest.mark.parametrize("adds", [False, True], ids=["plain", "tokenizer ends texts"])
@pytest.mark.parametrize("end", ["", "<|eos|>", "<|eos|>\n", "<|eos|><|eos|>"])
@pytest.mark.parametrize("form", ["completion", "dialogue"])
def test_a_text_ends_with_one_eos_token(tiny_model, tmp_path, adds, end, form):
    from tokenizers.processors import TemplateProcessing

    config = config_for(tiny_model, "d", tmp_path)
    tokenizer = load_language_model(tiny_model, config).tokenizer
    if adds:
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <|eos|>", special_tokens=[("<|eos|>", 2)])
    reader = Reader(tokenizer, (2,))
    rows = [{"text": f"the film{end}"}, {"prompt": "the", "completion": f" film{end}"}]
    for row in rows:
        [example] = tokenize([("f:1", row)], reader, form, 32).examples
        assert (example.prompt + example.completions[0])[-2:] == [tokenizer.convert_tokens_to_ids("film"), 2]
    [example] = tokenize([("f:1", {"text": "the <|eos|> film"})], reader, form, 32).examples
    assert tokenizer.convert_ids_to_tokens(example.completions[0]) == ["the", "<|eos|>", "film", "<|eos|>"]


# Held-out rows


def test_held_out_rows_are_measured_and_not_trained_on(tiny_model, corpus, tmp_path):
    changes = {"eval_fraction": 0.25, "eval_steps": 2, "max_steps": 5, "per_device_train_batch_size": 4}
    config = config_for(tiny_model, corpus, tmp_path / "run", **changes)
    found = []
    train(config, on_step=lambda step, model, metrics: found.append((model, metrics)))
    rows = metrics_of(tmp_path / "run")
    assert ["eval/loss" in row for row in rows] == [False, True, False, True, True]
    model, metrics = found[-1]
    rest, held = load(Source((corpus,)), model, "completion", 32).split(0.25, config.seed)
    data, held_out = load_rows(config, model)
    assert (data.examples, held_out.examples) == (rest.examples, held.examples) and len(held) == 10
    assert not [e for e in held.examples if e in data.examples] and rows[0]["epoch"] == 4 / 30
    loss, count = by_hand(model, held.examples, marks_of(held.examples))
    assert metrics["eval/loss"] == pytest.approx(loss, abs=1e-6) and metrics["eval/tokens"] == count
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    right = 0
    for e in held.examples:
        logits = model.module(torch.tensor([e.prompt + e.completions[0]])).logits[0, len(e.prompt) - 1 : -1]
        right += int((logits[:, : model.vocab_size].argmax(-1) == torch.tensor(e.completions[0])).sum())
    assert 0 < right < count and metrics["eval/mean_token_accuracy"] == pytest.approx(right / count)


@pytest.mark.parametrize("changes", [{"micro_batch_tokens": 40}, {"per_device_train_batch_size": 3}])
@pytest.mark.parametrize("packed", [True, False])
def test_an_evaluation_does_not_depend_on_its_batches(tiny_model, corpus, tmp_path, monkeypatch, changes, packed):
    config = config_for(tiny_model, corpus, tmp_path, eval_fraction=0.9)
    model = load_language_model(tiny_model, config)
    _, held = load_rows(config, model)
    expected = evaluate(model, held, config)
    other = config_for(tiny_model, corpus, tmp_path, padding_free=packed, **changes)
    monkeypatch.setattr("rlhf.sft.GROUP", 7)
    found = evaluate(load_language_model(tiny_model, other), held, other)
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_perplexity_that_is_too_large_is_infinite():
    fit = Fit(torch.tensor([4e3]).double(), torch.zeros(1), torch.tensor([2.0]).double())
    assert fit.loss == 2e3 and fit.perplexity == math.inf


# Less memory


@pytest.mark.parametrize("packed", [True, False])
def test_a_budget_of_tokens_gives_the_same_step(tiny_model, corpus, tmp_path, packed):
    common = {"per_device_train_batch_size": 16, "padding_free": packed}
    expected, weights = trained(config_for(tiny_model, corpus, tmp_path / "a", **common))
    found, others = trained(config_for(tiny_model, corpus, tmp_path / "b", **common, micro_batch_tokens=30))
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    for ours, theirs in zip(others, weights):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_budget_of_tokens_bounds_every_pass(tiny_model, corpus, tmp_path, monkeypatch):
    sizes, call = [], SequenceBatch.rows

    def watched(self, index):
        sizes.append(int(self.lengths[index].sum()))
        return call(self, index)

    monkeypatch.setattr(SequenceBatch, "rows", watched)
    changes = {"per_device_train_batch_size": 16, "micro_batch_tokens": 30, "eval_fraction": 0.5}
    train(config_for(tiny_model, corpus, tmp_path, **changes))
    assert len(sizes) > 8 and max(sizes) <= 30 < sum(sizes[:3])


@pytest.mark.parametrize("adapters", [False, True])
def test_computing_activations_again_gives_the_same_weights(tiny_model, corpus, tmp_path, adapters):
    if adapters:
        pytest.importorskip("peft")
    changes = {"use_peft": adapters, "max_steps": 2}
    calls = []
    runs = []
    for name, again in (("kept", False), ("again", True)):
        config = config_for(tiny_model, corpus, tmp_path / name, gradient_checkpointing=again, **changes)
        model = load_trained(config)
        modules, rows = {"model": model.module}, load_rows(config, model)[0].examples[:4]
        module = model.module.model.layers[0].mlp
        module.register_forward_pre_hook(lambda *_, again=again: calls.append(again))
        with recomputing(modules, config):
            batch = collate(rows, model, True)
            token_logprobs(model, batch)[0].sum().backward()
        runs.append(trained(config)[1])
    assert calls == [False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*runs)) and len(runs[0]) > 10


def test_weights_and_moments_in_bfloat16(tiny_model, corpus, tmp_path):
    seen = []
    changes = {"optim": "adamw_bf16", "max_steps": 30, "learning_rate": 1e-2}
    config = config_for(tiny_model, corpus, tmp_path, **changes)
    result = train(config, on_step=lambda step, model, metrics: seen.append((model, metrics["loss"])))
    assert {p.dtype for p in seen[0][0].module.parameters()} == {torch.bfloat16}
    assert seen[-1][1] < seen[0][1] - 0.5
    assert load_language_model(str(result.final_dir), config).module.dtype == torch.float32


# Adapters


@pytest.fixture(scope="module")
def adapted(one_thread, tiny_model, corpus, tmp_path_factory):
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    seen = []
    changes = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "max_steps": 20, "learning_rate": 2e-2}
    config = config_for(tiny_model, corpus, folder, **changes)
    result = train(config, on_step=lambda step, model, metrics: seen.append(model))
    return config, result, seen[-1]


def test_adapters_alone_are_trained_and_written(tiny_model, adapted):
    config, result, model = adapted
    base = load_language_model(tiny_model, config).module.state_dict()
    names = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    for name, tensor in model.module.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")])
    assert not (result.final_dir / "model.safetensors").exists()
    settings = json.loads((result.final_dir / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 8, tiny_model)
    assert settings["target_modules"] == sorted(settings["target_modules"])


def test_transformers_and_peft_load_the_adapters_with_equal_logits(adapted):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    config, result, model = adapted
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        expected = model.module(ids).logits
        before = load_language_model(config.model_name_or_path, config).module(ids).logits
        assert (expected - before).abs().max() > 1e-2
        for loader in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
            torch.testing.assert_close(loader.from_pretrained(result.final_dir)(ids).logits, expected)
        merged = load_language_model(str(result.final_dir), config).module(ids).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_every_command_starts_from_the_adapters(adapted, tiny_model, corpus, pairs, tmp_path):
    config, result, model = adapted
    common = {"model_name_or_path": str(result.final_dir), "device": "cpu"}
    once = common | {"max_steps": 1, "report_to": "none"}
    again = train(
        SFTConfig(**once, dataset_name=corpus, output_dir=str(tmp_path / "sft"), max_length=32, use_peft=True)
    )
    rows = load(Source((corpus,)), model, "completion", 32).window(0, 8, config.seed)
    assert again.metrics["loss"] == pytest.approx(by_hand(model, rows, marks_of(rows))[0], abs=1e-5)
    from transformers import AutoModelForCausalLM

    settings = json.loads((again.final_dir / "adapter_config.json").read_text())
    (base,) = (tmp_path / "sft").glob("merged_base_*")
    assert settings["base_model_name_or_path"] == str(base)
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():  # not the first adapters in place of the second, or twice
        ours = load_language_model(str(again.final_dir), config).module(ids).logits
        other = SFTConfig(**once | {"model_name_or_path": str(again.final_dir)}, dataset_name=corpus,
                          output_dir=str(tmp_path / "sft"), max_length=32, use_peft=True)  # fmt: skip
        with pytest.raises(UsageError, match="holds an earlier run"):
            train(other)
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(again.final_dir)(ids).logits, ours)
    rm = reward_model.train(RewardConfig(**once, dataset_name=pairs, output_dir=str(tmp_path / "rm"), max_length=32))
    rollouts = {"response_length": 4, "max_prompt_length": 8, "reward_model_path": str(rm.final_dir)}
    ppo.train(PPOConfig(**once, **rollouts, dataset_name=corpus, output_dir=str(tmp_path / "ppo")))
    sampling = {"prompt": ["the film"], "max_new_tokens": 8, "output_dir": str(tmp_path / "samples")}
    assert generate.main(GenerateConfig(**common, **sampling))[0]["completion"]


# Errors


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"eval_steps": 2}, "eval_steps: expected eval_fraction > 0 beside it"),
        ({"eval_fraction": 1.0}, r"eval_fraction: expected a number in \[0, 1\), got 1.0"),
        ({"use_peft": True, "optim": "adamw_bf16"}, "optim: expected adamw with use_peft"),
        ({"lora_r": 0}, "lora_r: expected a number >= 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny_model, corpus, tmp_path, changes, line):
    with pytest.raises(ConfigError, match=line):
        config_for(tiny_model, corpus, tmp_path, **changes)


def test_a_fraction_of_no_row_and_rows_that_are_no_dialogues_are_named(tiny_model, corpus, dialogues, tmp_path):
    config = config_for(tiny_model, corpus, tmp_path, eval_fraction=0.01)
    with pytest.raises(ConfigError, match=r"eval_fraction: 0.01 of 40 rows is none"):
        train(config)
    config = config_for(tiny_model, dialogues, tmp_path, assistant_only_loss=True)
    with pytest.raises(DataError, match=r"dialogues.jsonl:1: messages need a chat template and the tokenizer has none"):
        train(config)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_nobody_asked_for_is_nan(tiny_model, corpus, tmp_path):
    """Not 0: that would read as an accuracy."""
    config = config_for(tiny_model, corpus, tmp_path)
    model = load_language_model(tiny_model, config)
    data, _ = load_rows(config, model)
    assert math.isnan(measure(model, data.examples, (8, None), True, hits=False).accuracy)
