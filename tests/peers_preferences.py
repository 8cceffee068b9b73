"""Preference losses beside Liger's chunked ones, kto_loss beside TRL's; where definitions differ, a case maps them."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peers_compare import Function, Values, case, compare, head, plain
from torch import Tensor

import rlhf_kernels

BETA, GAMMA, TAU, SMOOTHING, ALPHA, KL = 0.3, 0.5, 0.5, 0.1, 0.7, 0.2
PAIRS, LENGTH, WIDTH, VOCAB = 4, 9, 16, 127


def pairs(bias: bool = True) -> tuple[Values, Tensor, Values]:
    """(hidden, weight and bias, target (2B, T) with -100 where nothing counts, the reference's three)"""
    inputs, ids = head(2 * PAIRS * LENGTH, WIDTH, VOCAB, bias)
    reference = {name: x + 0.2 * torch.randn_like(x) for name, x in inputs.items()}
    for x in (inputs, reference):
        x["hidden"] = x["hidden"].view(2 * PAIRS, LENGTH, WIDTH)
    counted = torch.rand(2 * PAIRS, LENGTH) > 0.3
    counted[:, -2:] = True
    return inputs, ids.view(2 * PAIRS, LENGTH).where(counted, -100), reference


FORMULAS = {  # of a pair's log-ratios c and j; where lengths count, of means
    "sigmoid": lambda c, j: -F.logsigmoid(BETA * (c - j)),
    "hinge": lambda c, j: torch.relu(1 - BETA * (c - j)),
    "robust": lambda c, j: (
        (-(1 - SMOOTHING) * F.logsigmoid(BETA * (c - j)) + SMOOTHING * F.logsigmoid(BETA * (j - c)))
        / (1 - 2 * SMOOTHING)
    ),
    "exo_pair": lambda c, j: sum(
        torch.sigmoid(BETA * x) * (F.logsigmoid(BETA * x) - torch.tensor(p, dtype=x.dtype).log())
        for x, p in ((c - j, 1 - SMOOTHING), (j - c, SMOOTHING))
    ),
    "nca_pair": lambda c, j: -F.logsigmoid(BETA * c) - (F.logsigmoid(-BETA * c) + F.logsigmoid(-BETA * j)) / 2,
    "bco_pair": lambda c, j: -F.logsigmoid(BETA * c) - F.logsigmoid(-BETA * j),
    "sppo_hard": lambda c, j: (c - 1 / (2 * BETA)) ** 2 + (j + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda c, j: 1 - torch.sigmoid(BETA * c) + torch.sigmoid(BETA * j),
    "apo_down": lambda c, j: torch.sigmoid(BETA * c) + 1 - torch.sigmoid(BETA * (c - j)),
    "discopop": lambda c, j: (
        torch.sigmoid(BETA * (j - c) / TAU) * -F.logsigmoid(BETA * (c - j))
        + torch.sigmoid(BETA * (c - j) / TAU) * torch.exp(BETA * (j - c))
    ),
    "sigmoid_norm": lambda c, j: -F.logsigmoid(BETA * (c - j)),
    "cpo": lambda c, j: -F.logsigmoid(BETA * (c - j)),
    "simpo": lambda c, j: -F.logsigmoid(BETA * (c - j) - GAMMA),
    "orpo": lambda c, j: -BETA * F.logsigmoid(c - j - torch.log1p(-c.exp()) + torch.log1p(-j.exp())),
}
AVERAGED, REFERENCE_FREE = ("sigmoid_norm", "simpo", "orpo"), ("cpo", "simpo", "orpo")
NLL = {"cpo": ALPHA, "orpo": 1.0}  # its weight: the mean over the chosen tokens of the batch


def options_of(kind: str, **given):
    smoothing = SMOOTHING if kind in ("robust", "exo_pair") else 0.0
    values = {"beta": BETA, "loss_type": kind, "label_smoothing": smoothing, "simpo_gamma": GAMMA}
    return rlhf_kernels.DPOOptions(**values | {"cpo_alpha": ALPHA, "discopop_tau": TAU} | given)


def sums(hidden, weight, bias, target) -> Tensor:  # (2B,)
    return plain(hidden, weight, bias, ids=target)["logprobs"].sum(-1)


def nll(logps: Tensor, target: Tensor) -> Tensor:  # of the chosen half
    return -logps[:PAIRS].sum() / (target[:PAIRS] != -100).sum()


def preference_oracle(kind: str, target: Tensor, reference: Values) -> Function:
    def oracle(hidden, weight, bias):
        logps = sums(hidden, weight, bias, target)
        ref = 0 if kind in REFERENCE_FREE else sums(*(x.to(hidden.dtype) for x in reference.values()), target)
        ratios = (logps - ref) / ((target != -100).sum(-1) if kind in AVERAGED else 1)
        loss = FORMULAS[kind](*ratios.chunk(2)).mean() + NLL.get(kind, 0) * nll(logps, target)
        return {"loss": loss, "logps": logps.detach()}

    return oracle


def our_sums(hidden, weight, bias, target) -> Tensor:
    logprobs = rlhf_kernels.linear_token_logprobs(hidden, weight, target, bias=bias)
    return rlhf_kernels.sequence_logprobs(logprobs, target != -100)


def our_preference(kind: str, target: Tensor, reference: Values, **given) -> Function:
    ref = None if kind in REFERENCE_FREE else our_sums(*reference.values(), target)
    counted, options = target != -100, options_of(kind, **given)

    def ours(hidden, weight, bias):
        ids = target.where(counted, 0)
        loss, _, logps = rlhf_kernels.linear_dpo_loss(
            hidden, weight, ids, ref, mask=counted, bias=bias, options=options
        )
        return {"loss": loss, "logps": logps}

    return ours


def liger(module: str, target: Tensor, *rest, logps: bool, **options) -> Function:
    """Loss and, where Liger reports sums, log-probabilities of a chunked loss."""
    from liger_kernel import chunked_loss

    loss_module = getattr(chunked_loss, module)(compiled=False, **options)

    def peer(hidden, weight, bias):
        loss, (chosen, rejected, *_) = loss_module(weight, hidden, target, bias, *rest)
        return {"loss": loss} | ({"logps": torch.cat([chosen, rejected]).detach()} if logps else {})

    return peer


def liger_dpo(kind: str, chunk: int, target: Tensor, reference: Values, **given) -> Function:
    smoothing = SMOOTHING if kind in ("robust", "exo_pair") else 0.0
    options = {"beta": BETA, "loss_type": kind, "label_smoothing": smoothing, "discopop_tau": TAU, "chunk_size": chunk}
    return liger("LigerFusedLinearDPOLoss", target, *reference.values(), **{"logps": True} | options | given)


def chunked_dpo(kind, chunk):
    inputs, target, reference = pairs()
    oracle, ours = (make(kind, target, reference) for make in (preference_oracle, our_preference))
    return compare(inputs, oracle, ours, liger_dpo(kind, chunk, target, reference))


for kind in tuple(FORMULAS)[:10]:
    for chunk in (1, 3):
        case(f"liger-dpo-{kind}-chunk{chunk}", kind, chunk)(chunked_dpo)


@case("liger-dpo-average")
def dpo_average():
    """average_log_prob divides both log-ratios by the same counts: our sigmoid_norm, and not our sigmoid."""
    inputs, target, reference = pairs()
    oracle, ours = (make("sigmoid_norm", target, reference) for make in (preference_oracle, our_preference))
    peer = liger_dpo("sigmoid", 1, target, reference, average_log_prob=True, logps=False)
    return compare(inputs, oracle, ours, peer, our_preference("sigmoid", target, reference))


@case("liger-dpo-sigmoid-label-smoothing")
def dpo_smoothing():
    """Liger's sigmoid takes label_smoothing and ignores it, as TRL's does; ours is cDPO."""
    inputs, target, reference = pairs()
    oracle, ours = (make("sigmoid", target, reference) for make in (preference_oracle, our_preference))
    peer = liger_dpo("sigmoid", 1, target, reference, label_smoothing=SMOOTHING)
    return compare(inputs, oracle, ours, peer, our_preference("sigmoid", target, reference, label_smoothing=SMOOTHING))


@case("liger-cpo", 1)
@case("liger-cpo-chunk3", 3)
def cpo(chunk):
    """Liger averages the NLL over the chosen tokens, as we do given their counts; dpo_loss without counts averages it
    over sequences, as the paper has it."""

    inputs, target, reference = pairs()
    oracle, ours = (make("cpo", target, reference) for make in (preference_oracle, our_preference))

    def over_sequences(hidden, weight, bias):
        halves = our_sums(hidden, weight, bias, target).chunk(2)
        return {"loss": rlhf_kernels.dpo_loss(*halves, options=options_of("cpo"))[0]}

    peer = liger("LigerFusedLinearCPOLoss", target, beta=BETA, alpha=ALPHA, chunk_size=chunk, logps=True)
    return compare(inputs, oracle, ours, peer, over_sequences)


@case("liger-simpo", 1)
@case("liger-simpo-chunk3", 3)
def simpo(chunk):
    """gamma stands outside beta in both: TRL's ratio gamma/beta is ours divided by beta."""
    inputs, target, reference = pairs()
    oracle, ours = (make("simpo", target, reference) for make in (preference_oracle, our_preference))
    options = {"beta": BETA, "gamma": GAMMA, "compute_nll_loss": False, "chunk_size": chunk}
    return compare(inputs, oracle, ours, liger("LigerFusedLinearSimPOLoss", target, logps=False, **options))


@case("liger-simpo-with-nll")
def simpo_with_nll():
    """Liger's module adds alpha * NLL unless told otherwise; the paper's loss, and ours, has none."""
    inputs, target, reference = pairs()
    oracle, ours = (make("simpo", target, reference) for make in (preference_oracle, our_preference))
    peer = liger("LigerFusedLinearSimPOLoss", target, beta=BETA, alpha=ALPHA, gamma=GAMMA, logps=False)

    def with_nll(loss, total):
        return lambda **x: {"loss": loss(**x)["loss"] + ALPHA * nll(total(**x, target=target), target)}

    return compare(inputs, with_nll(oracle, sums), with_nll(ours, our_sums), peer, ours)


@case("liger-orpo", 1)
@case("liger-orpo-chunk3", 3)
def orpo(chunk):
    """beta weighs the odds ratio and the NLL has weight 1 in both."""
    inputs, target, reference = pairs()
    oracle, ours = (make("orpo", target, reference) for make in (preference_oracle, our_preference))
    return compare(
        inputs, oracle, ours, liger("LigerFusedLinearORPOLoss", target, beta=BETA, chunk_size=chunk, logps=False)
    )


@case("liger-orpo-nll-of-prompts")
def orpo_nll_of_prompts():
    """nll_target lets the NLL count prompts, too; ours counts completions, so the two terms are exchanged here."""
    inputs, target, reference = pairs()
    oracle, ours = (make("orpo", target, reference) for make in (preference_oracle, our_preference))
    whole = target.where(target != -100, 7)

    def exchanged(loss, total):
        def function(**x):
            terms = [nll(total(**x, target=t), t) for t in (whole, target)]
            return {"loss": loss(**x)["loss"] + terms[0] - terms[1]}

        return function

    peer = liger("LigerFusedLinearORPOLoss", target, whole, beta=BETA, logps=False)
    return compare(inputs, exchanged(oracle, sums), exchanged(ours, our_sums), peer, ours)


LABELS = torch.tensor([True, False, False, True, True, False, True, False])
GOOD, BAD = 1.5, 0.75  # weights of desirable and undesirable completions


def kto_oracle(ratios: Tensor, kl: Tensor | float, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    gains = BETA * (ratios - kl)
    shortfall = torch.where(LABELS, weights[0] * torch.sigmoid(-gains), weights[1] * torch.sigmoid(gains))
    return shortfall.mean()


@case("liger-kto")
def kto():
    """Liger takes the KL estimate and no weights."""
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    inputs, target, reference = pairs()
    module = LigerFusedLinearKTOLoss(beta=BETA, compiled=False, use_ref_model=True)

    def oracle(hidden, weight, bias):
        ref = sums(*(x.to(hidden.dtype) for x in reference.values()), target)
        return {"loss": kto_oracle(sums(hidden, weight, bias, target) - ref, KL)}

    def ours(hidden, weight, bias):
        logps, ref = our_sums(hidden, weight, bias, target), our_sums(*reference.values(), target)
        return {"loss": rlhf_kernels.kto_loss(logps, ref, LABELS, KL, beta=BETA)[0]}

    def peer(hidden, weight, bias):
        return {"loss": module(hidden, weight, target, bias, LABELS, *reference.values(), torch.tensor(KL))[0]}

    return compare(inputs, oracle, ours, peer)


@case("trl-kto", "kto", 0.4)
@case("trl-kto-below-the-reference", "kto", -0.4)
@case("trl-apo-zero-unpaired", "apo_zero_unpaired", 0.4)
def trl_kto(kind, shift):
    """KTOTrainer's own `_compute_loss`, whose model gives log-probabilities that are known; ours takes the mean
    log-ratio of the mismatched completions."""
    torch.manual_seed(0)
    count = len(LABELS)
    inputs = {"logps": -10 - 5 * torch.rand(count)}
    ref, mismatched = -11 - 4 * torch.rand(count), -20 - 3 * torch.rand(count)
    ref_mismatched = mismatched - shift - 0.3 * torch.randn(count)
    kl = (mismatched - ref_mismatched).mean()

    def oracle(logps):
        z = kl.clamp(min=0) if kind == "kto" else 0.0
        return {"loss": kto_oracle(logps - ref, z, (GOOD, BAD))}

    def ours(logps):
        weights = {"desirable_weight": GOOD, "undesirable_weight": BAD}
        estimate = kl if kind == "kto" else None
        return {"loss": rlhf_kernels.kto_loss(logps, ref, LABELS, estimate, beta=BETA, loss_type=kind, **weights)[0]}

    def peer(logps):
        return {"loss": trl_kto_loss(kind, logps, mismatched, ref, ref_mismatched)}

    return compare(inputs, oracle, ours, peer)


def trl_kto_loss(kind: str, logps: Tensor, mismatched: Tensor, ref: Tensor, ref_mismatched: Tensor) -> Tensor:
    """KTOTrainer's loss of completions of one token after a prompt of one, by a model that answers these numbers."""
    from trl import KTOTrainer

    def model(labels, **_):
        zeros = torch.zeros(len(labels), 1)
        return SimpleNamespace(log_probs=logps[:, None], entropy=zeros, mean_logits=zeros)

    model.training = True
    gathered = lambda x: x  # noqa: E731
    trainer = SimpleNamespace(
        model=model, accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=gathered),
        aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=kind == "kto", loss_type=kind, beta=BETA,
        desirable_weight=GOOD, undesirable_weight=BAD, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1, _compute_kl_logps=lambda model, batch: mismatched if kind == "kto" else None,
    )  # fmt: skip
    ids = torch.zeros(len(LABELS), 2, dtype=torch.long)
    completion = torch.tensor([[0, 1]]).expand_as(ids)
    inputs = {"label": LABELS, "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    inputs |= {"ref_logps": ref, "ref_KL_logps": ref_mismatched}
    return KTOTrainer._compute_loss(trainer, model, inputs, False)


def pair_losses(kind):
    """dpo_loss on log-probabilities, beside the functions that Liger's chunks call."""
    from liger_kernel import chunked_loss

    torch.manual_seed(0)
    inputs = {"chosen": -10 - 5 * torch.rand(PAIRS), "rejected": -12 - 5 * torch.rand(PAIRS)}
    refs = [-11 - 4 * torch.rand(PAIRS) for _ in range(2)]
    lengths = [torch.tensor(x) for x in ([3, 5, 8, 2], [6, 4, 7, 9])]
    ones, full_target = [torch.ones(PAIRS)] * 2, torch.zeros(2 * PAIRS, 1)
    divisors = lengths if kind in AVERAGED else ones
    name = {"cpo": "CPO", "simpo": "SimPO", "orpo": "ORPO"}.get(kind, "DPO")
    function = getattr(chunked_loss, f"LigerFusedLinear{name}Loss").forward.__globals__[
        f"LigerFusedLinear{name}Function"
    ]
    options = {"beta": BETA} | ({"gamma": GAMMA} if kind == "simpo" else {})
    if name == "DPO":
        smoothing = SMOOTHING if kind in ("robust", "exo_pair") else 0.0
        options |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), refs)) | {"loss_type": kind}
        options |= {"discopop_tau": TAU, "label_smoothing": smoothing}

    def ratios(chosen, rejected):
        ref = (0, 0) if kind in REFERENCE_FREE else (r.to(chosen.dtype) for r in refs)
        return ((x - r) / n for x, r, n in zip((chosen, rejected), ref, divisors))

    def oracle(chosen, rejected):
        penalty = -chosen.sum() / lengths[0].sum() if kind == "orpo" else 0
        return {"loss": FORMULAS[kind](*ratios(chosen, rejected)).mean() + penalty}

    def ours(chosen, rejected):
        ref = () if kind in REFERENCE_FREE else refs
        counts = dict(zip(("chosen_lengths", "rejected_lengths"), lengths))
        loss, _ = rlhf_kernels.dpo_loss(chosen, rejected, *ref, **counts, options=options_of(kind, cpo_alpha=0.0))
        return {"loss": loss}

    def peer(chosen, rejected):
        loss = function.preference_loss_fn(chosen / divisors[0], rejected / divisors[1], full_target, **options)[0]
        return {"loss": loss - chosen.sum() / lengths[0].sum() if kind == "orpo" else loss}

    return compare(inputs, oracle, ours, peer)


for kind in FORMULAS:
    if kind != "sigmoid_norm":
        case(f"liger-pairs-{kind}", kind)(pair_losses)
