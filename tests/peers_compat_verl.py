"""rlhf_kernels.compat.verl beside verl's own functions, called alike: masks with gaps, rows that count nothing, ratios
far outside of every clip. verl's function in float64 is the oracle."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from peers_compare import Values, case, compare, head
from torch import Tensor

from rlhf_kernels.compat import verl as compat

B, T = 6, 13


def tokens(*names: str, scale: float = 1.0) -> Values:
    torch.manual_seed(1)
    return {name: scale * torch.randn(B, T) for name in names}


def random_mask() -> Tensor:
    """Gaps within, tails, one row that counts nothing, one that counts a single token."""
    torch.manual_seed(2)
    mask = torch.rand(B, T) < 0.7
    mask[:, 9:] &= torch.arange(B)[:, None] % 2 == 0
    mask[3] = False
    mask[4] = torch.arange(T) == 5
    return mask.float()


def constants(like: Tensor, values: Values) -> Values:
    return {name: x.to(like.dtype) for name, x in values.items()}


def under(mask: Tensor, found: Values) -> Values:
    """What counts: verl leaves leftovers elsewhere."""
    return {name: torch.where(mask.bool(), x, 0) if x.shape == mask.shape else x for name, x in found.items()}


@case("compat-verl-logprobs-from-logits")
def logprobs_from_logits():
    from verl.utils import torch_functional as theirs

    inputs, ids = head(33, 16, 500)
    inputs = {"logits": inputs["hidden"] @ inputs["weight"].T}

    def called(module, logits) -> Values:
        return {"logprobs": module.logprobs_from_logits(logits, ids), "entropy": module.entropy_from_logits(logits)}

    return compare(inputs, partial(called, theirs), partial(called, compat), partial(called, theirs))


@case("compat-verl-entropy-with-chunking")
def entropy_with_chunking():
    from verl.utils import torch_functional as theirs

    inputs, _ = head(33, 16, 500)
    inputs = {"logits": inputs["hidden"] @ inputs["weight"].T}

    def called(module, logits) -> Values:
        return {"entropy": module.entropy_from_logits_with_chunking(logits, 7)}

    oracle = lambda logits: {"entropy": theirs.entropy_from_logits(logits)}  # noqa: E731
    return compare(inputs, oracle, partial(called, compat), partial(called, theirs))


@case("compat-verl-fused-linear-for-ppo", 1.0)
@case("compat-verl-fused-linear-for-ppo-temperature", 0.7)
def fused_linear(temperature):
    from verl.utils.experimental import torch_functional as theirs

    inputs, ids = head(34, 16, 300)
    inputs["hidden"] = inputs["hidden"].view(2, 17, 16)

    def called(module, hidden, weight) -> Values:
        layer = module.FusedLinearForPPO(chunk_size=8)
        return dict(zip(("logprobs", "entropy"), layer(hidden, weight, ids.view(2, 17), temperature)))

    def oracle(hidden, weight) -> Values:
        logp = (hidden @ weight.T / temperature).log_softmax(-1)
        picked = logp.gather(-1, ids.view(2, 17, 1))[..., 0]
        return {"logprobs": picked, "entropy": -(logp.exp() * logp).sum(-1)}

    return compare(inputs, oracle, partial(called, compat), partial(called, theirs))


@case("compat-verl-gae", 0.97, 0.9)
@case("compat-verl-gae-undiscounted", 1.0, 1.0)
def advantages(gamma, lam):
    from verl.trainer.ppo import core_algos as theirs

    mask, known = random_mask(), tokens("rewards", "values")

    def called(module, dummy) -> Values:
        rewards, values = constants(dummy, known).values()
        found = module.compute_gae_advantage_return(rewards, values, mask.to(dummy.dtype), gamma, lam)
        return under(mask, dict(zip(("advantages", "returns"), found))) | {"dummy": dummy}

    inputs = {"dummy": torch.ones(1)}  # nothing else has a gradient
    return compare(inputs, partial(called, theirs), partial(called, compat), partial(called, theirs))


@case("compat-verl-masked-whiten", True)
@case("compat-verl-masked-whiten-mean-kept", False)
def masked_whiten(shift_mean):
    from verl.utils import torch_functional as theirs

    mask, known = random_mask(), tokens("values")

    def called(module, dummy) -> Values:
        found = module.masked_whiten(constants(dummy, known)["values"], mask.to(dummy.dtype), shift_mean)
        return under(mask, {"whitened": found}) | {"dummy": dummy}

    inputs = {"dummy": torch.ones(1)}
    return compare(inputs, partial(called, theirs), partial(called, compat), partial(called, theirs))


TOTALS = {"dp_size": 4, "batch_num_tokens": 301, "global_batch_size": 48, "loss_scale_factor": 17}
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def for_every_mode(name: str):
    def register(function):
        for mode in MODES:
            for which, totals in (("local", {}), ("global", TOTALS)):
                case(f"{name}-{mode}-{which}", mode, totals)(function)
        return function

    return register


@for_every_mode("compat-verl-agg-loss")
def agg_loss(mode, totals):
    from verl.trainer.ppo import core_algos as theirs

    mask = random_mask()

    def called(module, losses) -> Values:
        return {"loss": module.agg_loss(losses, mask.to(losses.dtype), mode, **totals)}

    inputs = tokens("losses")
    return compare(inputs, partial(called, theirs), partial(called, compat), partial(called, theirs))


@for_every_mode("compat-verl-policy-loss")
def policy_loss(mode, totals):
    """Log-ratios of deviation 2, some beyond 20: dual clip and clamp act. With and without sampler's weights."""
    from verl.trainer.ppo import core_algos as theirs

    mask, known = random_mask(), tokens("old", "advantages", scale=2.0)
    inputs = {"new": known["old"] + 0.5 * tokens("d")["d"].flip(0)}
    mask[0, :3], known["advantages"][0, :3] = 1, torch.tensor([-1.0, 1.0, -0.5])
    inputs["new"][0, :3] = known["old"][0, :3] + torch.tensor([25.0, -25.0, 3.0])
    weights = tokens("w")["w"].abs() if totals else None

    class Config(SimpleNamespace):
        def get(self, name, default):
            return getattr(self, name, default)

    config = Config(clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=None, global_batch_info=totals)

    def called(module, new) -> Values:
        old, advantages = constants(new, known).values()
        of_sampler = None if weights is None else weights.to(new.dtype)
        arguments = (old, new, advantages, mask.to(new.dtype), mode, config, of_sampler)
        loss, metrics = module.compute_policy_loss_vanilla(*arguments)
        assert list(metrics) == ["actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"]
        assert all(type(x) is float for x in metrics.values())
        return {"loss": loss} | {name: torch.tensor(x, dtype=new.dtype) for name, x in metrics.items()}

    return compare(inputs, partial(called, theirs), partial(called, compat), partial(called, theirs))


