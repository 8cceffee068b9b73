"""A PPO step of the trainer beside TRL's PPOTrainer, on one rollout: what agrees, and each difference by its formula.

tests/peers_trl_ppo.py runs TRL's. On responses of one length the two agree but for TRL's unbiased deviation in
whitening. On others TRL has a step more: the score stands one position after the last token, and what the value model
says there is trained too. With that step given to our ops everything agrees, the gradients included.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peers_trl_ppo import ALL, CASES, EOS, OPTIONS, PAD, ROWS, WIDTH, WORDS, prompts, responses
from torch import Tensor

import rlhf_kernels
from rlhf.advantages import score, with_advantages
from rlhf.config import PPOConfig
from rlhf.forward import response_logprobs, sequence_scores
from rlhf.layout import Models, load_models
from rlhf.losses import ppo_losses
from rlhf.model import load_language_model
from rlhf.optim import StepGuard
from rlhf.ppo import summarize
from rlhf.types import Experience, PromptBatch, Rollout, pad_sequences

PYTHON = ROOT / ".venv-trl" / "bin" / "python"
pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON.relative_to(ROOT)}: `make peers` makes it"),
    pytest.mark.usefixtures("one_thread"),
]
SAME, DIFFERENT = 1e-5, 1e-3  # of the largest value, in fp32
PREFIXES = ("policy.", "value_model.")  # of the names of parameters in TRL


@pytest.fixture(scope="module")
def rig(tmp_path_factory) -> tuple[Path, dict]:  # the folder, and what TRL computed for each case
    folder = tmp_path_factory.mktemp("trl")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), str(ROOT / "tests" / "peers_trl_ppo.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, torch.load(folder / "trl.pt")


@dataclass(frozen=True)
class Both:
    """A case: what TRL computed, and the trainer on the same rollout."""

    trl: dict
    config: PPOConfig
    models: Models
    rollout: Rollout
    experience: Experience  # as the trainer makes it

    @property
    def mask(self) -> Tensor:  # (B, R)
        return self.rollout.sequences.response_mask

    @property
    def lengths(self) -> Tensor:  # (B,)
        return self.rollout.sequences.response_lengths

    @property
    def bessel(self) -> Tensor:  # (): TRL's whitened advantages over ours
        return (1 - 1 / self.lengths.sum()).sqrt()


@pytest.fixture
def both(rig):
    folder, found = rig

    def load(name: str, **changes) -> Both:
        full, options = ALL[name]
        paths = {"model_name_or_path": "policy", "value_model_path": "value", "reward_model_path": "reward"}
        paths = {field: str(folder / path) for field, path in paths.items()}
        general = {"dataset_name": "d", "output_dir": "o", "device": "cpu"}
        config = PPOConfig(**paths, **general, **OPTIONS | options | changes)
        models = replace(load_models(config), reference=load_language_model(str(folder / "reference"), config))
        rows = responses(full)
        ended, texts = torch.tensor([row[-1] == EOS for row in rows]), [""] * ROWS
        rollout = Rollout(pad_sequences(prompts(), rows, PAD), ended, PromptBatch(prompts(), texts, {}), texts, rows)
        scored, _ = score(rollout, models, config)
        return Both(found[name], config, models, rollout, with_advantages(scored, config, config.kl_coef))

    return load


def agree(ours: Tensor | float, trl: Tensor | float, name: str = "", scale: float | None = None) -> None:
    ours, trl = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, trl))
    error, scale = float((ours - trl).abs().max()), scale or float(trl.abs().max())
    assert ours.shape == trl.shape and scale > 0, name
    assert error <= SAME * scale, f"{name}: {error / scale:.1e} of {scale:.3g}"


def differ(ours: Tensor | float, trl: Tensor | float) -> None:
    ours, trl = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, trl))
    assert float((ours - trl).abs().max()) > DIFFERENT * float(trl.abs().max()), "the definitions no longer differ"


def steps_of_trl(case: Both) -> tuple[Tensor, Tensor]:
    """(values, mask), (B, R) each, with TRL's step after the last token where there is room for it."""
    with torch.no_grad():
        after = sequence_scores(case.models.value, case.rollout.sequences)
    at = torch.arange(WIDTH)
    return torch.where(at == case.lengths[:, None], after[:, None], case.experience.values), at <= case.lengths[:, None]


