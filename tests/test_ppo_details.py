"""Details that decide whether PPO is right, and faults of other systems, each in the trainer as a whole.

PPO_DETAILS.md says which test is about which; those of a single module stand in that module's file."""

from __future__ import annotations

import ast
import re
from dataclasses import fields, replace

import pytest
import torch
from conftest import ROOT
from test_losses import ppo_config
from test_ppo_invariance import KeepGradients, far, models_of, sampled

import rlhf_kernels
from rlhf import advantages, ppo
from rlhf import rollout as rollouts
from rlhf.advantages import score, with_advantages
from rlhf.config import InitConfig, PPOConfig, RunConfig
from rlhf.forward import response_logprobs, response_values, sequence_scores
from rlhf.init import init
from rlhf.layout import load_models
from rlhf.model import load_language_model, load_scorer
from rlhf.optim import make_optimizer
from rlhf.ppo import summarize, update
from rlhf.reward import KLController, model_reward
from rlhf.rollout import Sampling, generate
from rlhf.types import PromptBatch, Rollout, SequenceBatch, pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = RunConfig(output_dir="unused", device="cpu")
TABLE = ROOT / "tests" / "PPO_DETAILS.md"
EOS, PAD = 2, 0


# The table


def rows_of_the_table() -> list[tuple[int, list[str]]]:
    """(number, cells after it) of each row of both tables, in order."""
    lines = [line.strip("|").split("|") for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return [(int(cells[0]), cells[1:]) for cells in lines if cells[0].strip().isdigit()]


def test_the_table_names_every_detail_and_complaint_once():
    numbers = [number for number, _ in rows_of_the_table()]
    assert numbers == [*range(1, 26), *range(1, 56)]


def test_every_test_in_the_table_exists():
    """And each row names one, or says why there is none."""
    defined = {}
    for number, cells in rows_of_the_table():
        names = re.findall(r"tests/(test_\w+\.py)::(\w+)", cells[-1])
        assert names or "not tested: " in cells[-1], number
        for file, test in names:
            if file not in defined:
                tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
                defined[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in defined[file] and test.startswith("test_"), f"row {number}: {file}::{test}"


# What is read where


def batch_of(prompts: list[list[int]], responses: list[list[int]], ended: list[bool]) -> Rollout:
    texts = ["text"] * len(prompts)
    return Rollout(
        pad_sequences(prompts, responses, PAD), torch.tensor(ended), PromptBatch(prompts, texts, {}), texts, responses
    )


def test_eos_and_pad_inside_a_prompt_or_response_end_nothing(tiny_model, tiny_reward_model):
    """Detail 8, transformers#35352, TRL#6802: a chat has an EOS after each turn; a pad token may be a word. Reward,
    values and log-probabilities are those of each sequence alone."""
    policy, scorer = load_language_model(tiny_model, RUN), load_scorer(tiny_reward_model, RUN)
    prompts = [[4, EOS, 5, EOS], [EOS], [PAD, 6, PAD, PAD, 7, EOS]]
    responses = [[5, PAD, 6, EOS], [7], [PAD, EOS]]
    rollout = batch_of(prompts, responses, [True, False, True])
    batch = rollout.sequences
    found = model_reward(scorer, policy, 3).score(rollout)
    with torch.no_grad():
        values, logprobs = response_values(scorer, batch), response_logprobs(policy, batch)[0]
        for row, (prompt, response) in enumerate(zip(prompts, responses)):
            ids = torch.tensor([prompt + response])
            hidden = scorer.module.base_model(ids).last_hidden_state[0]
            config = scorer.module.config
            scores = ((hidden @ scorer.module.score.weight[0]) - config.reward_mean) / config.reward_std
            torch.testing.assert_close(found[row], scores[-1], rtol=1e-5, atol=1e-5)
            n = len(response)
            torch.testing.assert_close(values[row, :n], scores[len(prompt) - 1 : -1], rtol=1e-5, atol=1e-5)
            every = torch.log_softmax(policy.module(ids).logits[0, len(prompt) - 1 : -1, : policy.vocab_size], -1)
            expected = every.gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(logprobs[row, :n], expected, rtol=1e-5, atol=1e-5)


def test_sampling_looks_for_the_end_behind_the_prompt(tiny_model):
    """TRL#6805: an EOS in the prompt was taken for the end of the response."""
    model = replace(load_language_model(tiny_model, RUN), eos_ids=(EOS, 5, 9))
    prompts = PromptBatch([[4, EOS, 5, EOS], [EOS], [9, 9]] * 10, ["text"] * 30, {})
    rollout = generate(model, prompts, Sampling(8), seed=(3,))
    assert len(set(rollout.sequences.response_lengths.tolist())) > 3
    for row, (prompt, response) in enumerate(zip(prompts.token_ids, rollout.completion_ids)):
        assert rollout.sequences.rows(torch.tensor([row])).ids[0].tolist() == prompt + response
        assert not set(response[:-1]) & set(model.eos_ids)
        assert bool(rollout.finished[row]) == (response[-1] in model.eos_ids)


def test_a_response_that_any_eos_ended_has_no_penalty(tiny_model):
    """TRL#2387: the penalty compared with another id than the one that stops."""
    config = ppo_config(tiny_model, missing_eos_penalty=3.0, reward=["rewards_for_tests:ten"])
    models = models_of(config)
    rollout = sampled(models, config)
    experience, _ = score(rollout, models, config)
    ends = [ids[-1] for ids in rollout.completion_ids]
    assert experience.scores.tolist() == [10.0 if end in (2, 5, 9, 11, 12) else 7.0 for end in ends]
    assert len(set(ends) & {2, 5, 9, 11, 12}) > 1


def test_sampled_tokens_are_not_encoded_again(corpus, tmp_path, monkeypatch):
    """TRL#5224, SkyRL#123: text decoded and encoded again has other tokens than were sampled."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}
    path = init(InitConfig(dataset_name=corpus, output_dir=str(tmp_path / "bpe"), tokenizer="bpe", **sizes))
    config = ppo_config(str(path))
    models, drawn, call = load_models(config), [], rollouts.read

    def watched(model, prompts, new_ids):
        drawn.extend(new_ids)
        return call(model, prompts, new_ids)

    monkeypatch.setattr(rollouts, "read", watched)
    rollout = generate(models.policy, PromptBatch([[70, 71], [80]] * 4, ["text"] * 8, {}), Sampling(12), seed=(1,))
    experience, _ = score(rollout, models, config)
    again = [models.policy.tokenizer(text)["input_ids"] for text in rollout.completions]
    eos = models.policy.eos_ids[0]
    for row, ids in enumerate(drawn):
        expected = ids[: ids.index(eos) + 1] if eos in ids else ids
        assert experience.sequences.rows(torch.tensor([row])).response_ids.tolist() == expected
        assert rollout.completion_ids[row] == expected
    assert sum(a != ids for a, ids in zip(again, drawn)) > 4


# What is formed at all


def watch(monkeypatch, name: str, calls: list) -> None:
    call = getattr(rlhf_kernels, name)

    def watched(hidden, *rest, **options):
        calls.append((name, len(hidden), options.get("return_entropy", False)))
        return call(hidden, *rest, **options)

    monkeypatch.setattr(rlhf_kernels, name, watched)


def test_prompts_are_never_projected_and_entropies_not_for_scoring(tiny_model, monkeypatch):
    """slime#2253, verl#4675: as many rows meet the head as there are response tokens, in scoring (policy, reference)
    and in the update (policy)."""
    config = ppo_config(tiny_model, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    models, calls = models_of(config), []
    rollout = sampled(models, config)
    lengths = rollout.sequences.response_lengths
    parts = [int(lengths[:4].sum()), int(lengths[4:].sum())]
    for name in ("linear_token_logprobs", "linear_ppo_loss"):
        watch(monkeypatch, name, calls)
    experience = with_advantages(score(rollout, models, config)[0], config, config.kl_coef)
    assert calls == [("linear_token_logprobs", n, False) for n in parts for _ in range(2)]
    calls.clear()
    update(models, experience, torch.arange(8), KeepGradients(models), config, config.kl_coef)
    assert calls == [("linear_ppo_loss", n, False) for n in parts]


def test_a_rollout_keeps_no_logits(tiny_model):
    """TRL#234: those of a whole rollout are B x T x V numbers."""
    config = ppo_config(tiny_model)
    models = models_of(config)
    rollout = sampled(models, config)
    experience, _ = score(rollout, models, config)
    for record in (rollout, experience):
        for field in fields(record):
            value = getattr(record, field.name)
            assert not isinstance(value, torch.Tensor) or value.numel() <= 8 * rollout.sequences.width
    assert rollout.sequences.counted is None
    held = {type(getattr(rollout.sequences, field.name)) for field in fields(SequenceBatch) if field.name != "counted"}
    assert held == {torch.Tensor}


# Numbers


def test_the_first_ratio_is_1_in_bfloat16_too(tiny_model, tiny_reward_model, corpus, tmp_path):
    """minimind#814, verl#6280: the same types in scoring and training, and the same micro-batches, whose sizes decide
    how products are rounded."""
    config = ppo_config(
        tiny_model,
        dataset_name=corpus,
        output_dir=str(tmp_path / "run"),
        reward_model_path=tiny_reward_model,
        dtype="bfloat16",
        temperature=0.7,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        learning_rate=3e-3,
        num_ppo_epochs=2,
        max_steps=2,
        sample_steps=0,
        report_to="none",
    )
    rows = []
    ppo.train(config, on_step=lambda step, policy, metrics: rows.append(dict(metrics)))
    assert [row["val/ratio_first"] for row in rows] == [1.0, 1.0]
    assert rows[0]["objective/kl"] == 0.0 and abs(rows[1]["objective/kl"]) > 1e-4 and rows[1]["val/ratio"] != 1.0


@pytest.mark.parametrize("tokens", [None, 30])
def test_scoring_and_the_first_epoch_have_the_same_micro_batches(tiny_model, corpus, tmp_path, monkeypatch, tokens):
    """verl#6280: the size of a product decides how it is rounded, so that the same rows beside others are no longer
    the same numbers."""
    scored, trained, of_tokens, losses = [], [], advantages.of_tokens, ppo.ppo_losses

    def watched(part, *rest):
        scored.append(part.ids.tolist())
        return of_tokens(part, *rest)

    def watched_losses(models, experience, *rest):
        trained.append(experience.sequences.ids.tolist())
        return losses(models, experience, *rest)

    monkeypatch.setattr(advantages, "of_tokens", watched)
    monkeypatch.setattr(ppo, "ppo_losses", watched_losses)
    changes = {"dataset_name": corpus, "output_dir": str(tmp_path / "run"), "micro_batch_tokens": tokens}
    changes |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_mini_batches": 2}
    changes |= {"num_ppo_epochs": 2, "max_steps": 1, "sample_steps": 0, "report_to": "none"}
    ppo.train(ppo_config(tiny_model, **changes))
    assert len(scored) > 3 and trained[: len(scored)] == scored
    assert len(trained) > len(scored) and trained[len(scored) :] != scored


def test_bfloat16_differences_are_taken_in_float32(tiny_model):
    """OR#634: log-probabilities rounded to bfloat16 lie 0.03 apart near -4, more than a step changes them."""
    config = ppo_config(tiny_model, dtype="bfloat16")
    models = models_of(config)
    rollout = sampled(models, config)
    experience, _ = score(rollout, models, config)
    for column in (experience.logprobs, experience.ref_logprobs, experience.kl, experience.values):
        assert column.dtype == torch.float32
    mask = rollout.sequences.response_mask
    assert (experience.logprobs.bfloat16().float() != experience.logprobs)[mask].float().mean() > 0.9
    assert torch.equal(experience.kl, experience.logprobs - experience.ref_logprobs)


def test_every_metric_of_a_step_by_hand(tiny_model):
    """TRL#2496 (pads counted as entropy), TRL#2562 (KL of tokens taken for that of responses), TRL#3175 (clip
    fraction), OR feeb0283: over responses of different lengths, in two minibatches of three micro-batches."""
    config = ppo_config(tiny_model, temperature=0.7, kl_coef=0.3, cliprange=0.1, cliprange_high=0.3)
    config = replace(config, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_mini_batches=2)
    models = models_of(config)
    rollout = sampled(models, config)
    scored = with_advantages(score(rollout, models, config)[0], config, config.kl_coef)
    experience, guard = far(scored), KeepGradients(models)
    experience = replace(experience, kl=experience.logprobs - experience.ref_logprobs)
    halves = [torch.arange(4), torch.arange(4, 8)]
    updates = [update(models, experience, rows, guard, config, config.kl_coef) for rows in halves]
    updates = [(stats, torch.tensor(norm)) for (stats, _), norm in zip(updates, (3.0, 5.0))]
    found = summarize(rollout, experience, updates, config, config.kl_coef)
    batch, mask = rollout.sequences, rollout.sequences.response_mask
    with torch.no_grad():
        logprobs, entropy = response_logprobs(models.policy, batch, 0.7)
        values = response_values(models.value, batch)
    change = (logprobs - experience.logprobs)[mask]
    ratio, a = change.exp(), experience.advantages[mask]
    free, clipped = -a * ratio, -a * ratio.clamp(0.9, 1.3)
    value, old, target = (x[mask] for x in (values, experience.values, experience.returns))
    error, near = value - target, value.clamp(old - 0.2, old + 0.2) - target
    kl = (experience.logprobs - experience.ref_logprobs).sum(1).mean()
    scores, lengths = experience.scores.mean(), torch.tensor([len(ids) for ids in rollout.completion_ids]).float()
    first = (logprobs - experience.logprobs)[:4][mask[:4]].exp().mean()
    expected = {
        "objective/kl": kl, "objective/entropy": -experience.logprobs.sum(1).mean(),
        "objective/non_score_reward": -0.3 * kl, "objective/rlhf_reward": scores - 0.3 * kl,
        "objective/scores": scores, "objective/kl_coef": 0.3, "policy/approxkl_avg": 0.5 * (change**2).mean(),
        "policy/clipfrac_avg": (clipped > free).float().mean(), "policy/entropy_avg": entropy[mask].mean(),
        "loss/policy_avg": torch.maximum(free, clipped).mean(),
        "loss/value_avg": 0.5 * torch.maximum(error**2, near**2).mean(),
        "val/clipfrac_avg": (near**2 > error**2).float().mean(), "val/ratio": ratio.mean(), "val/ratio_first": first,
        "tokens": lengths.sum(), "val/num_eos_tokens": sum(rollout.finished.tolist()),
        "val/response_length": lengths.mean(), "val/updates": 2, "grad_norm": 4.0,
    }  # fmt: skip
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4, abs=1e-6)
    assert 0 < found["policy/clipfrac_avg"] < 1 and 0 < found["val/clipfrac_avg"] < 1 and found["objective/kl"] != 0
    assert found["policy/entropy_avg"] > 0  # whole of the vocabulary: at most its logarithm
    assert found["policy/entropy_avg"] <= torch.tensor(float(models.policy.vocab_size)).log() + 1e-6


def test_the_controller_is_fed_nats_a_response_and_the_episodes_of_a_step(tiny_model, corpus, tmp_path, monkeypatch):
    """trlX#361, #441: it got the KL of a token, verl#1984: another count."""
    fed = []

    class Watched(KLController):
        def update(self, kl: float, episodes: int):
            fed.append((kl, episodes))
            new = KLController(self.coef, self.target, self.horizon).update(kl, episodes)
            return Watched(new.coef, new.target, new.horizon)

    monkeypatch.setattr(ppo, "KLController", Watched)
    changes = {"dataset_name": corpus, "output_dir": str(tmp_path / "run"), "kl_target": 0.5, "kl_horizon": 100}
    changes |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 2}
    changes |= {"learning_rate": 3e-3, "max_steps": 3, "sample_steps": 0, "report_to": "none"}
    rows = []
    ppo.train(ppo_config(tiny_model, **changes), on_step=lambda step, policy, metrics: rows.append(dict(metrics)))
    assert fed == [(row["objective/kl"], 16) for row in rows] and fed[1][0] > 0
    coefs = [row["objective/kl_coef"] for row in rows]
    errors = [min(max(kl / 0.5 - 1, -0.2), 0.2) for kl, _ in fed]
    assert coefs[1:] == pytest.approx([coefs[i] * (1 + errors[i] * 16 / 100) for i in range(2)])


