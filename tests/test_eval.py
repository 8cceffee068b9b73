"""`rlhf eval`: every figure by hand, what is measured by default, errors in one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from rewards_for_tests import count_good
from tiny_models import sentence, write_jsonl

import rlhf_kernels
from rlhf import eval as evaluation_command
from rlhf import sft
from rlhf.cli import main
from rlhf.config import EvalConfig, InitConfig, SFTConfig, UsageError
from rlhf.data import load
from rlhf.eval import Subject, chosen_metrics, of_ratio
from rlhf.evaluation import SEED, in_batches, read_prompts
from rlhf.forward import response_logprobs, sequence_scores
from rlhf.init import init
from rlhf.model import load_language_model, load_scorer
from rlhf.read import DataError, Source
from rlhf.rollout import Sampling, generate
from rlhf.types import pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")


def config_for(dataset, folder="o", **changes) -> EvalConfig:
    base = {"dataset_name": dataset, "output_dir": str(folder), "device": "cpu", "max_length": 32, "max_new_tokens": 6}
    return EvalConfig(**base | changes)


@pytest.fixture(scope="module")
def tuned(one_thread, tiny_model, corpus, tmp_path_factory) -> str:
    """A policy that differs from its reference, tiny_model."""
    folder = tmp_path_factory.mktemp("tuned")
    common = {"model_name_or_path": tiny_model, "dataset_name": corpus, "output_dir": str(folder), "device": "cpu"}
    return str(sft.train(SFTConfig(**common, max_length=32, max_steps=20, learning_rate=1e-2)).final_dir)


def logps(model, examples, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums of log p, lengths) of completions, a sequence at a time."""
    sums = []
    for e in examples:
        batch = pad_sequences([e.prompt], [e.completions[side]], 0)
        with torch.no_grad():
            sums.append(response_logprobs(model, batch)[0].double().sum())
    return torch.stack(sums), torch.tensor([len(e.completions[side]) for e in examples])


def error_of(values: torch.Tensor) -> float:
    return float(values.double().std()) / math.sqrt(len(values))


# Rows


def test_loss_is_nats_a_token(tuned, corpus, tmp_path):
    config = config_for(corpus, tmp_path, model_name_or_path=tuned, micro_batch_tokens=50)
    found = evaluation_command.main(config)["loss"]
    model = load_language_model(tuned, config)
    examples = load(Source((corpus,)), model, "completion", 32).examples
    sums, lengths = logps(model, examples, 0)
    loss = -float(sums.sum() / lengths.sum())
    assert found["loss"] == pytest.approx(loss, abs=1e-6) and found["tokens"] == int(lengths.sum())
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6) and found["rows"] == 40
    left_out = [-(sums.sum() - s) / (lengths.sum() - n) for s, n in zip(sums, lengths)]
    jackknife = math.sqrt(39 / 40 * float(sum((x - sum(left_out) / 40) ** 2 for x in left_out)))
    assert found["loss_se"] == pytest.approx(jackknife, rel=0.03)
    assert found["perplexity_se"] == pytest.approx(found["perplexity"] * found["loss_se"])
    assert 0.2 < found["mean_token_accuracy"] < 1
    written = json.loads((tmp_path / "eval.json").read_text())
    assert written["loss"] == found and written["config"]["micro_batch_tokens"] == 50
    assert (tmp_path / "config.yaml").exists()


def test_the_error_of_a_ratio_is_that_of_a_mean_where_all_rows_have_one_length():
    values = torch.randn(30).double()
    assert of_ratio(values * 5, torch.full((30,), 5.0).double()) == pytest.approx(error_of(values))
    assert math.isnan(of_ratio(values[:1], torch.ones(1).double()))


