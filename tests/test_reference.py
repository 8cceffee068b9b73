"""The reference's log-probabilities: scored once, kept in a file, never of weights that were trained."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_checkpoint import interrupt_at, outcome, terminate
from tiny_models import write_jsonl

from rlhf import dpo, reference
from rlhf.checkpoint import CheckpointError
from rlhf.config import DPOConfig, UsageError
from rlhf.data import load, plan
from rlhf.model import ModelError, load_language_model
from rlhf.read import DataError, Source
from rlhf.reference import COLUMNS, completion_logps, fingerprint_of, load_policy, prepare, remember
from rlhf.store import Examples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tiny_model, pairs, tmp_path) -> DPOConfig:
    return DPOConfig(
        model_name_or_path=tiny_model,
        dataset_name=pairs,
        output_dir=str(tmp_path / "run"),
        max_length=16,
        learning_rate=3e-3,
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        device="cpu",
        report_to="none",
    )


@pytest.fixture
def scored(monkeypatch) -> list:
    """The files' contents that were computed rather than read."""
    found, score = [], reference._score
    monkeypatch.setattr(reference, "_score", lambda *arguments: found.append(score(*arguments)) or found[-1])
    return found


def losses(config: DPOConfig, **changes) -> list[float]:
    seen = []
    dpo.train(replace(config, **changes), on_step=lambda step, policy, metrics: seen.append(metrics["loss"]))
    return seen


def files(folder) -> list:
    return sorted(folder.glob("reference-*.safetensors"))


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_a_resumed_run_never_asks_the_trained_policy(config, labelled, tmp_path, scored, kind):
    """Not even where the file has gone: the initial weights are asked, before the checkpoint's are there."""
    rows = {"dataset_name": [labelled]} if kind == "kto" else {}
    config = replace(config, loss_type=kind, **rows)
    dpo.train(replace(config, output_dir=str(tmp_path / "whole")))
    for remove in (False, True):
        run = replace(config, output_dir=str(tmp_path / f"run{remove}"))
        with pytest.raises(SystemExit):
            dpo.train(run, on_step=interrupt_at(3, terminate))
        (file,) = files(tmp_path / f"run{remove}")
        if remove:
            file.unlink()
        count = len(scored)
        dpo.train(replace(run, resume="auto"))
        assert len(scored) - count == remove
        assert outcome(tmp_path / f"run{remove}") == outcome(tmp_path / "whole")
    assert all(torch.equal(found[name], scored[0][name]) for found in scored for name in found)


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_a_resumed_stream_asks_the_initial_weights(config, labelled, tmp_path, scored, kind):
    """A stream cannot be scored beforehand: the reference is a copy of the policy, made before the checkpoint is read.
    The rows are read more than twice."""
    rows = {"dataset_name": [labelled]} if kind == "kto" else {}
    more = {"dataset_streaming": True, "precompute_ref_log_probs": False, "eval_fraction": 0.0, "max_steps": 12}
    config = replace(config, loss_type=kind, **rows, **more)
    seen = losses(config, output_dir=str(tmp_path / "whole"))
    assert seen[0] == pytest.approx(0.5 if kind == "kto" else 0.6931472, abs=1e-6) and seen[-1] < seen[0] - 0.03
    with pytest.raises(SystemExit):
        dpo.train(config, on_step=interrupt_at(3, terminate))
    dpo.train(replace(config, resume="auto"))
    assert outcome(Path(config.output_dir)) == outcome(tmp_path / "whole") and not scored


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "foreign"])
def test_a_damaged_file_is_computed_again(config, tmp_path, scored, capsys, damage):
    folder = str(tmp_path / "cache")
    first = losses(config, ref_logps_cache_dir=folder)
    (file,) = files(tmp_path / "cache")
    whole = bytearray(file.read_bytes())
    if damage == "bit":
        whole[-3] ^= 1
    other = remember(tmp_path / "other", "another key", lambda: {"data": torch.zeros(2, 29)})
    foreign = files(tmp_path / "other")[0].read_bytes()
    file.write_bytes({"cut": whole[:-8], "bit": whole, "empty": b"", "foreign": foreign}[damage])
    assert losses(config, ref_logps_cache_dir=folder, output_dir=str(tmp_path / "b")) == first
    assert len(scored) == 2 and f"{file}: damaged" in capsys.readouterr().err and other["data"].shape == (2, 29)
    assert losses(config, ref_logps_cache_dir=folder, output_dir=str(tmp_path / "c")) == first
    assert len(scored) == 2 and [path.name for path in (tmp_path / "cache").iterdir()] == [file.name]


