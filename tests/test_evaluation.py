"""Evaluation on held-out prompts: every metric by hand, the reference as opponent, and the best policy that is kept."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_losses import ppo_config
from test_ppo_invariance import models_of
from tiny_models import write_jsonl

from rlhf import evaluation, ppo
from rlhf.config import PPOConfig, UsageError
from rlhf.evaluation import SEED, evaluate, load_prompts
from rlhf.forward import response_logprobs
from rlhf.layout import Models, load_models
from rlhf.rollout import Sampling, generate
from rlhf.types import Rollout

pytestmark = pytest.mark.usefixtures("one_thread")


def config_for(tiny_model, corpus, **changes) -> PPOConfig:
    """Eleven held-out prompts in batches of eight and three."""
    base = {"eval_dataset_name": corpus, "eval_steps": 1, "eval_prompts": 11, "temperature": 0.7, "report_to": "none"}
    base |= {"reward": ["rewards_for_tests:count_good", "rewards_for_tests:lengths"], "reward_weights": [1.0, 0.1]}
    return ppo_config(tiny_model, **base | {"gold_reward": "rewards_for_tests:lengths"} | changes)


def ending(models: Models) -> Models:
    """With more words that end a response, in policy and reference."""
    ends = (2, 5, 9)
    policy, reference = (replace(model, eos_ids=ends) for model in (models.policy, models.reference))
    return replace(models, policy=policy, reference=reference)


def test_a_policy_that_is_the_reference_wins_half(tiny_model, corpus):
    """Same prompts, same random numbers, same responses: every comparison is a tie, and the KL is 0."""
    config = config_for(tiny_model, corpus)
    models = load_models(config)
    found = evaluate(models, config, load_prompts(config, models), {})
    assert found["eval/win_rate"] == 0.5 and found["eval/kl"] == 0.0
    assert len(found) == 8


def scores_of(rollout: Rollout, penalty: float) -> list[float]:
    rows = zip(rollout.completions, rollout.completion_ids)
    counted = [text.split().count("good") + 0.1 * len(ids) for text, ids in rows]
    return [score - penalty * (not ended) for score, ended in zip(counted, rollout.finished.tolist())]


@pytest.mark.parametrize("micro", [8, 3])
def test_every_metric_by_hand(tiny_model, corpus, micro):
    config = config_for(tiny_model, corpus, missing_eos_penalty=0.75, per_device_train_batch_size=8)
    models = ending(models_of(config))
    prompts, state = load_prompts(config, models), {}
    assert [len(batch.token_ids) for batch in prompts] == [8, 3]
    found = evaluate(models, replace(config, per_device_train_batch_size=micro), prompts, state)
    sampling = Sampling(config.response_length, config.temperature)
    scores, against, lengths, ended, kls, words = [], [], [], [], [], []
    for number, batch in enumerate(prompts):
        seed = (config.seed, SEED, number)
        rollout, other = (generate(m, batch, sampling, seed=seed) for m in (models.policy, models.reference))
        scores += scores_of(rollout, 0.75)
        against += scores_of(other, 0.75)
        lengths += map(len, rollout.completion_ids)
        ended += rollout.finished.tolist()
        words += [text.split().count("good") for text in rollout.completions]
        with torch.no_grad():
            ours, theirs = (response_logprobs(m, rollout.sequences, 0.7)[0] for m in (models.policy, models.reference))
        kls += (ours - theirs).sum(1).tolist()
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(scores, against)]
    expected = {
        "eval/score": sum(scores), "eval/kl": sum(kls), "eval/length": sum(lengths), "eval/eos_rate": sum(ended),
        "eval/win_rate": sum(wins), "eval/gold": sum(lengths), "eval/rewards/rewards_for_tests:count_good": sum(words),
        "eval/rewards/rewards_for_tests:lengths": sum(lengths),
    }  # fmt: skip
    assert found == pytest.approx({name: total / 11 for name, total in expected.items()}, rel=1e-5, abs=1e-6)
    assert state["reference_scores"] == pytest.approx(against)
    assert sum(lengths[:8]) / 8 != sum(lengths[8:]) / 3
    assert 0 < found["eval/eos_rate"] < 1 and found["eval/win_rate"] != 0.5 and abs(found["eval/kl"]) > 1e-3


def test_the_reference_is_sampled_once_and_its_scores_are_a_part_of_checkpoints(tiny_model, corpus, monkeypatch):
    config = config_for(tiny_model, corpus)
    models = models_of(config)
    prompts, state, sampled, call = load_prompts(config, models), {}, [], evaluation.generate

    def watched(model, *rest, **options):
        sampled.append(model is models.reference)
        return call(model, *rest, **options)

    monkeypatch.setattr(evaluation, "generate", watched)
    first = evaluate(models, config, prompts, state)
    state = json.loads(json.dumps(state))
    assert evaluate(models, config, prompts, state) == first  # the same random numbers
    assert sampled == [False, False, True, True, False, False]


def run_config(tiny_model, corpus, tmp_path, **changes) -> PPOConfig:
    extra = {"dataset_name": corpus, "output_dir": str(tmp_path / "run"), "learning_rate": 3e-3, "sample_steps": 0}
    return config_for(tiny_model, corpus, **extra | {"metric_for_best_model": "eval/score"} | changes)


def test_the_best_policy_is_kept(tiny_model, corpus, tmp_path, monkeypatch):
    """Of four evaluations at 1, 3, 3, 2 the first with 3, which is neither the first nor the last."""
    from transformers import AutoModelForCausalLM

    scores, weights = iter([1.0, 3.0, 3.0, 2.0]), []
    monkeypatch.setattr(ppo, "evaluate", lambda *_: {"eval/score": next(scores)})

    def keep(step: int, policy, metrics: dict) -> None:
        weights.append(policy.module.lm_head.weight.detach().clone())

    result = ppo.train(run_config(tiny_model, corpus, tmp_path, max_steps=4), on_step=keep)
    kept = AutoModelForCausalLM.from_pretrained(result.output_dir / "best").lm_head.weight
    assert [torch.equal(kept, weight) for weight in weights] == [False, True, False, False]


def test_evaluations_come_every_so_many_steps_and_after_the_last(tiny_model, corpus, tmp_path):
    result = ppo.train(run_config(tiny_model, corpus, tmp_path, max_steps=5, eval_steps=2, eval_prompts=2))
    rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert ["eval/score" in row for row in rows] == [False, True, False, True, True]


def test_a_best_metric_that_no_evaluation_has_is_named(tiny_model, corpus, tmp_path):
    """Before the first step, not after it."""
    config = run_config(tiny_model, corpus, tmp_path, max_steps=1, metric_for_best_model="eval/scores", eval_prompts=2)
    with pytest.raises(
        UsageError, match=r"metric_for_best_model: expected a metric .* eval/score, .* got 'eval/scores'"
    ):
        ppo.train(config)
    assert not (Path(config.output_dir) / "metrics.jsonl").exists()


def test_a_gold_reward_of_tokens_is_summed_in_training_and_evaluation(tiny_model, corpus, tmp_path, monkeypatch):
    """A response's gold reward is the sum of its tokens', here a tenth of their ids; it is no mean over the padding."""
    rollouts, call = [], ppo.generate

    def watched(*arguments, **options):
        rollouts.append(call(*arguments, **options))
        return rollouts[-1]

    monkeypatch.setattr(ppo, "generate", watched)
    config = run_config(tiny_model, corpus, tmp_path, max_steps=1, gold_reward="rewards_for_tests:of_tokens")
    found = ppo.train(config).metrics
    sums = [sum(ids) / 10 for ids in rollouts[0].completion_ids]
    assert found["watch/gold"] == pytest.approx(sum(sums) / 8, rel=1e-6)
    assert found["watch/gold_std"] == pytest.approx(statistics.pstdev(sums), rel=1e-5)
    assert 6 * 17 / 10 > found["eval/gold"] > 1.7  # sums of up to six ids, none above 17


@pytest.mark.parametrize("name", ["eval/win_rate", "eval/gold", "eval/rewards/rewards_for_tests:count_good"])
def test_every_metric_of_an_evaluation_can_be_the_best(tiny_model, corpus, name):
    config = config_for(tiny_model, corpus, metric_for_best_model=name)
    models = load_models(config)
    assert name in evaluate(models, config, load_prompts(config, models), {})


def test_held_out_prompts_that_are_not_there_are_named(tiny_model, corpus, tmp_path):
    config = config_for(tiny_model, corpus, eval_dataset_name=write_jsonl(tmp_path / "none.jsonl", []))
    with pytest.raises(UsageError, match=r"none\.jsonl: no usable row"):
        load_prompts(config, load_models(config))
