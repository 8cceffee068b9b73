"""Reward models: they learn the order of pairs, rankings, objectives and steps; what they score is what transformers,
peft and `rlhf ppo` read."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import sentence, write_jsonl

from rlhf import ppo
from rlhf.comparisons import collate, load_judged, score_rows
from rlhf.config import PPOConfig, RewardConfig, RunConfig, UsageError
from rlhf.forward import objective_scores, sequence_scores
from rlhf.model import ModelError, load_language_model, load_scorer
from rlhf.reward import process_reward
from rlhf.reward_model import train
from rlhf.types import PromptBatch, Rollout, pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = RunConfig(output_dir="o", device="cpu")


def config_for(tiny_model, rows, folder, **changes) -> RewardConfig:
    base = {"model_name_or_path": tiny_model, "dataset_name": rows, "output_dir": str(folder), "max_length": 32}
    return RewardConfig(**base | {"device": "cpu", "learning_rate": 3e-3, "eval_fraction": 0.25} | changes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, str]:
    """32 rows of each kind; `great` is better than `fine`, and both than `bad` and `dull`."""
    folder = tmp_path_factory.mktemp("rows")

    def written(name: str, row) -> str:
        return write_jsonl(folder / f"{name}.jsonl", [{"prompt": sentence(i), **row(i)} for i in range(32)])

    ranked = [" was great", " was very fine", " was dull", " bad"]
    steps = [" was great", " was dull", " film was fine"]
    return {
        "ranking": written("ranking", lambda i: {"ranking": ranked[: 2 + i % 3]}),
        "objectives": written(
            "objectives",
            lambda i: (
                {"chosen": " was great", "rejected": " was very very dull"}
                | {"objective": "kind" if i % 3 == 0 else {"kind": 1, "long": -2}}
            ),
        ),
        "steps": written(
            "steps", lambda i: {"completions": steps[: 1 + i % 3], "labels": [True, False, True][: 1 + i % 3]}
        ),
    }


@pytest.fixture(scope="module")
def trained(one_thread, tiny_model, pairs, tmp_path_factory):
    config = config_for(tiny_model, pairs, tmp_path_factory.mktemp("reward"), num_train_epochs=6.0)
    return config, train(config)


def test_it_orders_held_out_pairs(trained):
    _config, result = trained
    assert result.metrics["eval/accuracy"] == 1.0 and result.metrics["eval/pairs"] == 8
    first = json.loads((result.output_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"] - 0.693) < 0.3 and result.metrics["loss"] < 0.1
    assert result.metrics["rewards/margins"] == pytest.approx(
        result.metrics["rewards/chosen"] - result.metrics["rewards/rejected"], abs=1e-4
    )


def test_scores_of_the_training_data_have_mean_0_and_deviation_1(trained):
    config, result = trained
    scorer = load_scorer(str(result.final_dir), config)
    assert scorer.module.config.reward_mean == pytest.approx(result.metrics["reward_mean"])
    training, _ = load_judged(config, scorer).split(0.25, config.seed)
    scores = torch.cat(score_rows(scorer, training.examples, config))
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5) and float(scores.std()) == pytest.approx(1.0, abs=1e-5)


def test_transformers_loads_it_with_the_same_score(trained):
    from transformers import AutoModelForSequenceClassification

    config, result = trained
    other = AutoModelForSequenceClassification.from_pretrained(result.final_dir)
    scorer = load_scorer(str(result.final_dir), config)
    assert other.config.num_labels == 1
    batch = collate(load_judged(config, scorer).examples[:1], scorer).sequences
    with torch.no_grad():
        raw = other(batch.ids[:1, : int(batch.lengths[0])]).logits[0, 0]
        ours = sequence_scores(scorer, batch)[0]
    expected = (raw - other.config.reward_mean) / other.config.reward_std
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_training_goes_on_from_a_reward_model(trained, tmp_path):
    config, result = trained
    again = train(config_for(str(result.final_dir), config.dataset_name, tmp_path, max_steps=1, learning_rate=1e-9))
    assert again.metrics["loss"] < 0.1


def test_centering_keeps_rewards_near_zero(tiny_model, pairs, tmp_path):
    changes = {"num_train_epochs": 6.0, "normalize_rewards": False}
    centered = train(config_for(tiny_model, pairs, tmp_path / "a", center_rewards_coefficient=1.0, **changes)).metrics
    free = train(config_for(tiny_model, pairs, tmp_path / "b", **changes)).metrics
    sums = [abs(m["rewards/chosen"] + m["rewards/rejected"]) for m in (centered, free)]
    assert sums[0] < 0.1 < sums[1] and "reward_mean" not in free


def test_smoothed_labels_bound_the_margin(tiny_model, pairs, tmp_path):
    """The optimum is where sigmoid(margin) is 1 - e: at log 4 for e = 0.2."""
    found = train(config_for(tiny_model, pairs, tmp_path, num_train_epochs=10.0, label_smoothing=0.2)).metrics
    assert found["rewards/margins"] == pytest.approx(1.386, abs=0.15)


def test_rankings_are_learnt(tiny_model, rows, tmp_path):
    config = config_for(tiny_model, rows["ranking"], tmp_path, num_train_epochs=6.0, micro_batch_tokens=64)
    result = train(config)
    assert result.metrics["eval/accuracy"] == 1.0 and result.metrics["eval/pairs"] > 8
    scorer = load_scorer(str(result.final_dir), RUN)
    batch = collate(load_judged(config, scorer).examples[2:3], scorer).sequences  # a row of four
    scores = sequence_scores(scorer, batch).tolist()
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)


# Several objectives


@pytest.fixture(scope="module")
def two_heads(one_thread, tiny_model, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    objectives = {"objectives": ["kind", "long"], "objective_weights": [1.0, 0.5]}
    config = config_for(tiny_model, rows["objectives"], folder, num_train_epochs=6.0, **objectives)
    return config, train(config)


def test_each_objective_has_a_head_and_an_accuracy(two_heads):
    config, result = two_heads
    assert result.metrics["eval/accuracy/kind"] == result.metrics["eval/accuracy/long"] == 1.0
    scorer = load_scorer(str(result.final_dir), RUN)
    assert scorer.objectives == ["kind", "long"] and scorer.module.config.num_labels == 2
    judged = load_judged(config, scorer)
    batch = collate(judged.examples[1:2], scorer).sequences
    heads = objective_scores(scorer, batch)[batch.last_tokens]
    assert heads[0, 0] > heads[1, 0] and heads[0, 1] < heads[1, 1]  # kinder, and shorter
    torch.testing.assert_close(sequence_scores(scorer, batch), heads[:, 0] + 0.5 * heads[:, 1])
    training, _ = judged.split(0.25, config.seed)
    scores = torch.cat(score_rows(scorer, training.examples, config))
    torch.testing.assert_close(scores.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.std(0), torch.ones(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["separate", "lora"])
def test_ppo_learns_from_several_objectives_as_from_one_reward(two_heads, tiny_model, corpus, tmp_path, layout):
    """The value model starts from them, too."""
    kept = {}
    config = PPOConfig(
        model_name_or_path=tiny_model, dataset_name=corpus, output_dir=str(tmp_path), device="cpu",
        reward_model_path=str(two_heads[1].final_dir), memory_layout=[layout], response_length=6, max_prompt_length=8,
        max_steps=1, sample_steps=0, missing_eos_penalty=None,
    )  # fmt: skip
    result = ppo.train(config, on_step=lambda step, policy, metrics: kept.update(metrics))
    assert kept["objective/scores"] == kept["rewards/model"] != 0.0 and result.steps == 1


def test_training_goes_on_with_the_same_objectives_only(two_heads, tmp_path):
    config, result = two_heads
    changes = {"max_steps": 1, "learning_rate": 1e-9, "objectives": ["kind", "long"]}
    assert (
        train(config_for(str(result.final_dir), config.dataset_name, tmp_path / "a", **changes)).metrics["loss"] < 0.1
    )
    with pytest.raises(ModelError, match=r"objectives: expected those of .*, \['kind', 'long'\], got \['kind'\]"):
        train(config_for(str(result.final_dir), config.dataset_name, tmp_path / "b", objectives=["kind"]))


# Steps


@pytest.fixture(scope="module")
def process_model(one_thread, tiny_model, rows, tmp_path_factory):
    settings = {"reward_type": "process", "step_separator": "and", "num_train_epochs": 6.0}
    config = config_for(tiny_model, rows["steps"], tmp_path_factory.mktemp("process"), **settings)
    return config, train(config)


def test_steps_are_judged(process_model):
    _config, result = process_model
    found = result.metrics
    assert found["eval/accuracy"] == found["eval/balanced_accuracy"] == found["eval/auroc"] == 1.0
    assert found["eval/steps"] > 8 and 0.5 < found["eval/right_share"] < 1 and "rewards/chosen" not in found


def test_ppo_reads_a_process_model_where_it_was_trained(process_model, tiny_model):
    """Of the responses that it was trained on as `rlhf ppo` would sample them: the same tokens, the same scores."""
    config, result = process_model
    scorer, policy = load_scorer(str(result.final_dir), RUN), load_language_model(tiny_model, RUN)
    judged = load_judged(config, scorer).examples
    assert {len(row.places) for row in judged} == {1, 2, 3}
    prompts, responses = [row.prompt for row in judged], [row.completions[0] for row in judged]
    batch = PromptBatch(prompts, ["p"] * len(judged), {})
    sequences = pad_sequences(prompts, responses, 0)
    rollout = Rollout(sequences, torch.ones(len(judged)).bool(), batch, ["c"] * len(judged), responses)
    read = process_reward(scorer, policy, 4, None, config.step_separator).score(rollout)
    expected = torch.zeros(read.shape)
    for number, (row, scores) in enumerate(zip(judged, score_rows(scorer, judged, config))):
        for (_, token), score in zip(row.places, scores[:, 0].tolist()):
            expected[number, token] = score
    torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(read != 0, expected != 0)


# Adapters


def test_adapters_score_alike_in_peft_and_here(tiny_model, pairs, tmp_path):
    from peft import AutoPeftModelForSequenceClassification, PeftModel
    from transformers import AutoModelForSequenceClassification

    config = config_for(tiny_model, pairs, tmp_path, num_train_epochs=6.0, use_peft=True, lora_r=4)
    kept = {}
    result = train(config, on_step=lambda step, model, metrics: kept.update(model=model))
    final = str(result.final_dir)
    assert result.metrics["eval/accuracy"] == 1.0 and not (result.final_dir / "model.safetensors").exists()
    scorer = load_scorer(final, RUN)
    batch = collate(load_judged(config, scorer).examples[:3], scorer).sequences
    with torch.no_grad():
        expected = sequence_scores(kept["model"], batch)
        torch.testing.assert_close(sequence_scores(scorer, batch), expected, rtol=1e-5, atol=1e-5)
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
        others = AutoPeftModelForSequenceClassification.from_pretrained(final, num_labels=1)
        for other in (others.eval(), PeftModel.from_pretrained(base, final).eval()):
            raw = [other(ids[None, :n]).logits[0, 0] for ids, n in zip(batch.ids, batch.lengths.tolist())]
            mean, deviation = scorer.module.config.reward_mean, scorer.module.config.reward_std
            torch.testing.assert_close((torch.stack(raw) - mean) / deviation, expected, rtol=1e-4, atol=1e-5)
    frozen = {n for n, p in kept["model"].module.named_parameters() if not p.requires_grad}
    assert any("embed_tokens" in name for name in frozen) and any("base_layer" in name for name in frozen)
    again = config_for(final, pairs, tmp_path / "again", max_steps=1, learning_rate=1e-9, use_peft=True)
    assert train(again).metrics["loss"] < 0.1


def test_a_directory_without_a_head_is_no_reward_model(tiny_model):
    with pytest.raises(UsageError, match="has no reward head"):
        load_scorer(tiny_model, RUN)
