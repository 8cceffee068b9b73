"""The trainer on the fused head: the same numbers as from logits, which are never formed; sampling and statistics."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_losses import experience_of, ppo_config

import rlhf_kernels
from rlhf import layout
from rlhf.cli import main
from rlhf.config import RunConfig
from rlhf.forward import response_logprobs
from rlhf.layout import Models
from rlhf.losses import ppo_losses
from rlhf.model import LanguageModel, load_language_model
from rlhf.rollout import draw
from rlhf.types import pad_sequences
from rlhf_kernels import LMHead, PPOLossOptions, PPOStats, ppo_loss
from rlhf_kernels.lm_head import TOKENS
from rlhf_kernels.stats import PPO_FIELDS

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = RunConfig(output_dir="unused", device="cpu")
PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 5], [4, 4]]
RESPONSES = [[5, 6, 2], [9, 10, 11, 12, 4, 2], [6], [7, 8]]
REASON = "the head is an Oracle, not an nn.Linear"


def _tiny(path: str, kind: str) -> LanguageModel:
    """A model whose probabilities differ: of another architecture, or of a vocabulary larger than the tokenizer's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = load_language_model(path, RUN)
    sizes = {"vocab_size": model.vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    sizes |= {"num_attention_heads": 4}
    if kind == "gemma2":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
        sizes |= {"final_logit_softcapping": 5.0, "attn_implementation": "eager"}
    torch.manual_seed(0)
    if kind in ("gemma2", "gpt2"):
        config = AutoConfig.for_model(kind, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        model = replace(model, module=AutoModelForCausalLM.from_config(config).eval())
    if kind == "padded":
        model.module.resize_token_embeddings(model.vocab_size + 13)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(params=["llama", "gemma2", "gpt2", "padded"])
def model(request, tiny_model):
    return _tiny(tiny_model, request.param)


def _on_logits(model: LanguageModel) -> LanguageModel:
    """The same module, with a head that is not to be fused."""
    other = replace(model)
    other.__dict__["head"] = LMHead(None, None, reason=REASON)
    return other


def _gradients(loss, *modules):
    parameters = [p for module in modules for p in module.parameters()]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def _assert_same_gradients(ours, theirs):
    assert sum(g is not None and bool(g.any()) for g in ours) > 15
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()) + 1e-7)


def test_logprobs_are_those_of_the_logits(model):
    """A softcap, tied weights, ids without probability; prompts and responses of different lengths."""
    batch, logits = pad_sequences(PROMPTS, RESPONSES, model.pad_id), _on_logits(model)
    assert model.head.fused and not logits.head.fused
    assert model.head.softcap == (5.0 if model.module.config.model_type == "gemma2" else None)
    found = []
    for one in (model, logits):
        logprobs, entropy = response_logprobs(one, batch, 0.7)
        upstream = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
        loss = (logprobs * upstream + entropy * upstream**2).sum()
        found.append((logprobs.detach(), entropy.detach(), _gradients(loss, model.module)))
    (logprobs, entropy, grads), (expected, expected_entropy, slopes) = found
    assert expected.min() < -4 and expected[batch.response_mask].max() < 0
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-5)
    _assert_same_gradients(grads, slopes)


def test_logits_of_whole_sequences_are_never_formed(tiny_model, monkeypatch):
    """In a run of PPO the head is called to probe it and to sample the next token, and at no other time."""
    shapes, load = [], layout.load_language_model

    def watched(*arguments):
        model = load(*arguments)
        model.module.lm_head.register_forward_hook(lambda _, inputs, logits: shapes.append(tuple(logits.shape[:-1])))
        return model

    monkeypatch.setattr(layout, "load_language_model", watched)
    config = ppo_config(tiny_model)
    models = layout.load_models(config)
    experience = experience_of(models, config)
    loss, _ = ppo_losses(models, experience, config, experience.sequences.response_lengths.sum().float())
    loss.backward()
    assert models.policy.head.fused and {shape for shape in shapes if shape != TOKENS} == {(8, 1)}
    monkeypatch.setattr(models.policy.module.lm_head, "forward", None)
    logprobs, _ = response_logprobs(models.policy, experience.sequences)
    torch.testing.assert_close(logprobs.detach(), experience.logprobs)