def shaped(case: Both, values: Tensor, mask: Tensor) -> rlhf_kernels.PPOAdvantages:
    """Rewards, returns and advantages before whitening, on this mask; rewards are whitened TRL's way, unbiased."""
    of, config = case.experience, case.config
    options = {name: getattr(config, name) for name in ("kl_coef", "kl_estimator", "gamma", "lam")}
    options = rlhf_kernels.AdvantageOptions(**options, whiten_advantages=False)
    made = rlhf_kernels.ppo_advantages(of.logprobs, of.ref_logprobs, values, of.scores, mask, options=options)
    if not config.whiten_rewards:
        return made
    rewards = rlhf_kernels.masked_whiten(made.rewards, mask, shift_mean=False, unbiased=True)
    advantages, returns = rlhf_kernels.gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    return made._replace(rewards=rewards, advantages=advantages, returns=returns)


def as_trl(case: Both) -> Experience:
    """The experience with TRL's step and its deviation."""
    made = shaped(case, *steps_of_trl(case))
    advantages = rlhf_kernels.masked_whiten(made.advantages, case.mask, unbiased=True)
    return replace(case.experience, advantages=advantages, returns=made.returns)


def at_step(case: Both, step: int) -> list[tuple[str, torch.nn.Parameter]]:
    """Gives policy and value model the weights that TRL had there, and returns them by TRL's names."""
    parameters = []
    for prefix, module in zip(PREFIXES, (case.models.policy.module, case.models.value.module)):
        weights = case.trl["steps"][step]["weights"].items()
        module.load_state_dict({name.removeprefix(prefix): w for name, w in weights if name.startswith(prefix)})
        module.zero_grad()
        parameters += [(prefix + name, p) for name, p in module.named_parameters()]
    assert len(parameters) == len(case.trl["steps"][step]["weights"])
    return parameters


def losses(case: Both, experience: Experience, step: int) -> tuple[rlhf_kernels.PPOStats, dict[str, Tensor]]:
    """Statistics and, by TRL's names, gradients of the loss, with the weights that TRL had at that step."""
    parameters = at_step(case, step)
    loss, stats = ppo_losses(case.models, experience, case.config, case.lengths.sum())
    loss.backward()
    return stats, {name: p.grad.clone() for name, p in parameters}


def value_loss_after(case: Both, returns: Tensor) -> Tensor:
    """The value loss of TRL's step after the last token, summed over the responses that have it."""
    rows = case.lengths < WIDTH
    at = case.lengths.clamp(max=WIDTH - 1)[:, None]
    now = sequence_scores(case.models.value, case.rollout.sequences)[rows]
    old, target = (x.gather(1, at)[rows, 0] for x in (case.trl["values"], returns))
    clipped = old + (now - old).clamp(-case.config.cliprange_value, case.config.cliprange_value)
    return 0.5 * torch.maximum((now - target) ** 2, (clipped - target) ** 2).sum()


# What agrees


@pytest.mark.parametrize("name", CASES)
def test_the_rollout_is_scored_alike(name, both):
    """TRL pads prompts on the left and the trainer on the right; the penalty for no EOS is taken off in both."""
    case = both(name)
    for field in ("logprobs", "ref_logprobs", "kl"):
        agree(getattr(case.experience, field), case.trl[field].masked_fill(~case.mask, 0), field)
    values, mask = steps_of_trl(case)
    agree(values * mask, case.trl["values"], "values")
    agree(case.experience.scores, case.trl["scores"], "scores")


@pytest.mark.parametrize("name", CASES)
def test_with_trls_step_rewards_advantages_and_returns_agree(name, both):
    case = both(name)
    values, mask = steps_of_trl(case)
    assert torch.equal(mask, ~case.trl["padding_mask_p1"]) and torch.equal(case.mask, ~case.trl["padding_mask"])
    made = shaped(case, values, mask)
    agree(made.rewards, case.trl["rewards"], "rewards")
    agree(made.returns, case.trl["returns"], "returns")
    agree(made.advantages, case.trl["whitened"][-1], "advantages before whitening")
    agree(as_trl(case).advantages, case.trl["advantages"], "advantages")


