"""Preference optimisation: each loss against its closed form, through the trainer; the same numbers however rows are
packed and split; what it learns."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from host_syncs import CountSyncs
from tiny_models import sentence, write_jsonl
from torch.nn.functional import logsigmoid

from rlhf import dpo
from rlhf.config import DPOConfig
from rlhf.config_dpo import OVER_THE_BATCH, REFERENCE_FREE, UNPAIRED
from rlhf.data import Dataset, load
from rlhf.dpo import Targets, loss_of_part, train, whole_pairs
from rlhf.log import Run
from rlhf.model import load_language_model
from rlhf.read import Source
from rlhf.reference import Reference, collate, completion_logps, load_policy, mismatched, prepare
from rlhf_kernels.ops import dpo_loss, kto_loss

pytestmark = pytest.mark.usefixtures("one_thread")
TYPES = (*dpo_loss.TYPES, *kto_loss.TYPES)
BETA, GAMMA, ALPHA, TAU, RPO, GOOD, BAD = 0.3, 0.7, 0.6, 0.5, 0.4, 1.5, 0.75
SETTINGS = {  # of a type, where the defaults are refused or say too little
    "exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.2}, "sigmoid": {"label_smoothing": 0.05},
    "aot": {"label_smoothing": 0.1}, "simpo": {"simpo_gamma": GAMMA}, "cpo": {"cpo_alpha": ALPHA},
    "discopop": {"discopop_tau": TAU}, "ipo": {"rpo_alpha": RPO},
    **{kind: {"desirable_weight": GOOD, "undesirable_weight": BAD} for kind in UNPAIRED},
}  # fmt: skip


@pytest.fixture(scope="module")
def policies(tmp_path_factory, tiny_model) -> tuple[str, str]:
    """(policy, reference): models of the tiny one's shape that are far from uniform and from each other; KTO's KL term
    is above 0 between them."""
    paths = []
    for seed, name in ((1, "policy"), (0, "reference")):
        model = load_language_model(tiny_model, DPOConfig(model_name_or_path="m", dataset_name="d", output_dir="o"))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        path = tmp_path_factory.mktemp("models") / name
        model.module.save_pretrained(path)
        model.tokenizer.save_pretrained(path)
        paths.append(str(path))
    return tuple(paths)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> dict[str, str]:
    """Prompts and completions of 1 to 8 words, as pairs and with labels."""
    pairs, labelled = [], []
    for i in range(16):
        prompt, texts = sentence(i, 1 + i % 5), [f" {sentence(7 * i + 3 * k, 1 + (3 * i + 5 * k) % 8)}" for k in (0, 1)]
        pairs.append({"prompt": prompt, "chosen": f"{texts[0]} good", "rejected": f"{texts[1]} bad"})
        labelled.append({"prompt": prompt, "completion": texts[i % 2], "label": i % 3 > 0})
    folder = tmp_path_factory.mktemp("data")
    rows = {"preference": pairs, "unpaired": labelled}
    return {form: write_jsonl(folder / f"{form}.jsonl", rows[form]) for form in rows}


def config_for(policies, ragged, folder, loss_type="sigmoid", **changes) -> DPOConfig:
    reference = {} if loss_type in REFERENCE_FREE else {"ref_model_name_or_path": policies[1]}
    base = {"model_name_or_path": policies[0], "output_dir": str(folder), "loss_type": loss_type, "max_length": 24}
    base |= {"dataset_name": ragged["unpaired" if loss_type in UNPAIRED else "preference"], "beta": BETA}
    base |= {"device": "cpu", "report_to": "none", "eval_fraction": 0.0, "max_steps": 1, **reference}
    return DPOConfig(**base | {"per_device_train_batch_size": 8} | changes)


# Closed forms


def logps_of(module, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Of (prompt, completion)s, one forward pass each, in the module's own dtype."""
    sums = []
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion])
        logp = torch.log_softmax(module(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(logp[len(prompt) - 1 :].sum())
    return torch.stack(sums)


def of_pairs(kind: str, pi, ref, n) -> torch.Tensor:  # (P,) from (2, P) each
    ls, s, b, e = logsigmoid, torch.sigmoid, BETA, SETTINGS.get(kind, {}).get("label_smoothing", 0.0)
    (c, j), (cn, jn), (pc, pj) = pi - ref, (pi - ref) / n, pi / n
    d = c - j
    smooth = lambda x: -(1 - e) * ls(x) - e * ls(-x)  # noqa: E731
    odds = lambda x: x - torch.log1p(-x.exp())  # noqa: E731
    g = s(b * d / TAU)
    return {
        "sigmoid": lambda: smooth(b * d),
        "hinge": lambda: torch.relu(1 - b * d),
        "ipo": lambda: (cn - jn - 1 / (2 * b)) ** 2,
        "robust": lambda: (-(1 - e) * ls(b * d) + e * ls(-b * d)) / (1 - 2 * e),
        "exo_pair": lambda: s(b * d) * (ls(b * d) - math.log(1 - e)) + s(-b * d) * (ls(-b * d) - math.log(e)),
        "nca_pair": lambda: -ls(b * c) - 0.5 * ls(-b * c) - 0.5 * ls(-b * j),
        "bco_pair": lambda: -ls(b * c) - ls(-b * j),
        "sppo_hard": lambda: (c - 1 / (2 * b)) ** 2 + (j + 1 / (2 * b)) ** 2,
        "aot": lambda: smooth(b * ((pi[0] - pi[1]).sort()[0] - (ref[0] - ref[1]).sort()[0])),
        "aot_unpaired": lambda: smooth(b * (c.sort()[0] - j.sort()[0])),
        "apo_zero": lambda: 1 - s(b * c) + s(b * j),
        "apo_down": lambda: s(b * c) + 1 - s(b * d),
        "discopop": lambda: (1 - g) * -ls(b * d) + g * (-b * d).exp(),
        "sigmoid_norm": lambda: -ls(b * (cn - jn)),
        "simpo": lambda: -ls(b * (pc - pj) - GAMMA),
        "cpo": lambda: -ls(b * (pi[0] - pi[1])),
        "orpo": lambda: -b * ls(odds(pc) - odds(pj)),
    }[kind]()


def closed_form(config: DPOConfig, module, reference, examples) -> tuple[torch.Tensor, dict[str, float]]:
    """(loss, rewards): of a whole step, by sequences."""
    kind = config.loss_type
    sequences = [(e.prompt, c) for c_of in zip(*(e.completions for e in examples)) for e, c in zip(examples, c_of)]
    pi, n = logps_of(module, sequences), torch.tensor([len(c) for _, c in sequences])
    ref = torch.zeros_like(pi) if kind in REFERENCE_FREE else logps_of(reference, sequences).detach()
    if kind in UNPAIRED:
        good, z = torch.tensor([e.columns["label"] for e in examples]), 0.0
        if kind == "kto":
            shifted = [(p, sequences[i - 1][1]) for i, (p, _) in enumerate(sequences)]
            z = float((logps_of(module, shifted) - logps_of(reference, shifted)).detach().mean())
            assert z > 0.1  # below 0 it would count as 0, whatever it is
        shortfall = 1 - torch.sigmoid(BETA * torch.where(good, pi - ref - z, z - (pi - ref)))
        means = [float(BETA * (pi - ref).detach()[at].mean()) for at in (good, ~good)]
        metrics = dict(zip(("rewards/chosen", "rewards/rejected"), means)) | ({"kl": z} if kind == "kto" else {})
        return (torch.where(good, GOOD, BAD) * shortfall).mean(), metrics
    pi, ref, n = (x.view(2, -1) for x in (pi, ref, n))
    nll = {"cpo": ALPHA, "orpo": 1.0}.get(kind, config.rpo_alpha or 0.0)
    loss = of_pairs(kind, pi, ref, n).mean() - nll * pi[0].sum() / n[0].sum()
    rewards = BETA * ((pi - ref) / (n if kind in ("simpo", "orpo") else 1)).detach()
    means = {"rewards/chosen": rewards[0].mean(), "rewards/rejected": rewards[1].mean()}
    means |= {"rewards/margins": (rewards[0] - rewards[1]).mean(), "logps/chosen": pi[0].mean()}
    means |= {"rewards/accuracies": (rewards[0] > rewards[1]).double().mean(), "logps/rejected": pi[1].mean()}
    return loss, {name: float(value.detach()) for name, value in means.items()}


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_is_its_closed_form(kind, policies, ragged, tmp_path):
    """Loss, gradient and metrics of a step of four micro-batches against float64 over single sequences.

    TRL#2332: the last token counts. TRL#1265: ipo compares means over tokens. TRL#2502: the NLL of orpo, cpo and RPO is
    of completions, not of prompts. TRL#5079: logged rewards are the policy's, whatever the type. ms-swift#10167: no
    type is another."""
    split = {} if kind in OVER_THE_BATCH else {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    config = config_for(policies, ragged, tmp_path, kind, **split, **SETTINGS.get(kind, {}))
    module, reference = (load_language_model(path, config).module.double() for path in policies)
    model = load_language_model(policies[0], config)
    examples = load(Source.of(config), model, config.form, config.max_length).window(0, 8, config.seed)
    expected, metrics = closed_form(config, module, reference, examples)
    expected.backward()
    found = train(config).metrics
    assert found["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in module.parameters()))
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert {name: found[name] for name in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    others = (other for other in dpo_loss.TYPES if kind not in UNPAIRED and other != kind)
    if kind not in UNPAIRED:
        pi, ref, n = (torch.randn(2, 5).double() - 4, torch.randn(2, 5).double() - 4, torch.randint(2, 9, (2, 5)))
        ours = of_pairs(kind, pi, ref, n).mean()
        assert all(abs(of_pairs(other, pi, ref, n).mean() - ours) > 1e-4 for other in others)


# The same numbers however rows are packed and split


def unfused(model):
    """The model, whose logits are formed."""
    other = replace(model)
    other.__dict__["head"] = replace(model.head, reason="a test")
    return other


def gradients(config: DPOConfig, fused=True) -> tuple[float, torch.Tensor]:
    """(loss, gradient) of one step."""
    policy, base = load_policy(config)
    data = load(Source.of(config), policy, config.form, config.max_length)
    windows = [(0, config.batch_size)]
    data, _, reference = prepare(config, base, data, Dataset((), {}), windows)
    policy = policy if fused else unfused(policy)
    examples = data.window(*windows[0], config.seed)
    batch, targets = collate(examples, policy), Targets.of(examples, policy, reference, reference.kl)
    total = 0.0
    for rows in whole_pairs(batch, config, policy.packed):
        loss, _ = loss_of_part(policy, batch.rows(rows), targets.rows(rows), config)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in policy.module.parameters()])


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "orpo", "kto"])
def test_packing_padding_and_micro_batches_change_nothing(kind, policies, ragged, tmp_path):
    """16 rows in passes of 1, 2, 8, 16 rows or 40 tokens, packed or padded, with the head fused or not."""
    ways = [{"per_device_train_batch_size": 16 // n, "gradient_accumulation_steps": n} for n in (1, 2, 8, 16)]
    ways.append(ways[0] | {"micro_batch_tokens": 40})
    more = SETTINGS.get(kind, {})
    expected = None
    for way in ways:
        for padding_free in (True, False):
            for fused in (True, False):
                config = config_for(policies, ragged, tmp_path, kind, padding_free=padding_free, **way, **more)
                loss, grad = gradients(config, fused)
                expected = (loss, grad) if expected is None else expected
                assert loss == pytest.approx(expected[0], rel=1e-5), (way, padding_free, fused)
                error = (grad - expected[1]).abs().max() / expected[1].abs().max()
                assert error < 1e-5, (way, padding_free, fused, float(error))


@pytest.mark.parametrize("packed", [False, True])
def test_a_pass_holds_whole_pairs_within_micro_batch_tokens(packed, policies, ragged):
    """Padding included, where there is some; a pair that is longer by itself has a pass of its own."""
    config = config_for(policies, ragged, "o", per_device_train_batch_size=16, micro_batch_tokens=60)
    policy = load_language_model(policies[0], config)
    batch = collate(load(Source.of(config), policy, "preference", 40).examples, policy)
    parts = [batch.rows(rows) for rows in whole_pairs(batch, config, packed)]
    sizes = [int(part.lengths.sum()) if packed else part.ids.numel() for part in parts]
    assert max(sizes) <= 60 and sum(sizes) / len(sizes) > 40 and sum(map(len, parts)) == len(batch) == 32
    for rows in whole_pairs(batch, config, packed):
        chosen, rejected = rows.chunk(2)
        assert torch.equal(chosen + 16, rejected)
    alone = whole_pairs(batch, replace(config, micro_batch_tokens=1), packed)
    assert max(map(len, alone)) <= 4 and sorted(torch.cat(alone).tolist()) == list(range(32))


@pytest.mark.parametrize("kind", ["ipo", "kto"])
def test_known_and_asked_references_agree_whatever_an_epoch_holds(kind, policies, ragged, tmp_path):
    """Half of one dataset and another twice, over three epochs in steps that end within them."""
    rows, names = ragged["unpaired" if kind == "kto" else "preference"], []
    with open(rows, encoding="utf-8") as file:
        lines = file.readlines()
    for name, part in (("a", lines[:10]), ("b", lines[10:])):
        names.append(str(tmp_path / f"{name}.jsonl"))
        (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    outcomes = []
    for known in (True, False):
        config = config_for(
            policies, ragged, tmp_path / str(known), kind, dataset_name=names, dataset_weights=[0.5, 2.0], max_steps=7,
            per_device_train_batch_size=7, eval_fraction=0.2, precompute_ref_log_probs=known, learning_rate=1e-3,
        )  # fmt: skip
        seen = []
        train(config, on_step=lambda step, policy, metrics, seen=seen: seen.append(metrics))
        assert seen[-1]["epoch"] > 3
        for metrics in seen:
            laps = [metrics[f"timing/{phase}"] for phase in ("reference", "gradient", "optimizer")]
            assert min(laps) > 0 and sum(laps) < metrics["timing/step"]
        kls = [metrics.get("kl", 1.0) for metrics in seen]
        assert sum(kl > 0 for kl in kls) > 2 and len(set(kls)) > 2 * (kind == "kto"), kls
        outcomes.append([m["loss"] for m in seen] + [seen[-1]["eval/loss"], seen[-1]["eval/rewards/margins"]])
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-5)


def test_rows_that_are_cut_to_nothing_or_empty(policies, ragged, tmp_path):
    """TRL#5662: a completion of no tokens adds log-probability 0, is counted, and makes no NaN; one that max_length
    cuts keeps half of the room."""
    for kind in ("sigmoid", "ipo", "orpo", "sigmoid_norm", "kto"):
        config = config_for(policies, ragged, tmp_path, kind, max_length=4, **SETTINGS.get(kind, {}))
        policy, reference = (load_language_model(path, config) for path in policies)
        data = load(Source.of(config), policy, config.form, config.max_length)
        assert data.notes["cut_completions"] and all(c for e in data.examples for c in e.completions)
        empty = replace(data.examples[0], completions=[[]] * len(data.examples[0].completions))
        examples = [empty, *data.examples[1:4]]
        batch, held = collate(examples, policy), Reference(config, {}, reference)
        targets = Targets.of(examples, policy, held)
        loss, stats = loss_of_part(policy, batch, targets, config)
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in policy.module.parameters()), kind
        counted = stats.chosen + stats.rejected if kind == "kto" else stats.pairs
        assert counted == 4 and not completion_logps(policy, [empty], config).any()


def test_a_step_of_one_completion_has_no_kl(policies, ragged, tmp_path):
    """KTO's estimate needs another completion: the last step of 16 rows in steps of 5 has one row."""
    config = config_for(policies[::-1], ragged, tmp_path, "kto", per_device_train_batch_size=5, max_steps=-1)
    seen = []
    train(config, on_step=lambda step, policy, metrics: seen.append(metrics))
    assert len(seen) == 4 and seen[-1]["kl"] == 0 and any(metrics["kl"] > 0 for metrics in seen[:-1])
    assert all(math.isfinite(value) for metrics in seen for value in metrics.values())


def test_mismatched_completions_stay_within_max_length(policies, ragged):
    config = config_for(policies, ragged, "o", "kto")
    policy = load_language_model(policies[0], config)
    examples = load(Source.of(config), policy, "unpaired", 8).examples[:5]
    others = mismatched(examples, 8)
    assert max(len(e.prompt) + len(e.completions[0]) for e in others) <= 8
    for before, example, other in zip([examples[-1], *examples], examples, others):
        kept = other.completions[0]
        assert kept == before.completions[0][: len(kept)] and other.prompt == example.prompt[-len(other.prompt) :]


@pytest.mark.parametrize("kind", ["sigmoid", "cpo", "kto"])
def test_it_learns_what_is_preferred(kind, tiny_model, pairs, labelled, tmp_path):
    rows = {"dataset_name": labelled if kind == "kto" else pairs, "model_name_or_path": tiny_model}
    config = DPOConfig(
        **rows, output_dir=str(tmp_path), loss_type=kind, max_length=16, num_train_epochs=4.0, learning_rate=3e-3,
        eval_fraction=0.25, device="cpu", report_to="none",
    )  # fmt: skip
    result = train(config)
    assert result.metrics["eval/rewards/margins"] > 0.2
    assert result.metrics["eval/rows"] == (10 if kind == "kto" else 8)
    assert kind == "kto" or result.metrics["eval/rewards/accuracies"] == 1.0
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx({"sigmoid": math.log(2), "kto": 0.5}.get(kind, first["loss"]), abs=1e-5)
    assert result.metrics["eval/loss"] < first["loss"]


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_adapters_alone_are_trained_and_written(kind, policies, ragged, tmp_path):
    """The reference is the model below the adapters, scored beforehand or asked at every step."""
    pytest.importorskip("peft")
    outcomes = []
    for known in (True, False):
        config = config_for(
            policies, ragged, tmp_path / str(known), kind, use_peft=True, lora_r=4, learning_rate=1e-2, max_steps=3,
            ref_model_name_or_path=None, precompute_ref_log_probs=known,
        )  # fmt: skip
        seen = []
        result = train(config, on_step=lambda step, policy, metrics, seen=seen: seen.append(metrics["loss"]))
        outcomes.append(seen)
        names = {path.name for path in result.final_dir.iterdir()}
        assert "adapter_config.json" in names and "model.safetensors" not in names
        again = load_language_model(str(result.final_dir), config)
        examples = load(Source.of(config), again, config.form, config.max_length).examples
        start = load_language_model(policies[0], config)
        assert (completion_logps(again, examples, config) - completion_logps(start, examples, config)).abs().max() > 0.1
    assert outcomes[0][0] == pytest.approx(0.5 if kind == "kto" else math.log(2), abs=1e-5)
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-5) and outcomes[0][-1] < outcomes[0][0]


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
@pytest.mark.parametrize("adapters", [False, True])
def test_computing_activations_again_gives_the_same_weights(kind, adapters, policies, ragged, tmp_path, monkeypatch):
    """In training passes alone, once more each: a reference and KTO's KL term take no gradient."""
    if adapters:
        pytest.importorskip("peft")
    weights, calls, load = [], [], dpo.load_policy

    def watched(config):
        policy, base = load(config)
        layer = policy.module.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        return policy, base

    monkeypatch.setattr(dpo, "load_policy", watched)
    counts = []
    for again in (False, True):
        changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
        changes |= {"use_peft": adapters, "gradient_checkpointing": again}
        run = config_for(policies, ragged, tmp_path / str(again), kind, **changes)
        train(run, on_step=lambda step, policy, _: weights.append([p.clone() for p in policy.module.parameters()]))
        counts.append((calls.count(True), calls.count(False)))
        calls.clear()
    assert counts[0][0] == 4 and counts[1] == (8, counts[0][1])
    assert all(torch.equal(a, b) for a, b in zip(weights[1], weights[3])) and len(weights[1]) > 10
    assert any(not torch.equal(a, b) for a, b in zip(weights[0], weights[1]))


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
@pytest.mark.parametrize("known", [False, True])
def test_weights_and_moments_in_bfloat16(kind, known, policies, ragged, tmp_path):
    """The reference is the policy as it starts, rounded: the first loss is that of two models that are one."""
    seen = []
    config = config_for(
        policies, ragged, tmp_path, kind, optim="adamw_bf16", learning_rate=1e-3, max_steps=8,
        ref_model_name_or_path=None, precompute_ref_log_probs=known,
    )  # fmt: skip
    result = train(config, on_step=lambda step, policy, metrics: seen.append((policy, metrics["loss"])))
    assert {p.dtype for p in seen[0][0].module.parameters()} == {torch.bfloat16}
    assert seen[0][1] == pytest.approx(0.5 if kind == "kto" else math.log(2), abs=1e-5) and seen[-1][1] < seen[0][1]
    assert load_language_model(str(result.final_dir), config).module.dtype == torch.float32


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_host_syncs_do_not_grow_with_micro_batches(kind, policies, ragged, tmp_path, monkeypatch):
    """Loss and norm, the statistics, the guard, and KTO's KL term."""
    counts, steps, load = [], Run.steps, dpo.load_policy
    for way in (1, 4):
        modes = []

        def watched(config, modes=modes):
            policy, base = load(config)
            assert policy.head.fused  # probed before the count
            modes.append(CountSyncs(policy.module))
            return policy, base

        def counted(run, modes=modes):
            for step in steps(run):
                with modes[0] if step == 1 else nullcontext():
                    yield step

        monkeypatch.setattr(dpo, "load_policy", watched)
        monkeypatch.setattr(Run, "steps", counted)
        split = {"per_device_train_batch_size": 8 // way, "gradient_accumulation_steps": way}
        train(config_for(policies, ragged, tmp_path / str(way), kind, max_steps=2, **split))
        counts.append(modes[0].places)
    assert [len(places) for places in counts] == [{"sigmoid": 3, "kto": 4}[kind]] * 2, counts