def test_a_shared_file_serves_every_run_that_it_fits(config, tmp_path, scored, tiny_model):
    """Another loss of pairs, rate or place of the weights reads it; other weights, rows or lengths do not."""
    cache = {"ref_logps_cache_dir": str(tmp_path / "cache")}
    copied, changed = tmp_path / "copied", tmp_path / "changed"
    model = load_language_model(tiny_model, config)
    for folder in (copied, changed):
        model.module.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        with torch.no_grad():
            next(model.module.parameters())[0] += 0.5
    runs = [{}, {"loss_type": "hinge"}, {"learning_rate": 1e-4}, {"ref_model_name_or_path": str(copied)}]
    for i, changes in enumerate(runs):
        losses(config, output_dir=str(tmp_path / f"same{i}"), **cache, **changes)
    assert len(scored) == 1
    for i, changes in enumerate([{"ref_model_name_or_path": str(changed)}, {"max_length": 4}, {"seed": 2}]):
        losses(config, output_dir=str(tmp_path / f"other{i}"), **cache, **changes)
    assert len(scored) == 4  # another seed holds out other rows


def test_other_weights_of_datasets_pair_completions_anew(config, labelled, tmp_path, scored):
    """The same rows and steps; KTO's mismatched completions are others."""
    lines = Path(labelled).read_text(encoding="utf-8").splitlines(keepends=True)
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for name, half in zip(names, (lines[:20], lines[20:])):
        Path(name).write_text("".join(half), encoding="utf-8")
    config = replace(config, loss_type="kto", dataset_name=names, ref_logps_cache_dir=str(tmp_path / "cache"))
    for i, weights in enumerate(([1.0, 2.0], [2.0, 1.0], [1.0, 2.0])):
        losses(config, output_dir=str(tmp_path / str(i)), dataset_weights=weights)
    assert len(scored) == 2 and torch.equal(scored[0]["data"], scored[1]["data"])
    assert not torch.equal(scored[0]["kl"], scored[1]["kl"])


def test_a_larger_tokenizer_is_another_reference(config, tiny_model, tmp_path, scored):
    """Logits are cut to the ids that the tokenizer knows: one more in the same weights changes every probability."""
    model = load_language_model(tiny_model, config)
    model.module.resize_token_embeddings(model.vocab_size + 8, mean_resizing=False)
    for name in ("a", "b"):
        model.module.save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
        model.tokenizer.add_tokens(["another"])
        run = {"model_name_or_path": str(tmp_path / name), "output_dir": str(tmp_path / f"run-{name}")}
        first = losses(config, **run, max_steps=1, ref_logps_cache_dir=str(tmp_path / "cache"))
        assert first == pytest.approx([0.6931472], abs=1e-6)
    assert len(scored) == 2


def test_a_file_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / f"reference-{'k' * 16}.safetensors" / "in the way").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"^ref_logps_cache_dir: cannot be written: "):
        remember(tmp_path, "k" * 64, lambda: {"data": torch.zeros(2, 3)})
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_refused_before_the_scoring(config, pairs, scored):
    with pytest.raises(UsageError, match=r"ref_logps_cache_dir: cannot be made: .*File exists"):
        losses(config, ref_logps_cache_dir=pairs)
    assert not scored


def test_scored_rows_stay_in_flat_arrays(config):
    policy, base = load_policy(config)
    rows = load(Source.of(config), policy, config.form, config.max_length)
    data, held_out = rows.split(config.eval_fraction, config.seed)
    for part in prepare(config, base, data, held_out, plan(len(data), config.batch_size, 1.0, -1))[:2]:
        assert isinstance(part.examples, Examples) and part.examples[0].columns["ref_chosen_logps"] < 0


def test_columns_live_and_precomputed_agree(config, tiny_model, pairs, tmp_path, scored):
    """TRL's columns of rows are the reference where all rows have them."""
    known = losses(config, output_dir=str(tmp_path / "known"))
    live = losses(config, output_dir=str(tmp_path / "live"), precompute_ref_log_probs=False)
    model = load_language_model(tiny_model, config)
    data = load(Source((pairs,)), model, "preference", 16)
    sums = completion_logps(model, data.examples, config).t().tolist()
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    with_columns = [row | dict(zip(COLUMNS["preference"], pair)) for row, pair in zip(rows, sums)]
    there = {"dataset_name": [write_jsonl(tmp_path / "rows.jsonl", with_columns)]}
    columns = losses(config, output_dir=str(tmp_path / "columns"), **there)
    assert live == pytest.approx(known, rel=1e-6) and columns == pytest.approx(known, rel=1e-6)
    assert len(scored) == 1 and known[0] == pytest.approx(0.6931472, abs=1e-6) and known[-1] < 0.6
    shifted = [row | {"ref_chosen_logps": row["ref_chosen_logps"] + 1} for row in with_columns]
    there = {"dataset_name": [write_jsonl(tmp_path / "shifted.jsonl", shifted)]}
    assert losses(config, output_dir=str(tmp_path / "shifted"), **there)[0] > 0.72
    asked = losses(config, output_dir=str(tmp_path / "asked"), **there, precompute_ref_log_probs=False)
    assert asked == pytest.approx(known, rel=1e-6)  # the way past them
    some = {"dataset_name": [write_jsonl(tmp_path / "some.jsonl", [*with_columns[:-1], rows[-1]])]}
    assert losses(config, output_dir=str(tmp_path / "some"), **some) == pytest.approx(known, rel=1e-6)
    assert len(scored) == 2
    with pytest.raises(DataError, match="ref_model_name_or_path: expected null, as every row has ref_chosen_logps"):
        losses(config, output_dir=str(tmp_path / "both"), **there, ref_model_name_or_path=tiny_model)
    with pytest.raises(DataError, match=r"max_length: expected no row longer than 6 tokens, as ref_chosen_logps"):
        losses(config, output_dir=str(tmp_path / "cut"), **there, max_length=6)
    words = [row | {"ref_chosen_logps": "-3"} for row in with_columns]
    there = {"dataset_name": [write_jsonl(tmp_path / "words.jsonl", words)]}
    with pytest.raises(DataError, match="ref_rejected_logps: expected log-probabilities, got '-3'"):
        losses(config, output_dir=str(tmp_path / "words"), **there)