@pytest.mark.parametrize("name", CASES)
def test_with_trls_step_losses_and_gradients_agree(name, both):
    """In the first epoch, where all ratios are 1, and in the second, where both clips decide some of the losses."""
    case = both(name)
    experience, tokens, extra = as_trl(case), case.lengths.sum(), (case.lengths < WIDTH).sum()
    counted = tokens / (tokens + extra)  # of what TRL's value loss is the mean of
    for step, theirs in enumerate(case.trl["steps"]):
        stats, gradients = losses(case, experience, step)
        after = value_loss_after(case, experience.returns) / (tokens + extra)
        value_loss = stats.value_loss * counted + after.detach()
        agree(stats.policy_loss, theirs["pg_loss"], "policy loss", scale=1)  # a mean of advantages of deviation 1
        agree(value_loss, theirs["vf_loss"], "value loss")
        agree(stats.policy_loss + case.config.vf_coef * value_loss, theirs["loss"], "loss")
        value_parameters = dict(case.models.value.module.named_parameters(prefix="value_model"))
        of_after = torch.autograd.grad(case.config.vf_coef * after, list(value_parameters.values()))
        for parameter, gradient in zip(value_parameters, of_after):
            gradients[parameter] = gradients[parameter] * counted + gradient
        for parameter, gradient in gradients.items():
            agree(gradient, theirs["gradients"][parameter], f"step {step}: {parameter}")
    assert 0 < case.trl["statistics"]["pg_clipfrac"][1] < 1 and 0 < case.trl["statistics"]["vf_clipfrac"][1] < 1


@pytest.mark.parametrize("name", ["full", "full-k3", "ragged-undiscounted"])
def test_the_trainer_agrees_but_for_the_deviation(name, both):
    """TRL whitens by n - 1, the trainer by n, as lm-human-preferences: advantages, policy loss and its gradient are
    sqrt(1 - 1/n) of ours. Without discount, TRL's later score is no later to the tokens of ragged responses."""
    case = both(name)
    agree(case.experience.returns, case.trl["returns"] * case.mask, "returns")
    agree(case.experience.advantages * case.bessel, case.trl["advantages"], "advantages")
    differ(case.experience.advantages, case.trl["advantages"])
    for step, theirs in enumerate(case.trl["steps"]):
        stats, gradients = losses(case, case.experience, step)
        agree(stats.policy_loss * case.bessel, theirs["pg_loss"], "policy loss", scale=1)
        for parameter, gradient in gradients.items():
            if parameter.startswith("policy."):
                agree(gradient * case.bessel, theirs["gradients"][parameter], parameter)
            elif name.startswith("full"):
                agree(gradient, theirs["gradients"][parameter], parameter)
        (agree if name.startswith("full") else differ)(stats.value_loss, theirs["vf_loss"])


@pytest.mark.parametrize("name", ["full", "full-whitened-rewards"])
def test_on_one_length_the_metrics_agree(name, both):
    case = both(name)
    experience = as_trl(case)
    updates = [(losses(case, experience, step)[0], torch.zeros(())) for step in range(2)]
    ours, trl = summarize(case.rollout, experience, updates, case.config, case.config.kl_coef), case.trl["metrics"]
    assert set(trl) - set(ours) == {"eps", "val/ratio_var", "lr", "episode"}
    for metric in set(trl) & set(ours):
        agree(ours[metric], trl[metric], metric)


# What differs


def test_trl_whitens_rewards_by_its_deviation_too(both):
    case, of = both("full-whitened-rewards"), both("full-whitened-rewards").experience
    options = rlhf_kernels.AdvantageOptions(kl_coef=case.config.kl_coef, whiten_rewards=True)
    inputs = (of.logprobs, of.ref_logprobs, of.values, of.scores, case.mask)
    ours, trl = rlhf_kernels.ppo_advantages(*inputs, options=options).rewards, case.trl["rewards"]
    agree((ours - ours.mean()) * case.bessel + ours.mean(), trl, "rewards")
    differ(ours, trl)


@pytest.mark.parametrize("name", ["ragged", "ragged-k3"])
def test_trls_score_stands_after_the_last_token(name, both):
    """Ours stands on it: the last action ends the episode, and no value beyond it is asked for. The gap at the end is
    (gamma*lam - 1)*score + gamma*(1 - lam)*value after it, and shrinks by gamma*lam a token towards the start."""
    case = both(name)
    gamma, lam, lengths = case.config.gamma, case.config.lam, case.lengths
    rows, at = lengths < WIDTH, lengths.clamp(max=WIDTH - 1)[:, None]
    after = case.trl["values"].gather(1, at)[:, 0]
    gap = ((gamma * lam - 1) * case.trl["scores"] + gamma * (1 - lam) * after).where(rows, 0.0)
    behind = lengths[:, None] - 1 - torch.arange(WIDTH)
    ours = shaped(case, case.experience.values, case.mask).advantages
    trl = case.trl["whitened"][-1] * case.mask
    agree(ours + (gap[:, None] * (gamma * lam) ** behind) * case.mask, trl, "advantages")
    differ(ours, trl)
    agree(case.trl["scores"][rows], case.trl["rewards"].gather(1, at)[rows, 0], "rewards after the last token")


