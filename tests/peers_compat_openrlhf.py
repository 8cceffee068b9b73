"""rlhf_kernels.compat.openrlhf beside OpenRLHF's own functions, called alike; OpenRLHF's in float64 is the oracle.

Its packages import flash_attn, deepspeed and vllm, which this environment does not have. openrlhf.models.loss and
.utils are imported without their package's __init__, with an empty module for deepspeed, which one function that is not
compared calls; RemoteExperienceMaker's method is compiled from its source.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from peers_compare import Values, case, compare, head
from peers_compat_verl import constants, random_mask, tokens, under

from rlhf_kernels.compat import openrlhf as compat


def folder() -> Path:
    return Path(importlib.util.find_spec("openrlhf").submodule_search_locations[0])


def theirs(name: str) -> ModuleType:  # loss or utils
    package = sys.modules.setdefault("openrlhf.models", ModuleType("openrlhf.models"))
    package.__path__ = [str(folder() / "models")]
    sys.modules["deepspeed"] = ModuleType("deepspeed")  # for the import alone: transformers asks whether it is there
    try:
        return importlib.import_module(f"openrlhf.models.{name}")
    finally:
        del sys.modules["deepspeed"]


def method(name: str):
    """A method of RemoteExperienceMaker as a function."""
    tree = ast.parse((folder() / "trainer/ppo_utils/experience_maker.py").read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    names: dict = {"torch": torch, "Tuple": tuple}
    exec(compile(ast.Module([found], []), name, "exec"), names)
    return names[name]


@case("compat-openrlhf-log-probs", 1.0)
@case("compat-openrlhf-log-probs-temperature", 0.6)
def log_probs(temperature):
    inputs, ids = head(34, 16, 500)
    inputs = {"logits": (inputs["hidden"] @ inputs["weight"].T).view(2, 17, 500)}

    def called(module, logits) -> Values:
        return {"logprobs": module.log_probs_from_logits(logits * 1.0, ids.view(2, 17), temperature)}

    return compare(inputs, partial(called, theirs("utils")), partial(called, compat), partial(called, theirs("utils")))


def for_every_estimator(function):
    for name in ("k1", "k2", "k3"):
        for unbiased in (False, True):
            for old in (False, True):
                case(f"compat-openrlhf-kl-{name}{'-unbiased' * unbiased}{'-old' * old}", name, unbiased, old)(function)
    return function


@for_every_estimator
def approx_kl(name, unbiased, with_old):
    known, inputs = tokens("base", "old"), tokens("new")
    inputs["new"][0, :6] += torch.tensor([25.0, -25.0, 12.0, -12.0, 3.0, -3.0])

    def called(module, new) -> Values:
        base, old = constants(new, known).values()
        return {"kl": module.compute_approx_kl(new, base, old if with_old else None, name, unbiased)}

    def oracle(new) -> Values:  # theirs rounds to float32
        base, old = constants(new, known).values()
        x = new - base
        value = {"k1": x, "k2": x**2 / 2, "k3": (-x.clamp(min=-10)).exp() - 1 + x.clamp(min=-10)}[name].clamp(-10, 10)
        if not unbiased:
            return {"kl": value}
        weight = (new - old).exp().clamp(max=10).detach() if with_old else 1.0
        surrogate = weight * x**2 / 2
        return {"kl": value.detach() + surrogate - surrogate.detach()}

    return compare(inputs, oracle, partial(called, compat), partial(called, theirs("utils")))


TOTALS = {"dp_size": 4, "batch_num_tokens": 301.0, "global_batch_size": 48.0}
CORRECTIONS = {
    "off": {},
    "token-mask": {"is_correction_level": "token", "is_correction_threshold": (0.7, 1.3)},
    "token-clip": {
        "is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.7, 1.3),
    },
    "seq-mask": {"is_correction_level": "seq", "is_correction_threshold": (0.85, 1.15)},
    "token-kl": {
        "is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.02),
    },
    "seq-kl": {
        "is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.05),
    },
    "token-tv": {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.1)},
    "seq-tv": {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.1)},
}  # fmt: skip


def for_every_policy_loss(function):
    for kind in ("ppo", "gspo"):
        for correction in CORRECTIONS if kind == "ppo" else ("off", "seq-mask"):
            for level in (True, False):
                for which, totals in (("local", {}), ("global", TOTALS)):
                    name = f"compat-openrlhf-{kind}-{correction}-{'token' if level else 'sample'}-{which}"
                    case(name, kind, correction, level, totals)(function)
    return function


@for_every_policy_loss
def policy_loss(kind, correction, token_level, totals):
    """The dual clip acts in every case. A row that counts nothing divides 0 by 0 in OpenRLHF's statistics of sequences:
    it counts one token here."""
    mask, known = random_mask(), tokens("old", "advantages", "d", "shift")
    mask[3, 2] = mask[0, 0] = 1
    known["old"] = -known["old"].abs()
    known["rollout"] = known["old"] + 0.4 * known.pop("shift")
    known["advantages"][0, 0] = -1.0
    inputs = {"new": known["old"] + (0.5 if kind == "ppo" else 2.0) * known.pop("d")}
    inputs["new"][0, 0] = known["old"][0, 0] + 25.0
    options = {"clip_eps_low": 0.1, "dual_clip": 2.5, "token_level_loss": token_level, "policy_loss_type": kind}

    def called(module, new) -> Values:
        old, advantages, rollout = constants(new, known).values()
        loss = module.PolicyLoss(**options, **CORRECTIONS[correction])
        found = loss(new, old, advantages, mask.to(new.dtype), rollout, **totals)
        names = ("loss", "clip_ratio", "ppo_kl", "vllm_kl", "filtered")
        return {name: x for name, x in zip(names, found) if x is not None}

    return compare(inputs, partial(called, theirs("loss")), partial(called, compat), partial(called, theirs("loss")))


@case("compat-openrlhf-value-loss-token-local", 0.2, True, {})
@case("compat-openrlhf-value-loss-token-global", 0.2, True, TOTALS)
@case("compat-openrlhf-value-loss-sample-local", 0.2, False, {})
@case("compat-openrlhf-value-loss-sample-global", None, False, TOTALS)
def value_loss(clip, token_level, totals):
    mask, known = random_mask(), tokens("old", "returns", "d")
    inputs = {"values": known["old"] + 0.4 * known.pop("d")}

    def called(module, values) -> Values:
        old, returns = constants(values, known).values()
        loss = module.ValueLoss(clip, token_level)
        return {"loss": loss(values, old, returns, mask.to(values.dtype), **totals)}

    return compare(inputs, partial(called, theirs("loss")), partial(called, compat), partial(called, theirs("loss")))


@case("compat-openrlhf-dpo", {"beta": 0.3})
@case("compat-openrlhf-dpo-smoothed", {"beta": 0.3, "label_smoothing": 0.2})
@case("compat-openrlhf-ipo", {"beta": 0.3, "ipo": True})
def dpo(options):
    torch.manual_seed(4)
    known = {name: -30 * torch.rand(9) for name in ("ref_chosen", "ref_rejected")}
    inputs = {name: -30 * torch.rand(9) for name in ("chosen", "rejected")}

    def called(module, chosen, rejected) -> Values:
        found = module.DPOLoss(**options)(chosen, rejected, *constants(chosen, known).values())
        assert not found[1].requires_grad
        return dict(zip(("loss", "chosen_rewards", "rejected_rewards"), found))

    return compare(inputs, partial(called, theirs("loss")), partial(called, compat), partial(called, theirs("loss")))


@case("compat-openrlhf-gae", 0.97, 0.9)
@case("compat-openrlhf-gae-undiscounted", 1.0, 1.0)
def advantages(gamma, lam):
    mask, known = random_mask(), tokens("values", "rewards")

    def called(function, dummy) -> Values:
        values, rewards = constants(dummy, known).values()
        found = function(None, values, rewards, mask.to(dummy.dtype), gamma, lam)
        return under(mask, dict(zip(("advantages", "returns"), found))) | {"dummy": dummy}

    peer = partial(called, method("get_advantages_and_returns"))
    ours = partial(called, compat.get_advantages_and_returns)
    return compare({"dummy": torch.ones(1)}, peer, ours, peer)