PPO = {
    "plain": {},
    "entropy": {"entropy_coef": 0.05},
    "clips": {"cliprange": 0.1, "cliprange_high": 0.3, "dual_clip": 1.2, "cliprange_value": 0.05, "vf_coef": 0.5},
    "temperature": {"temperature": 0.6, "entropy_coef": 0.05},
}


@pytest.fixture
def far(tiny_model):
    """Models and an experience whose ratios, values and returns are far enough apart for every clip to act."""
    config = ppo_config(tiny_model)
    models = layout.load_models(config)
    models = replace(models, policy=replace(models.policy, eos_ids=(2, 5, 9, 11, 12)))  # so that lengths differ
    experience = experience_of(models, config)
    assert len(set(experience.sequences.response_lengths.tolist())) > 2

    def moved(name: str, by: float) -> dict:
        value = getattr(experience, name)
        return {name: value + by * torch.randn_like(value)}

    parts = moved("logprobs", 0.4) | moved("values", 0.2) | moved("returns", 0.5)
    return models, replace(experience, **parts)


@pytest.mark.parametrize("case", PPO)
def test_ppo_losses_are_those_of_the_logits(far, tiny_model, case):
    (models, experience), config = far, ppo_config(tiny_model, **PPO[case])
    part, tokens = experience.rows(torch.tensor([1, 2, 6])), experience.sequences.response_lengths.sum().float()
    found = []
    for policy in (models.policy, _on_logits(models.policy)):
        both = Models(policy, models.value, models.reference, models.rewards)
        loss, stats = ppo_losses(both, part, config, tokens)
        found.append((loss.detach(), stats.as_dict(), _gradients(loss * 1.7, policy.module, models.value.module)))
    (loss, stats, grads), (expected, expected_stats, slopes) = found
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and abs(expected.item()) > 1e-3
    assert stats == pytest.approx(expected_stats, rel=1e-5, abs=1e-6)
    assert stats["tokens"] == part.sequences.response_lengths.sum() < tokens
    clips = ["clip_fraction"] + ["dual_clip_fraction", "value_clip_fraction"] * (case == "clips")
    assert all(0 < stats[name] < 1 for name in clips)
    _assert_same_gradients(grads, slopes)


def _metrics(folder) -> list[dict]:
    """Of each step, what does not depend on the machine's speed and memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("timing", "memory", "tokens_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows]


@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_a_run_that_cannot_fuse_says_why_once_and_goes_on(command, tiny_model, corpus, tmp_path, monkeypatch, capsys):
    def run(name: str) -> tuple[list[dict], str]:
        arguments = [command, "--model_name_or_path", tiny_model, "--dataset_name", corpus, "--device", "cpu"]
        arguments += ["--output_dir", str(tmp_path / name), "--max_steps", "3", "--learning_rate", "1e-3"]
        of_ppo = ["--reward", "rewards_for_tests:count_good", "--response_length", "6", "--max_prompt_length", "8"]
        main(arguments + (of_ppo if command == "ppo" else ["--max_length", "16"]))
        assert (tmp_path / name / "final" / "config.json").is_file()
        return _metrics(tmp_path / name), capsys.readouterr().err

    fused, told = run("fused")
    assert "log-probabilities are taken" not in told
    monkeypatch.setattr(rlhf_kernels, "lm_head_of", lambda _: LMHead(None, None, reason=REASON))
    on_logits, told = run("logits")
    lines = [line for line in told.splitlines() if "log-probabilities are taken" in line]
    assert lines == [f"log-probabilities are taken from whole logits, which costs memory: {REASON}"]
    assert len(fused) == 3
    for a, b in zip(fused, on_logits):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_a_head_that_is_more_than_its_weight_is_not_fused(tiny_model):
    """A hook multiplies the logits by what no number of the config gives: the log-probabilities stay the model's."""
    model = load_language_model(tiny_model, RUN)
    batch = pad_sequences(PROMPTS, RESPONSES, model.pad_id)
    cooler, _ = response_logprobs(model, batch, temperature=1 / 1.7)
    model = replace(model)  # which looks at its head anew
    model.module.lm_head.register_forward_hook(lambda _, inputs, logits: 1.7 * logits)
    assert model.head.reason.startswith("no number of the config gives the model's logits")
    torch.testing.assert_close(response_logprobs(model, batch)[0], cooler, rtol=0, atol=1e-5)