@for_every_mode("compat-verl-value-loss")
def value_loss(mode, totals):
    from verl.trainer.ppo import core_algos as theirs

    mask, known = random_mask(), tokens("returns", "old")
    inputs = {"values": known["old"] + 0.4 * tokens("d")["d"].flip(0)}

    def called(module, values) -> Values:
        returns, old = constants(values, known).values()
        found = module.compute_value_loss(values, returns, old, mask.to(values.dtype), 0.2, mode, **totals)
        return dict(zip(("loss", "clip_fraction"), found))

    return compare(inputs, partial(called, theirs), partial(called, compat), partial(called, theirs))


def for_every_estimator(function):
    for name in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "abs+", "k2+", "k3+", "low_var_kl+"):
        case(f"compat-verl-kl-penalty-{name}", name)(function)
    return function


@for_every_estimator
def kl_penalty(name):
    from verl.trainer.ppo import core_algos as theirs

    inputs = tokens("new", "ref")
    inputs["new"][0, :4] += torch.tensor([25.0, -25.0, 3.0, -3.0])

    def called(module, new, ref) -> Values:
        return {"kl": module.kl_penalty(new, ref, name)}

    return compare(inputs, partial(called, theirs), partial(called, compat), partial(called, theirs))


@case("compat-verl-observations-change-nothing")
def observations():
    """Multi-turn: what the critic says of tokens that the model did not write changes no advantage and no return; with
    the patch on, through verl's own registry."""
    import rlhf_kernels

    with rlhf_kernels.patch("verl"):
        from verl.trainer.ppo import core_algos

        estimate, mask = core_algos.get_adv_estimator_fn("gae"), random_mask()
        assert estimate is compat.compute_gae_advantage_return
        assert core_algos.get_policy_loss_fn("vanilla") is compat.compute_policy_loss_vanilla
        rewards, values, other = tokens("rewards", "values", "other").values()
        first = estimate(rewards, values, mask, 0.9, 0.8)
        second = estimate(rewards, torch.where(mask.bool(), values, 100 * other), mask, 0.9, 0.8)
    assert all(torch.equal(a * mask, b * mask) for a, b in zip(first, second))
    theirs = core_algos.get_adv_estimator_fn("gae")
    assert theirs is not compat.compute_gae_advantage_return and theirs is core_algos.compute_gae_advantage_return
    whole = float((theirs(rewards, values, mask, 0.9, 0.8)[1] * mask - first[1]).abs().max())
    return {name: {"scale": 1.0, "ours": whole, "peer": 0.0} for name in ("returns", "again")}
