"""Memory layouts: which weights are one, which of them move, what is on the device when, what a run leaves behind."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_losses import ppo_config
from test_ppo_invariance import KeepGradients, models_of, sampled
from torch import nn

from rlhf import layout, ppo
from rlhf.advantages import score, with_advantages
from rlhf.config import InitConfig, PPOConfig, UsageError
from rlhf.forward import response_logprobs, sequence_scores, token_scores, token_values
from rlhf.init import init
from rlhf.layout import Models, load_models, offload, recomputing
from rlhf.ppo import update
from rlhf.types import pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = pad_sequences([[4, 5, 6], [7], [4, 4]], [[5, 6, 2], [9, 10, 11, 4, 2], [7]], 0)


def run_config(tiny_model: str, corpus: str, folder: Path, **changes) -> PPOConfig:
    base = {
        "dataset_name": corpus,
        "output_dir": str(folder),
        "learning_rate": 3e-3,
        "max_steps": 2,
        "report_to": "none",
    }
    return ppo_config(tiny_model, **base | {"sample_steps": 0, "num_ppo_epochs": 2, "weight_decay": 0.01} | changes)


def pointers(module: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in module.parameters()}


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def kept_models(monkeypatch) -> list[tuple[Models, dict]]:
    """Fills with the models of a run, and the weights of what it trains as they were loaded."""
    kept, load = [], ppo.load_models

    def watched(config):
        models = load(config)
        kept.append((models, {name: weights(module) for name, module in models.modules.items()}))
        return models

    monkeypatch.setattr(ppo, "load_models", watched)
    return kept


def nudge(module: nn.Module, by: float = 0.1) -> None:
    """Moves what is trained, so that adapters are not at their start, where they add nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))


# Which weights are one


def test_models_of_separate_share_nothing(tiny_model, tiny_reward_model):
    models = load_models(ppo_config(tiny_model, reward_model_path=tiny_reward_model))
    modules = [models.policy.module, models.value.module, models.reference.module, models.rewards[-1].scorer.module]
    sets = [pointers(module) for module in modules]
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert [bool(trained(module)) for module in modules] == [True, True, False, False]
    with torch.no_grad():
        starts = [token_scores(scorer, BATCH) for scorer in (models.value, models.rewards[-1].scorer)]
    assert torch.equal(*starts)


def test_a_shared_value_is_a_head_on_the_policys_trunk(tiny_model):
    models = load_models(ppo_config(tiny_model, memory_layout=["shared_value"]))
    assert models.value.policy is models.policy and not models.value.module.weight.any()
    nudge(models.value.module)
    with torch.no_grad():
        found = token_values(models.value, BATCH)
        for row, (prompt, length) in enumerate(zip([3, 1, 2], [3, 5, 1])):
            hidden = models.policy.module.base_model(BATCH.ids[row : row + 1, : prompt + length]).last_hidden_state
            expected = hidden[0, prompt - 1 : -1] @ models.value.module.weight[0]
            torch.testing.assert_close(BATCH.unpack(found)[row, :length], expected, rtol=1e-5, atol=1e-6)


def test_lora_keeps_each_weight_once(tiny_model, tiny_reward_model):
    """TRL#6053, #885: a reference doubles the memory. Policy and reference are one, so are value and reward model."""
    pytest.importorskip("peft")
    models = load_models(ppo_config(tiny_model, memory_layout=["lora"], reward_model_path=tiny_reward_model))
    reward = models.rewards[-1].scorer.module
    for own, base in ((models.policy.module, models.reference.module), (models.value.module, reward)):
        extra = {name for name, p in own.named_parameters() if p.data_ptr() not in pointers(base)}
        assert extra == trained(own) and all("lora_" in name or name == "score.weight" for name in extra)
        shared = pointers(base) & pointers(own)
        assert len(shared) == len(pointers(base)) - (base is reward)  # the value's head is its own
        assert not trained(base)
    size = sum(p.numel() for p in models.reference.module.parameters())
    assert sum(p.numel() for p in models.policy.module.parameters() if p.requires_grad) < size


def test_a_lora_value_without_a_reward_model_is_on_the_references_trunk(tiny_model):
    pytest.importorskip("peft")
    models = load_models(ppo_config(tiny_model, memory_layout=["lora"]))
    assert pointers(models.reference.module.base_model) <= pointers(models.value.module)
    assert not models.value.module.score.weight.any() and "score.weight" in trained(models.value.module)