def test_trls_statistics_count_pads(both):
    """Entropy, approximate KL and ratio are means over the padded rectangle; ours are over tokens, so that they do not
    depend on the longest response. TRL's log-probabilities at pads are 1, ours 0."""
    case = both("ragged")
    assert (case.trl["logprobs"][~case.mask] == 1).all() and (case.experience.logprobs[~case.mask] == 0).all()
    step, trl = case.trl["steps"][1], {name: float(x[1]) for name, x in case.trl["statistics"].items()}
    stats = losses(case, as_trl(case), 1)[0].as_dict()
    tokens, places = stats["tokens"], case.mask.numel()
    entropy, counted = torch.distributions.Categorical(logits=step["logits"]).entropy(), case.mask[step["rows"]]
    agree(stats["entropy"], entropy[counted].mean(), "entropy of tokens")
    agree(entropy.mean(), trl["entropy"], "entropy")
    agree(stats["approx_kl"] * tokens / places, trl["approxkl"], "approxkl")
    agree((stats["ratio_mean"] * tokens + places - tokens) / places, trl["ratio"], "ratio")
    for ours, theirs in (("entropy", "entropy"), ("approx_kl", "approxkl"), ("ratio_mean", "ratio")):
        differ(stats[ours], trl[theirs])
    agree(stats["clip_fraction"], trl["pg_clipfrac"], "the policy's clip fraction, of tokens in both")


def test_trl_counts_every_eos_and_reports_the_estimator_it_trains_with(both):
    """Ours counts responses that ended; `objective/kl` is always k1, so that runs with other estimators compare."""
    case = both("ragged-k3")
    updates = [(losses(case, case.experience, 0)[0], torch.zeros(()))]
    ours = summarize(case.rollout, case.experience, updates, case.config, case.config.kl_coef)
    assert ours["val/num_eos_tokens"] == 6 and case.trl["metrics"]["val/num_eos_tokens"] == 7
    agree(case.experience.kl.sum(1).mean(), case.trl["metrics"]["objective/kl"], "k3")
    differ(ours["objective/kl"], case.trl["metrics"]["objective/kl"])
    for metric in ("objective/entropy", "objective/scores", "objective/non_score_reward", "objective/rlhf_reward"):
        agree(ours[metric], case.trl["metrics"][metric], metric)


def test_trl_averages_the_means_of_micro_batches(both):
    """Ours divides by the tokens of the whole minibatch: its gradient is that of one batch, in TRL too."""
    case, whole = both("accumulated"), both("ragged").trl
    experience, steps = as_trl(case), case.trl["steps"][:2]
    assert sorted(torch.cat([step["rows"] for step in steps]).tolist()) == list(range(ROWS))
    gradients = {}
    for kind in ("ours", "trl"):
        parameters = at_step(case, 0)
        for rows in (step["rows"] for step in steps):
            tokens = case.lengths.sum() if kind == "ours" else 2 * case.lengths[rows].sum()
            ppo_losses(case.models, experience.rows(rows), case.config, tokens)[0].backward()
        gradients[kind] = {n: p.grad.clone() for n, p in parameters if n.startswith("policy.")}
    for name, gradient in gradients["trl"].items():
        agree(gradient, steps[1]["gradients"][name], name)
        agree(gradients["ours"][name], whole["steps"][0]["gradients"][name], name)
    differ(gradients["ours"]["policy.lm_head.weight"], steps[1]["gradients"]["policy.lm_head.weight"])


def test_trl_does_not_accumulate_on_the_last_batch_of_a_pass(rig):
    """accelerate ends accumulation where its DataLoader ends, so TRL takes a step after every micro-batch, each with
    its share of the gradient; before the last batch it accumulates. Ours has one step a minibatch, wherever it is."""
    for name, steps_each in (("accumulated", False), ("accumulated-at-the-end-of-the-data", True)):
        first, second = rig[1][name]["steps"][:2]
        for parameter, weight in first["weights"].items():
            moved = OPTIONS["learning_rate"] * first["gradients"][parameter] * steps_each
            agree(weight - moved, second["weights"][parameter], parameter)
            assert torch.equal(weight, second["weights"][parameter]) is not steps_each, parameter