def test_reward_is_the_accuracy_of_a_reward_model_on_pairs(tiny_reward_model, corpus, tmp_path):
    """On random pairs, which it cannot tell: an accuracy between 0 and 1."""
    sides = [(f" {sentence(i + 7, 4)}", f" {sentence(i + 3, 5)}") for i in range(12)] + [(" film good", " good dull")]
    rows = [{"prompt": sentence(i, 3), "chosen": a, "rejected": b} for i, (a, b) in enumerate(sides)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = config_for(path, tmp_path / "out", reward_model_path=tiny_reward_model, per_device_eval_batch_size=4)
    found = evaluation_command.main(config)
    scorer = load_scorer(tiny_reward_model, config)
    margins = []
    for e in load(Source((path,)), scorer, "preference", 32).examples:
        with torch.no_grad():
            chosen, rejected = (sequence_scores(scorer, pad_sequences([e.prompt], [c], 0)) for c in e.completions)
        margins.append(float(chosen - rejected))
    right = sum(margin > 0 for margin in margins)
    assert list(found) == ["reward"] and 0 < right < 13 == found["reward"]["pairs"]
    assert found["reward"]["accuracy"] == pytest.approx(right / 13)
    assert found["reward"]["accuracy_se"] == pytest.approx(math.sqrt(right / 13 * (1 - right / 13) / 12))
    assert found["reward"]["margin"] == pytest.approx(sum(margins) / 13, abs=1e-5)
    assert found["reward"]["margin_se"] == pytest.approx(error_of(torch.tensor(margins)), rel=1e-4)


def test_several_reward_models_are_measured_each(tiny_reward_model, pairs, tmp_path):
    config = config_for(pairs, tmp_path, reward_model_path=[tiny_reward_model] * 2)
    found = evaluation_command.main(config)["reward"]
    assert found["accuracy"] == found["model_2/accuracy"] and found["model_2/pairs"] == 32


@pytest.mark.parametrize("against", [True, False], ids=["reference", "none"])
def test_preference_is_what_dpo_sees(tuned, tiny_model, pairs, tmp_path, against):
    changes = {"ref_model_name_or_path": tiny_model} if against else {}
    config = config_for(pairs, tmp_path, model_name_or_path=tuned, beta=0.3, **changes)
    found = evaluation_command.main(config)["preference"]
    models = [load_language_model(path, config) for path in (tuned, tiny_model)]
    examples = load(Source((pairs,)), models[0], "preference", 32).examples
    (chosen, lengths), (rejected, others) = (logps(models[0], examples, side) for side in (0, 1))
    reference = [logps(models[1], examples, side)[0] if against else torch.zeros(32).double() for side in (0, 1)]
    _, stats = rlhf_kernels.dpo_loss(chosen, rejected, *reference, beta=0.3)
    expected = stats.as_dict()
    assert found["rewards/accuracies"] == pytest.approx(expected["accuracy"])
    assert found["rewards/margins"] == pytest.approx(expected["margins"], abs=1e-6)
    assert found["rewards/chosen"] == pytest.approx(expected["chosen_rewards"], abs=1e-6)
    assert found["logps/rejected"] == pytest.approx(float(rejected.mean()), abs=1e-5)
    ratios = 0.3 * (chosen - reference[0]) / lengths, 0.3 * (rejected - reference[1]) / others
    assert found["per_token/margins"] == pytest.approx(float((ratios[0] - ratios[1]).mean()), abs=1e-6)
    assert found["per_token/accuracies"] == pytest.approx(float((ratios[0] > ratios[1]).double().mean()))
    assert found["per_token/margins_se"] == pytest.approx(error_of(ratios[0] - ratios[1]), rel=1e-4)


# Prompts


def sampled(config, path: str):
    """What the command samples, batch by batch: (texts of good, lengths, ended, rollouts)."""
    model = load_language_model(path, config)
    data = read_prompts(Source(tuple(config.dataset_name)), config.num_prompts, model, 512)
    copies = [e for e in data.examples for _ in range(config.num_return_sequences)]
    batches = in_batches(copies, config.per_device_eval_batch_size)
    rollouts = [generate(model, b, Sampling(6, 1.0), seed=(config.seed, SEED, i)) for i, b in enumerate(batches)]
    return model, rollouts, torch.cat([torch.tensor(count_good([], r.completions)).float() for r in rollouts])


REWARD = {"reward": "rewards_for_tests:count_good"}


def test_win_rate_by_hand(tuned, tiny_model, corpus, tmp_path):
    changes = {"num_prompts": 9, "num_return_sequences": 3, "per_device_eval_batch_size": 5, **REWARD}
    config = config_for(corpus, tmp_path, model_name_or_path=tuned, ref_model_name_or_path=tiny_model, **changes)
    found = evaluation_command.main(replace(config, metrics=["win_rate"]))["win_rate"]
    model, ours, scores = sampled(config, tuned)
    reference, theirs, others = sampled(config, tiny_model)
    wins = ((scores > others).double() + 0.5 * (scores == others).double()).view(9, 3)
    assert found["win_rate"] == pytest.approx(float(wins.mean())) != 0.5
    assert found["win_rate_se"] == pytest.approx(error_of(wins.mean(1)))
    assert (found["score"], found["ref_score"]) == pytest.approx((float(scores.mean()), float(others.mean())))
    assert found["score_se"] == pytest.approx(error_of(scores.view(9, 3).mean(1)), rel=1e-5)
    lengths = [[len(ids) for r in rollouts for ids in r.completion_ids] for rollouts in (ours, theirs)]
    assert (found["length"], found["ref_length"]) == pytest.approx((sum(lengths[0]) / 27, sum(lengths[1]) / 27))
    assert found["eos_rate"] == pytest.approx(sum(int(r.finished.sum()) for r in ours) / 27)
    with torch.no_grad():
        sums = [torch.cat([response_logprobs(m, r.sequences)[0].sum(1) for r in ours]) for m in (model, reference)]
    kl = float((sums[0] - sums[1]).mean())
    assert found["kl"] == pytest.approx(kl, abs=1e-4) and kl > 0.05
    assert (found["prompts"], found["samples"]) == (9, 27)


def test_a_policy_against_itself_wins_half(tiny_model, corpus, tmp_path):
    models = {"model_name_or_path": tiny_model, "ref_model_name_or_path": tiny_model}
    found = evaluation_command.main(config_for(corpus, tmp_path, **models, **REWARD, num_prompts=5))
    assert list(found) == ["loss", "win_rate"]
    assert found["win_rate"]["win_rate"] == 0.5 and found["win_rate"]["kl"] == 0.0 == found["win_rate"]["win_rate_se"]


def test_a_rival_with_another_vocabulary_reads_its_own_tokens(tiny_model, tiny_reward_model, corpus, tmp_path, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 300}
    rival = str(init(InitConfig(dataset_name=corpus, output_dir=str(tmp_path / "rival"), **sizes)))
    models = {"model_name_or_path": tiny_model, "ref_model_name_or_path": rival, "reward_model_path": tiny_reward_model}
    config = config_for(corpus, tmp_path / "out", **models, num_prompts=4, metrics=["win_rate"])
    found = evaluation_command.main(config)["win_rate"]
    assert "kl" not in found and 0 <= found["win_rate"] <= 1 and found["ref_length"] > 0
    assert f"no KL: {rival} has another vocabulary" in capsys.readouterr().err
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "the film"}, {"prompt": 3}, {"prompt": "the play"}])
    changes = models | {"metrics": ["win_rate"], "on_bad_row": "skip"}
    with pytest.raises(DataError, match=r"^on_bad_row: win_rate compares answers to the same prompts"):
        evaluation_command.main(config_for(rows, tmp_path / "skipped", **changes))
    same = changes | {"ref_model_name_or_path": tiny_model}
    assert evaluation_command.main(config_for(rows, tmp_path / "same", **same))["win_rate"]["prompts"] == 2


