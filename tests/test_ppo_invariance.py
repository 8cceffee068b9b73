"""One optimizer step has one gradient: packed or padded, in any number of micro-batches, beside any padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_losses import ppo_config

from rlhf.advantages import score, with_advantages
from rlhf.layout import Models, load_models, recomputing
from rlhf.optim import StepGuard
from rlhf.ppo import minibatches, passes, summarize, update
from rlhf.rollout import Sampling, generate
from rlhf.types import Experience, PromptBatch, Rollout, plan_passes

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 5], [4, 4], [12, 4], [5, 6, 7, 8], [9], [10, 10, 4]]
TOLERANCE = 1e-5  # of the norm of a parameter's gradient


class KeepGradients(StepGuard):
    """Leaves the gradients where they are."""

    def __init__(self, models: Models):
        self.modules = list(models.modules.values())

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        self.loss = float(loss)
        return torch.zeros(())


def sampled(models: Models, config, prompts=PROMPTS) -> Rollout:
    """Responses of different lengths; the policy's weights are moved off the reference's, so that KL is not 0."""
    models = replace(models, policy=replace(models.policy, eos_ids=(2, 5, 9, 11, 12)))
    rollout = generate(models.policy, PromptBatch(prompts, ["text"] * len(prompts), {}), Sampling(6), seed=(4,))
    assert len(set(rollout.sequences.response_lengths.tolist())) > 2
    return rollout


def models_of(config) -> Models:
    models = load_models(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in models.policy.module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return models


def far(experience: Experience) -> Experience:
    """Ratios, values and returns far enough apart for every clip to act."""
    generator = torch.Generator().manual_seed(0)

    def moved(name: str, by: float) -> torch.Tensor:
        value = getattr(experience, name)
        return value + by * torch.randn(value.shape, generator=generator)

    return replace(experience, logprobs=moved("logprobs", 0.3), values=moved("values", 0.2))


def step_of(config, pad: int | None = None) -> tuple[dict[str, torch.Tensor], float, dict]:
    """(gradient of each parameter, loss, metrics) of one optimizer step over all rows."""
    models = models_of(config)
    rollout = sampled(models, config)
    if pad is not None:
        batch = rollout.sequences
        beyond = torch.arange(batch.ids.shape[1]) >= batch.lengths[:, None]
        rollout = replace(rollout, sequences=replace(batch, ids=batch.ids.masked_fill(beyond, pad)))
    experience, _ = score(rollout, models, config)
    experience = far(with_advantages(experience, config, config.kl_coef))
    guard = KeepGradients(models)
    with recomputing(models.modules, config):
        stats, _ = update(models, experience, torch.arange(8), guard, config, config.kl_coef)
    gradients = {
        f"{name}.{key}": p.grad
        for name, module in models.modules.items()
        for key, p in module.named_parameters()
        if p.grad is not None
    }
    metrics = summarize(rollout, experience, [(stats, torch.zeros(()))], config, config.kl_coef)
    return gradients, guard.loss, metrics


def assert_same(found, expected, tolerance: float = TOLERANCE) -> None:
    (ours, loss, metrics), (theirs, expected_loss, expected_metrics) = found, expected
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= tolerance * float(gradient.norm()) + 1e-12, name
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert metrics == pytest.approx(expected_metrics, rel=2e-5, abs=1e-6)


ALGORITHMS = {
    "ppo": {"entropy_coef": 0.01},
    "sequences": {"loss_reduction": "seq_mean_token_mean"},
    "full KL": {"kl_in": "loss", "kl_estimator": "full", "loss_reduction": "seq_mean_token_mean"},
    "grpo": {"advantage": "grpo", "num_generations": 2, "kl_in": "loss", "kl_estimator": "k3+"},
    "one trunk": {"memory_layout": ["shared_value"]},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module", params=ALGORITHMS)
def whole(request, tiny_model):
    """The step in one packed micro-batch."""
    config = ppo_config(tiny_model, **ALGORITHMS[request.param])
    if config.advantage == "grpo":
        monkey = pytest.MonkeyPatch()
        monkey.setattr("test_ppo_invariance.far", lambda experience: experience)
    found = step_of(config)
    yield config, found
    if config.advantage == "grpo":
        monkey.undo()


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
@pytest.mark.parametrize("padding_free", [True, False])
def test_any_number_of_micro_batches_packed_or_padded(whole, micro_batches, padding_free):
    config, expected = whole
    size = 8 // micro_batches
    config = replace(
        config, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, padding_free=padding_free
    )
    assert_same(step_of(config), expected)


def test_a_budget_of_tokens_fills_micro_batches(whole, tiny_model):
    config, expected = whole
    config = replace(config, micro_batch_tokens=18)
    models = models_of(config)
    batch = sampled(models, config).sequences
    parts = passes(torch.arange(8), batch, models, config)
    assert sorted(torch.cat(parts).tolist()) == list(range(8)) and len(parts) > 2
    assert all(int(batch.lengths[rows].sum()) <= 18 for rows in parts)
    assert_same(step_of(config), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_a_row_above_the_budget_has_a_pass_of_its_own(packed):
    """And no pass but its own is larger than asked."""
    lengths = [5, 30, 4, 9, 10, 1, 11]
    parts = plan_passes(lengths, 10, packed)
    assert sorted(i for part in parts for i in part) == list(range(7)) and [1] in parts and [6] in parts
    held = [sum(lengths[i] for i in p) if packed else len(p) * max(lengths[i] for i in p) for p in parts]
    assert sorted(n for n in held if n > 10) == [11, 30]


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("pad", [2, 9, 0])
def test_what_stands_in_the_padding_changes_no_bit(tiny_model, pad, padding_free):
    """EOS, a word, the pad token: pad == eos is no special case."""
    config = ppo_config(tiny_model, entropy_coef=0.01, padding_free=padding_free)
    expected, loss, metrics = step_of(config)
    found, found_loss, found_metrics = step_of(config, pad)
    assert found_loss == loss and found_metrics == metrics
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def by_hand(models: Models, experience: Experience, config) -> float:
    """The loss in plain torch from transformers' own forwards: prompts padded on the left, a mask, position ids."""
    batch, total = experience.sequences, 0.0
    width, longest = int(batch.prompt_lengths.max()), batch.width
    ids = torch.zeros(8, width + longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(batch.prompt_lengths.tolist(), batch.response_lengths.tolist())):
        ids[row, width - prompt : width + response] = batch.ids[row, : prompt + response]
        mask[row, width - prompt : width + response] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    logits = models.policy.module(**inputs).logits[:, width - 1 : -1, : models.policy.vocab_size]
    every = torch.log_softmax(logits / config.temperature, -1)
    new = every.gather(2, ids[:, width:, None])[..., 0]
    entropy = -(every.exp() * every).sum(-1)
    hidden = models.value.module.base_model(**inputs).last_hidden_state
    values = models.value.module.score(hidden)[:, width - 1 : -1, 0]
    counted = batch.response_mask
    ratio, advantages = (new - experience.logprobs).exp(), experience.advantages
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    near = experience.values + (values - experience.values).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((values - experience.returns) ** 2, (near - experience.returns) ** 2)
    total = policy + config.vf_coef * value - config.entropy_coef * entropy
    return total[counted].sum() / counted.sum()