def test_trl_does_not_clip_gradients(both):
    """Its loop never reads max_grad_norm; ours clips each model's gradient to it."""

    def norm_of(tensors: dict[str, Tensor], prefix: str) -> float:
        return float(torch.nn.utils.get_total_norm([x for name, x in tensors.items() if name.startswith(prefix)]))

    case = both("full")
    parameters, rate = at_step(case, 0), case.config.learning_rate
    first, second = case.trl["steps"]
    for name, weight in first["weights"].items():
        agree(weight - rate * first["gradients"][name], second["weights"][name], name)
    modules = [case.models.policy.module, case.models.value.module]
    optimizer = torch.optim.SGD([p for _, p in parameters], lr=rate, fused=True)
    guard = StepGuard(optimizer, modules, case.config.max_grad_norm)
    ppo_losses(case.models, as_trl(case), case.config, case.lengths.sum())[0].backward()
    norms = [norm_of(first["gradients"], prefix) for prefix in PREFIXES]
    assert min(norms) > 2 * case.config.max_grad_norm
    assert float(guard.step(torch.zeros(()))) == pytest.approx(max(norms), rel=SAME)
    moved = {name: p.detach() - first["weights"][name] for name, p in parameters}
    for prefix in PREFIXES:
        assert norm_of(moved, prefix) == pytest.approx(rate * case.config.max_grad_norm, rel=DIFFERENT)


def test_trl_knows_padding_by_the_pad_id(both):
    """Where the pad token is the EOS token, its responses lose their EOS: no log-probability, and the score is read
    before it. Ours knows padding by lengths: ending is an action that is trained."""
    case = both("pad-is-eos")
    finished = case.rollout.finished
    without = case.lengths - finished.long()
    assert torch.equal(case.trl["padding_mask"], torch.arange(WIDTH) >= without[:, None])
    sequences = replace(case.rollout.sequences, response_lengths=without)
    penalty = case.config.missing_eos_penalty * ~finished
    with torch.no_grad():
        agree(sequence_scores(case.models.rewards[0].reader, sequences) - penalty, case.trl["scores"], "scores")
    differ(case.experience.scores, case.trl["scores"])


def test_trl_adds_1e_7_to_the_temperature(both):
    """Ours divides by the temperature as given. At usual ones 1e-7 is of the size of fp32's rounding."""
    ours, added = both("cold"), both("cold", temperature=1e-3 + 1e-7)
    for field in ("logprobs", "ref_logprobs"):
        theirs = ours.trl[field]
        agree(getattr(added.experience, field), theirs, field)
        gap = (getattr(ours.experience, field) - theirs).abs().max() / theirs.abs().max()
        assert float(gap) == pytest.approx(1e-4, rel=0.1)  # 1e-7 of 1e-3


def test_trl_gives_probability_to_ids_beyond_the_tokenizer(both):
    """Rows of an embedding that is larger than the tokenizer are no tokens: ours leaves them out of the softmax."""
    case, first = both("full"), both("full").trl["steps"][0]
    known = first["logits"].log_softmax(-1)[..., :WORDS].logsumexp(-1)
    with torch.no_grad():
        ours, _ = response_logprobs(
            replace(case.models.policy, vocab_size=WORDS), case.rollout.sequences, case.config.temperature
        )
    agree(ours[first["rows"]], first["new_logprobs"] - known, "logprobs")
    differ(ours[first["rows"]], first["new_logprobs"])


def test_trl_does_not_know_a_reward_models_normalisation(both):
    """`rlhf reward` keeps mean and deviation in config.json and every score is normalised by them; TRL reads it raw."""
    case = both("full")
    kept = case.models.rewards[0].reader.module.config
    kept.reward_mean, kept.reward_std = 0.5, 2.0
    penalty = case.config.missing_eos_penalty * ~case.rollout.finished
    scored, _ = score(case.rollout, case.models, case.config)
    agree(scored.scores + penalty, (case.trl["scores"] + penalty - 0.5) / 2, "scores")


def test_defaults_that_differ(rig):
    """AdamW's epsilon is that of OpenAI's PPO; a missing EOS costs 1, as in TRL's own examples."""
    ours, trl = PPOConfig.__dataclass_fields__, rig[1]["defaults"]
    fields = set(OPTIONS) | {"num_mini_batches", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"}
    differing = {name: (ours[name].default, trl[name]) for name in fields if ours[name].default != trl[name]}
    assert differing == {"missing_eos_penalty": (1.0, None), "adam_epsilon": (1e-5, 1e-8)}