def test_a_lora_policy_with_its_adapters_off_is_the_reference(tiny_model):
    """At any time of training: what stands below the adapters never moves."""
    pytest.importorskip("peft")
    config = ppo_config(tiny_model, memory_layout=["lora"])
    models, separate = load_models(config), load_models(ppo_config(tiny_model)).reference
    nudge(models.policy.module)
    with torch.no_grad():
        expected, _ = response_logprobs(separate, BATCH)
        torch.testing.assert_close(response_logprobs(models.reference, BATCH)[0], expected, rtol=0, atol=1e-6)
        assert float((response_logprobs(models.policy, BATCH)[0] - expected).abs().max()) > 1e-2
        models.policy.module.disable_adapters()
        torch.testing.assert_close(response_logprobs(models.policy, BATCH)[0], expected, rtol=0, atol=1e-6)


def test_a_lora_value_starts_as_the_reward_model(tiny_model, tiny_reward_model):
    pytest.importorskip("peft")
    models = load_models(ppo_config(tiny_model, memory_layout=["lora"], reward_model_path=tiny_reward_model))
    scorer = models.rewards[-1].scorer
    with torch.no_grad():
        before = sequence_scores(scorer, BATCH)
        torch.testing.assert_close(sequence_scores(models.value, BATCH), before, rtol=0, atol=1e-6)
        nudge(models.value.module)
        assert torch.equal(sequence_scores(scorer, BATCH), before)
        assert float((sequence_scores(models.value, BATCH) - before).abs().max()) > 1e-2


def test_frozen_models_are_bfloat16_and_trained_ones_are_not(tiny_model, tiny_reward_model, corpus, tmp_path):
    changes = {"memory_layout": ["separate", "frozen_bf16"], "reward_model_path": tiny_reward_model}
    models = load_models(ppo_config(tiny_model, **changes))

    def types(module: nn.Module) -> set[torch.dtype]:
        return {parameter.dtype for parameter in module.parameters()}

    assert types(models.reference.module) == types(models.rewards[-1].scorer.module) == {torch.bfloat16}
    assert types(models.policy.module) == types(models.value.module) == {torch.float32}
    result = ppo.train(run_config(tiny_model, corpus, tmp_path / "run", **changes, max_steps=1))
    assert result.metrics["val/ratio_first"] == 1.0 and 0 < abs(result.metrics["objective/kl"]) < 0.1


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_no_value_model_is_loaded_where_none_is_used(tiny_model, kind, monkeypatch):
    monkeypatch.setattr(layout, "load_scorer", None)
    models = load_models(ppo_config(tiny_model, advantage=kind, num_generations=2))
    assert models.value is None and models.modules.keys() == {"policy"}
    with pytest.raises(TypeError):
        load_models(ppo_config(tiny_model))


# Which of them move


@pytest.mark.parametrize("kind", ["separate", "shared_value", "lora"])
def test_a_warm_up_moves_the_value_alone(tiny_model, corpus, tmp_path, monkeypatch, kind):
    """Not a bit of the policy, weight decay included; of a shared value the head alone."""
    if kind == "lora":
        pytest.importorskip("peft")
    kept = kept_models(monkeypatch)
    config = run_config(tiny_model, corpus, tmp_path / "run", memory_layout=[kind], value_warmup_steps=2)
    seen, entropies = [], []

    def at_step(step: int, policy, metrics: dict) -> None:
        models, start = kept[0]
        seen.append((moved(models.policy.module, start["policy"]), moved(models.value.module, start["value"])))
        entropies.append(metrics["watch/entropy"])

    ppo.train(replace(config, max_steps=3), on_step=at_step)
    models, _ = kept[0]
    assert [bool(policy) for policy, _ in seen] == [False, False, True]
    assert all(value for _, value in seen) and seen[-1][1] == trained(models.value.module)
    assert [entropy > 0 for entropy in entropies] == [False, False, True]
    assert all(math.isnan(entropy) for entropy in entropies[:2])  # not 0, below which nothing would warn


# What is on the device when