# --- sampling -------------------------------------------------------------------------------------------------------

PROBABILITIES = [0.0, 0.02, 0.3, 0.0, 0.0, 0.05, 0.13, 0.25, 0.15, 0.1, 0.0]
UNKNOWN = [9.0, 9.0]  # logits of ids that the tokenizer does not know


def _scores(rows: int, temperature: float = 1.0):
    logits = torch.tensor(PROBABILITIES).log() * temperature
    return torch.cat([logits, torch.tensor(UNKNOWN)]).expand(rows, -1)


def _drawn(scores, temperature=1.0):
    uniform = torch.rand(len(scores), 1, dtype=torch.float64)
    return draw(scores, temperature, len(PROBABILITIES), uniform)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_frequencies_follow_the_probabilities(temperature):
    """Chi-square of 40,000 draws: 22.5 is exceeded once in 1,000 at 6 degrees of freedom. No token of probability 0
    is drawn, at the beginning, inside and at the end."""
    expected = 40_000 * torch.tensor(PROBABILITIES, dtype=torch.float64)
    seen = torch.bincount(_drawn(_scores(40_000, temperature), temperature), minlength=len(expected)).double()
    possible = expected > 0
    assert len(seen) == len(expected) and not seen[~possible].any()
    assert float(((seen - expected) ** 2 / expected)[possible].sum()) < 22.46
    other = 40_000 / possible.sum()
    assert float(((seen - other) ** 2 / other)[possible].sum()) > 1000  # the test can tell


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1 - 2**-53, 9)])
def test_the_smallest_and_largest_random_numbers_draw_no_impossible_token(monkeypatch, number, token):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, number, **options))
    assert _drawn(_scores(3)).tolist() == [token] * 3


def test_temperature_0_takes_the_likeliest_known_token():
    scores = torch.randn(50, len(PROBABILITIES) + 2)
    assert torch.equal(_drawn(scores, 0.0), scores[:, : len(PROBABILITIES)].argmax(-1))


def test_draws_depend_on_the_seed_and_the_row():
    drawn = [(torch.manual_seed(seed), _drawn(_scores(200)))[1] for seed in (7, 7, 8)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len(set(drawn[0].tolist())) > 4


# --- statistics of a loss in two calls ------------------------------------------------------------------------------


def test_values_of_another_call():
    policy = PPOStats(torch.arange(1.0, 14.0, dtype=torch.float64))
    merged = policy.with_values_of(PPOStats(torch.full((13,), 60.0, dtype=torch.float64)))
    of_values = {"value_loss", "value_clip_fraction"}
    expected = [60.0 if name in of_values else float(i + 1) for i, name in enumerate(PPO_FIELDS)]
    assert merged.sums.tolist() == expected and policy.sums.tolist() == list(range(1, 14))
    units, tokens = 5.0, 6.0
    assert (merged.value_loss.item(), merged.value_clip_fraction.item()) == (60 / units, 60 / tokens)
    assert (merged.policy_loss.item(), merged.ratio_max.item(), merged.tokens.item()) == (1 / units, 13.0, tokens)


def test_values_of_another_call_by_hand():
    """Two tokens count, of ratios 1 and 2 and advantage 1; values 1 and 3 are clipped to 0.5, of returns 2."""
    zeros, ones, mask = torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([[True, True, False]])
    values = {"values": torch.tensor([[1.0, 3.0, 9.0]]), "old_values": zeros, "returns": 2 * ones}
    options = PPOLossOptions(value_clip=0.5)
    _, of_policy = ppo_loss(torch.tensor([[1.0, 2.0, 6.0]]).log(), zeros, ones, mask, options=options)
    _, of_values = ppo_loss(zeros, zeros, zeros, mask, **values, options=options)
    found = of_policy.with_values_of(of_values).as_dict()
    expected = {"policy_loss": -1.1, "clip_fraction": 0.5, "ratio_mean": 1.5, "ratio_max": 2.0, "tokens": 2.0}
    expected |= {"value_loss": 0.5 * 1.5**2, "value_clip_fraction": 1.0, "entropy": 0.0, "kl": 0.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