def test_best_of_n_chooses_among_the_samples_of_each_prompt(tiny_model, corpus, tmp_path):
    changes = {"num_prompts": 10, "num_return_sequences": 4, "metrics": ["best_of_n"], **REWARD}
    config = config_for(corpus, tmp_path, model_name_or_path=tiny_model, **changes)
    found = evaluation_command.main(config)["best_of_n"]
    _, _, scores = sampled(config, tiny_model)
    assert [point["n"] for point in found["curve"]] == [1, 2, 4]
    assert found["curve"][0]["score"] == pytest.approx(float(scores.mean()))
    assert found["curve"][2]["score"] == pytest.approx(float(scores.view(10, 4).amax(1).mean()))
    assert (tmp_path / "best_of_n.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "eval.json").read_text())["best_of_n"] == found


def test_the_policy_is_sampled_once_for_both(tiny_model, corpus, monkeypatch):
    models = {"model_name_or_path": tiny_model, "ref_model_name_or_path": tiny_model}
    subject = Subject(config_for(corpus, **models, **REWARD, num_prompts=2, num_return_sequences=2))
    calls, call = [], generate
    monkeypatch.setattr("rlhf.evaluation.generate", lambda *a, **k: calls.append(a[0]) or call(*a, **k))
    evaluation_command.of_win_rate(subject)
    evaluation_command.of_best_of_n(subject)
    assert len(calls) == 2 and calls[0] is subject.policy and calls[1] is subject.reference


def test_one_row_has_no_error(tiny_model, tmp_path):
    path = write_jsonl(tmp_path / "row.jsonl", [{"prompt": "the film", "completion": " good"}])
    options = ["--output_dir", str(tmp_path / "out"), "--max_length", "32"]
    main(["eval", "--model_name_or_path", tiny_model, "--dataset_name", path, *options])
    found = json.loads((tmp_path / "out" / "eval.json").read_text())["loss"]
    assert found["loss_se"] is None and found["tokens"] == 2


# What is measured, and what is refused


@pytest.mark.parametrize(
    ("rows", "given", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, "m", ["loss"]),
        ({"text": "a"}, "m", ["loss"]),
        ({"messages": []}, "m r f n", ["loss", "win_rate", "best_of_n"]),
        ({"prompt": "a"}, "m f n", ["best_of_n"]),
        ({"chosen": "a", "rejected": "b"}, "m", ["preference"]),
        ({"chosen": "a", "rejected": "b"}, "rm", ["reward"]),
        ({"chosen": "a", "rejected": "b"}, "m r rm n", ["reward", "preference", "win_rate", "best_of_n"]),
    ],
)
def test_what_is_measured_follows_from_what_is_given(tmp_path, rows, given, expected):
    fields = {
        "m": {"model_name_or_path": "m"}, "r": {"ref_model_name_or_path": "r"}, "f": {"reward": "a:b"},
        "rm": {"reward_model_path": "rm"}, "n": {"num_return_sequences": 2},
    }  # fmt: skip
    changes = {name: value for key in given.split() for name, value in fields[key].items()}
    path = write_jsonl(tmp_path / "rows.jsonl", [rows])
    assert chosen_metrics(config_for(path, **changes)) == expected
    assert chosen_metrics(config_for(path, **changes, metrics=expected[::-1])) == expected