@pytest.mark.parametrize("kind", ["separate", "lora"])
def test_offloaded_models_are_on_the_device_for_the_block_alone(tiny_model, tiny_reward_model, kind, monkeypatch):
    """Copies stand for what is sent to a GPU. What shares weights with a trained model stays where it is."""
    if kind == "lora":
        pytest.importorskip("peft")
    paths = [tiny_reward_model, tiny_reward_model]
    models = load_models(ppo_config(tiny_model, memory_layout=[kind, "offload"], reward_model_path=paths))
    rewards = [reward.scorer.module for reward in models.rewards if reward.scorer]
    everything = [models.reference.module, *rewards]
    expected = everything if kind == "separate" else [rewards[1]]  # the first is the value's base
    assert [id(m) for m in models.offloaded] == [id(m) for m in expected]

    def places() -> list[set[int]]:
        return [{t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (models.policy.module, *everything)]

    host, values = places(), [tensor.clone() for m in everything for tensor in m.state_dict().values()]
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **_: tensor.clone())
    with pytest.raises(KeyError, match="in the block"), models.on_device():
        gone = [here.isdisjoint(there) for here, there in zip(places(), host)]
        assert gone == [False, *(module in expected for module in everything)]
        raise KeyError("in the block")
    assert places() == host
    now = [tensor for m in everything for tensor in m.state_dict().values()]
    assert all(torch.equal(tensor, value) for tensor, value in zip(now, values))


def test_models_wait_on_the_host_while_others_sample_and_learn(tiny_model, corpus, tmp_path, monkeypatch):
    events, on_device = [], Models.on_device

    def entered(self):
        events.append("in")
        return on_device(self)

    def recorded(name):
        call = getattr(ppo, name)
        monkeypatch.setattr(ppo, name, lambda *a, **k: (events.append(name), call(*a, **k))[1])

    monkeypatch.setattr(Models, "on_device", entered)
    for name in ("generate", "score", "with_advantages", "update"):
        recorded(name)
    ppo.train(run_config(tiny_model, corpus, tmp_path / "run", max_steps=1, memory_layout=["separate", "offload"]))
    assert events == ["generate", "in", "score", "with_advantages", "update", "update"]


def test_nothing_that_is_trained_is_offloaded(tiny_model):
    models = load_models(ppo_config(tiny_model))
    assert offload(replace(models, reference=models.policy)) == ()


def attentions(models: Models, calls: list) -> None:
    layer = models.policy.module.base_model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(layer.self_attn.training))


def test_layers_are_computed_twice_in_updates_and_nowhere_else(tiny_model):
    """And never in train mode, where dropout would act."""
    counts = {}
    for name, asked in (("kept", False), ("again", True)):
        config = ppo_config(tiny_model, gradient_checkpointing=asked, per_device_train_batch_size=4)
        config = replace(config, gradient_accumulation_steps=2)
        models, calls, per_phase = models_of(config), [], []
        attentions(models, calls)

        def phase(calls=calls, per_phase=per_phase) -> None:
            per_phase.append(len(calls))
            assert not any(calls)
            calls.clear()

        rollout = sampled(models, config)
        phase()
        experience = with_advantages(score(rollout, models, config)[0], config, config.kl_coef)
        phase()
        with recomputing(models.modules, config):
            update(models, experience, torch.arange(8), KeepGradients(models), config, config.kl_coef)
            phase()
            update(models, experience, torch.arange(8), KeepGradients(models), config, config.kl_coef)
            phase()
        sampled(models, config)
        phase()
        counts[name] = per_phase
        assert not any(module.training for m in models.modules.values() for module in m.modules())
    assert counts["kept"][1:4] == [2, 2, 2] and counts["again"][1:4] == [2, 4, 4]
    assert counts["kept"][0] == counts["again"][0] == counts["again"][4] > 2