def test_incoming_gradients_may_have_any_strides():
    """verl#6960: a kernel read a transposed gradient as if it were contiguous."""
    hidden, weight, ids = torch.randn(6, 5, 8), torch.randn(11, 8), torch.randint(0, 11, (6, 5))
    upstream = torch.randn(5, 6).T
    assert not upstream.is_contiguous()
    found = []
    for gradient in (upstream, upstream.contiguous()):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, hidden @ weight.T)]
        logprobs, entropy = rlhf_kernels.linear_token_logprobs(*leaves[:2], ids, return_entropy=True)
        both = rlhf_kernels.token_logprobs(leaves[2], ids, return_entropy=True)
        for output in (logprobs, entropy, *both):
            output.backward(gradient, retain_graph=True)
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_adamw_is_that_of_the_reference_runs():
    """Detail 18: epsilon 1e-5 unless another is given; both betas are options."""
    module = torch.nn.Linear(2, 2)
    base = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "reward": ["a:b"]}
    plain = make_optimizer([(module, 1e-3)], PPOConfig(**base))
    assert all((g["eps"], g["betas"]) == (1e-5, (0.9, 0.999)) for g in plain.param_groups)
    asked = make_optimizer([(module, 1e-3)], PPOConfig(**base, adam_epsilon=1e-8, adam_beta1=0.8, adam_beta2=0.95))
    assert all((g["eps"], g["betas"]) == (1e-8, (0.8, 0.95)) for g in asked.param_groups)


def test_a_reward_models_normalisation_is_applied_to_its_scores(tiny_model, tiny_reward_model):
    """Detail 10: mean and deviation stand in its configuration."""
    scorer = load_scorer(tiny_reward_model, RUN)
    batch, config = pad_sequences([[4, 5], [6]], [[7, 8], [9]], PAD), scorer.module.config
    with torch.no_grad():
        before = sequence_scores(scorer, batch)
        raw = before * config.reward_std + config.reward_mean
        config.reward_mean, config.reward_std = 0.5, 4.0
        torch.testing.assert_close(sequence_scores(scorer, batch), (raw - 0.5) / 4)