def test_nothing_to_measure_says_what_is_missing(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"chosen": "a", "rejected": "b"}])
    with pytest.raises(UsageError, match="measure on rows with chosen, rejected: reward needs reward_model_path"):
        chosen_metrics(config_for(path))
    path = write_jsonl(tmp_path / "none.jsonl", [{"score": 1}])
    with pytest.raises(UsageError, match="nothing to measure on rows with score: no metric reads these"):
        chosen_metrics(config_for(path, model_name_or_path="m"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--metrics", "loss"], "metrics: loss needs model_name_or_path, which is not given"),
        (["--metrics", "win_rate", "--model_name_or_path", "m"], "win_rate needs ref_model_name_or_path"),
        (["--metrics", "best_of_n", "--model_name_or_path", "m"], "best_of_n needs a reward"),
        (["--metrics", "best_of_n", "--model_name_or_path", "m", "--reward", "a:b"], "num_return_sequences > 1"),
        (["--metrics", "bleu"], "metrics: expected"),
        (["--temperature", "0"], "temperature: expected a number > 0, got 0.0"),
        (["--reward", "f"], "reward: expected module:function, got 'f'"),
        (["--num_prompts", "0"], "num_prompts: expected a number >= 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(capsys, arguments, line):
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--dataset_name", "rows.jsonl", *arguments])
    told = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(told) == 1 and told[0].startswith("rlhf eval: ") and line in told[0], told


def test_rows_models_and_folders_that_do_not_fit_are_one_line(capsys, tiny_model, corpus, pairs, tmp_path):
    def fails(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["eval", "--device", "cpu", "--max_length", "32", *arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    out = ["--output_dir", str(tmp_path / "out")]
    model = ["--model_name_or_path", tiny_model, *out]
    assert "absent.jsonl: no such file" in fails(*model, "--dataset_name", "absent.jsonl")
    told = fails(*model, "--dataset_name", corpus, "--metrics", "preference")
    assert "corpus.jsonl:1: expected the column 'chosen', got prompt, completion" in told
    assert "64 positions" in fails(*model, "--dataset_name", corpus, "--max_length", "100")
    sampling = ["--metrics", "best_of_n", "--reward", REWARD["reward"], "--num_return_sequences", "2"]
    told = fails(*model, "--dataset_name", corpus, *sampling)
    assert "longest prompt + max_new_tokens: 69 tokens are more than the 64 positions" in told
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 300}
    rival = str(init(InitConfig(dataset_name=corpus, output_dir=str(tmp_path / "rival"), **sizes)))
    told = fails(*model, "--dataset_name", pairs, "--ref_model_name_or_path", rival)
    assert "ref_model_name_or_path: " in told and "has another vocabulary than the model" in told
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "metrics.jsonl").touch()
    assert "holds a training run: use another output_dir for figures" in fails(*model, "--dataset_name", corpus)
    assert not (tmp_path / "out" / "eval.json").exists()


def test_bad_rows_are_skipped_on_request(tiny_model, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "the", "completion": " film"}\n{"prompt": \n{"prompt": "the", "completion": " play"}\n')
    config = config_for(str(path), tmp_path / "out", model_name_or_path=tiny_model, on_bad_row="skip")
    assert evaluation_command.main(config)["loss"]["rows"] == 2
    told = capsys.readouterr().err
    assert "1 skipped_rows" in told and "rows.jsonl:2: not valid JSON" in told