@pytest.mark.parametrize("kind", ["separate", "shared_value", "lora"])
def test_computing_again_gives_the_same_gradients(tiny_model, kind):
    if kind == "lora":
        pytest.importorskip("peft")
    found = []
    for asked in (False, True):
        config = ppo_config(tiny_model, gradient_checkpointing=asked, memory_layout=[kind])
        models = models_of(config)
        experience = with_advantages(score(sampled(models, config), models, config)[0], config, config.kl_coef)
        with recomputing(models.modules, config):
            update(models, experience, torch.arange(8), KeepGradients(models), config, config.kl_coef)
        found.append([p.grad for m in models.modules.values() for p in m.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20 and all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("asked", [False, True])
def test_dropout_never_acts(corpus, tmp_path, asked):
    """Detail 3, verl#4708: OPT comes with dropout of 0.1, applied by its layers themselves, and with layer drop."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = InitConfig(
        dataset_name=corpus, output_dir=str(tmp_path / "opt"), tokenizer="word", model_type="opt", **sizes
    )
    path = init(config)
    settings = json.loads((path / "config.json").read_text())
    assert settings["dropout"] == 0.1
    (path / "config.json").write_text(json.dumps(settings | {"layerdrop": 0.5, "attention_dropout": 0.1}))
    run = run_config(str(path), corpus, tmp_path / "run", gradient_checkpointing=asked, value_warmup_steps=0)
    rows = []
    ppo.train(run, on_step=lambda step, policy, metrics: rows.append(metrics["val/ratio_first"]))
    assert rows == [1.0, 1.0]


# What a run leaves behind


def test_adapters_of_a_run_load_in_transformers_and_peft(tiny_model, corpus, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    kept = {}

    def keep(step: int, policy, metrics: dict) -> None:
        kept["policy"] = copy.deepcopy(policy.module)

    config = run_config(tiny_model, corpus, tmp_path / "run", memory_layout=["lora"], learning_rate=0.1)
    result = ppo.train(config, on_step=keep)
    assert not (result.final_dir / "model.safetensors").exists()
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        expected, start = kept["policy"](ids).logits, base(ids).logits
        assert float((expected - start).abs().max()) > 1e-3
        ours = AutoModelForCausalLM.from_pretrained(result.final_dir)(ids).logits
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
        wrapped = peft.PeftModel.from_pretrained(base, result.final_dir)
        torch.testing.assert_close(wrapped(ids).logits, expected, rtol=0, atol=1e-6)
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(ids).logits, start, rtol=0, atol=1e-6)


# What bfloat16 and adapters must not touch


@pytest.mark.parametrize("changes", [{"memory_layout": ["separate", "frozen_bf16"]}, {"optim": "adamw_bf16"}])
def test_the_frequencies_of_rotary_embeddings_stay_float32(tiny_model, tiny_reward_model, changes):
    models = load_models(ppo_config(tiny_model, reward_model_path=tiny_reward_model, **changes))
    half = [models.reference.module, models.value.module if "optim" in changes else models.rewards[-1].scorer.module]
    for module in half:
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in module.buffers() if b.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("start", ["reward_model_path", "value_model_path"])
def test_adapters_are_float32_over_what_is_frozen_in_bfloat16(tiny_model, tiny_reward_model, start):
    config = ppo_config(tiny_model, **{start: tiny_reward_model}, memory_layout=["lora", "frozen_bf16"])
    for module in load_models(config).modules.values():
        assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("names", [["q_proj", "lm_head"], ["embed_tokens"]])
def test_adapters_of_a_matrix_that_is_head_and_embedding_are_refused(tiny_model, names):
    config = ppo_config(tiny_model, memory_layout=["lora"], lora_target_modules=names)
    with pytest.raises(UsageError, match=r"lora_target_modules: .* are one matrix"):
        load_models(config)


def test_adapted_modules_that_are_not_there_are_named(tiny_model):
    config = ppo_config(tiny_model, memory_layout=["lora"], lora_target_modules=["absent"])
    with pytest.raises(UsageError, match=r"lora_target_modules: .*absent"):
        load_models(config)


def test_an_exact_kl_needs_a_head_to_fuse(corpus, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": False}
    path = str(init(InitConfig(dataset_name=corpus, output_dir=str(tmp_path), tokenizer="word", **sizes)))
    adapted = {"memory_layout": ["lora"], "lora_target_modules": ["q_proj", "lm_head"]}
    load_models(ppo_config(path, **adapted))
    with pytest.raises(UsageError, match="kl_estimator: full needs hidden states"):
        load_models(ppo_config(path, **adapted, kl_estimator="full"))


def test_adapters_of_a_policy_begin_a_value_and_a_reward_model(tiny_model, corpus, tmp_path):
    result = ppo.train(run_config(tiny_model, corpus, tmp_path, memory_layout=["lora"]))
    models = load_models(ppo_config(str(result.final_dir)))
    ours, theirs = (weights(model.module.base_model) for model in (models.policy, models.value))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert trained(models.policy.module) == {name for name, _ in models.policy.module.named_parameters()}


def test_the_entropy_of_a_warm_up_is_not_known(tiny_model, corpus, tmp_path):
    """0 would be a first value, below a part of which no warning comes."""
    result = ppo.train(run_config(tiny_model, corpus, tmp_path, value_warmup_steps=1))
    rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy/entropy_avg"] is None for row in rows] == [True, False]
    assert [row["watch/entropy"] is None for row in rows] == [True, False]