@pytest.mark.parametrize("padding_free", [True, False])
def test_prompts_padded_on_the_left_give_the_same_gradients(tiny_model, padding_free):
    config = ppo_config(tiny_model, entropy_coef=0.01, temperature=0.7, padding_free=padding_free)
    models = models_of(config)
    experience, _ = score(sampled(models, config), models, config)
    experience = far(with_advantages(experience, config, config.kl_coef))
    guard = KeepGradients(models)
    update(models, experience, torch.arange(8), guard, config, config.kl_coef)
    ours = [p.grad.clone() for m in models.modules.values() for p in m.parameters() if p.grad is not None]
    for module in models.modules.values():
        module.set_attn_implementation("sdpa")
        module.zero_grad(set_to_none=True)
    loss = by_hand(models, experience, config)
    loss.backward()
    theirs = [p.grad for m in models.modules.values() for p in m.parameters() if p.grad is not None]
    assert guard.loss == pytest.approx(loss.item(), rel=1e-5) and len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs):
        assert float((a - b).norm()) <= TOLERANCE * float(b.norm())


def test_the_content_of_prompts_changes_no_metric(tiny_model):
    """With attention cut out a token sees itself alone: then nothing but the last prompt token may matter."""

    def metrics(prompts: list[list[int]]) -> dict:
        config = ppo_config(tiny_model, reward=["rewards_for_tests:count_good"])
        models = models_of(config)
        with torch.no_grad():
            for module in (*models.modules.values(), models.reference.module):
                for layer in module.base_model.layers:
                    layer.self_attn.o_proj.weight.zero_()
        rollout = sampled(models, config, prompts)
        experience, parts = score(rollout, models, config)
        experience = with_advantages(experience, config, config.kl_coef)
        guard = KeepGradients(models)
        stats, _ = update(models, experience, torch.arange(8), guard, config, config.kl_coef)
        return summarize(rollout, experience, [(stats, torch.zeros(()))], config, config.kl_coef) | parts

    others = [[9, 2, 6], [7], [2, 2, 2, 2, 5], [6, 4], [0, 4], [4, 4, 4, 8], [9], [2, 0, 4]]
    expected = metrics(PROMPTS)
    assert metrics(others) == pytest.approx(expected, rel=1e-5, abs=1e-7) and expected["objective/kl"] != 0


def test_every_row_is_in_every_epoch_once(tiny_model):
    config = ppo_config(tiny_model, num_mini_batches=3, per_device_train_batch_size=8, num_ppo_epochs=2)
    rows = torch.cat(list(minibatches(config, 0))).reshape(2, 24)
    assert all(sorted(epoch.tolist()) == list(range(24)) for epoch in rows)