@pytest.mark.parametrize("other", [False, True])
def test_one_model_is_in_memory(config, tiny_model, other):
    """A reference of its own is let go when it has scored the data; asked at every step it stays."""

    def models() -> int:
        gc.collect()
        return sum(type(found).__name__ == "LlamaForCausalLM" for found in gc.get_objects())

    before, seen = models(), []
    config = replace(config, max_steps=1, ref_model_name_or_path=tiny_model if other else None)
    for folder, known in (("a", True), ("b", False)):
        run = replace(config, output_dir=f"{config.output_dir}-{folder}", precompute_ref_log_probs=known)
        dpo.train(run, on_step=lambda *_: seen.append(models() - before))
    assert seen == [1, 2]


def test_dropout_is_off(config, tiny_model, tmp_path):
    """verl#4708: a reference or a policy in train mode would not begin at log 2."""
    model = load_language_model(tiny_model, config)
    model.module.config.attention_dropout = 0.9
    model.module.save_pretrained(tmp_path / "dropout")
    model.tokenizer.save_pretrained(tmp_path / "dropout")
    for known in (True, False):
        run = {"model_name_or_path": str(tmp_path / "dropout"), "precompute_ref_log_probs": known}
        first = losses(config, **run, max_steps=1, output_dir=str(tmp_path / str(known)))
        assert first == pytest.approx([0.6931472], abs=1e-6)


def test_a_run_goes_on_with_its_own_reference_alone(config, tiny_model, tmp_path):
    model = load_language_model(tiny_model, config)
    model.module.save_pretrained(tmp_path / "ref")
    model.tokenizer.save_pretrained(tmp_path / "ref")
    config = replace(config, ref_model_name_or_path=str(tmp_path / "ref"))
    with pytest.raises(SystemExit):
        dpo.train(config, on_step=interrupt_at(3, terminate))
    with torch.no_grad():
        next(model.module.parameters()).mul_(1.5)
    model.module.save_pretrained(tmp_path / "ref")
    with pytest.raises(CheckpointError, match=r"reference was .* and is now"):
        dpo.train(replace(config, resume="auto"))


def test_a_reference_of_another_vocabulary_is_refused(config, tmp_path):
    from rlhf.config import InitConfig
    from rlhf.init import init

    (tmp_path / "text.txt").write_text("other words altogether " * 3)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    folder = str(tmp_path / "other")
    init(InitConfig(dataset_name=str(tmp_path / "text.txt"), output_dir=folder, tokenizer="word", **sizes))
    with pytest.raises(ModelError, match=r"ref_model_name_or_path: .* has another vocabulary"):
        dpo.train(replace(config, ref_model_name_or_path=folder))


@pytest.mark.parametrize("known", [False, True])
def test_a_reference_of_fewer_positions_is_refused(config, tiny_model, tmp_path, known):
    model = load_language_model(tiny_model, config)
    model.module.config.max_position_embeddings = 8
    model.module.save_pretrained(tmp_path / "short")
    model.tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(ModelError, match="max_length: 16 tokens are more than the 8 positions"):
        losses(config, ref_model_name_or_path=str(tmp_path / "short"), precompute_ref_log_probs=known)


def test_a_fingerprint_is_of_weights_and_configuration(config, tiny_model, monkeypatch):
    model = load_language_model(tiny_model, config).module
    before = fingerprint_of(model)
    assert before == fingerprint_of(load_language_model(tiny_model, replace(config, padding_free=False)).module)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.configuration_utils.__version__", "0")
        assert model.config.to_dict()["transformers_version"] == "0" and fingerprint_of(model) == before
    model.config.rms_norm_eps *= 2
    changed = fingerprint_of(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert len({before, changed, fingerprint_of(model)}) == 3
