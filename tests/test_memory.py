"""The dry run: weights to the byte, the tracker by hand, the peak of a process within a tenth."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rlhf_kernels
from benchmarks import layouts
from rlhf import cli, ppo
from rlhf.config import ConfigError, PPOConfig
from rlhf.layout import load_models
from rlhf.memory import HEAP_PIECE, Tracker, estimate

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = [
    {},
    {"memory_layout": ["shared_value"]},
    {"memory_layout": ["lora"]},
    {"memory_layout": ["lora", "frozen_bf16"]},
    {"memory_layout": ["separate", "frozen_bf16"]},
    {"memory_layout": ["separate", "offload"]},
    {"optim": "adamw_bf16"},
    {"advantage": "rloo", "num_generations": 2},
]


@pytest.fixture
def config(tiny_model, tiny_reward_model, corpus, tmp_path) -> PPOConfig:
    return PPOConfig(
        model_name_or_path=tiny_model,
        reward_model_path=tiny_reward_model,
        dataset_name=corpus,
        output_dir=str(tmp_path / "ppo"),
        device="cpu",
        max_prompt_length=8,
        response_length=6,
    )


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: "-".join(map(str, options.values())) or "default")
def test_weights_and_gradients_are_those_of_the_real_models(config, options):
    config = replace(config, **options)
    found, models = estimate(config), load_models(config)
    scorers = {f"reward {r.name}": r.scorer.module for r in models.rewards}
    seen = set()
    for name, module in {**models.modules, "reference": models.reference.module, **scorers}.items():
        tensors = {id(x): x for x in (*module.parameters(), *module.buffers()) if id(x) not in seen}
        seen |= tensors.keys()
        assert found.weights[name] == sum(x.nbytes for x in tensors.values()), name
    trained = sum(p.nbytes for m in models.modules.values() for p in m.parameters() if p.requires_grad)
    assert (found.gradients, found.moments) == (trained, 2 * trained)


def test_a_dry_run_packs_and_fuses_as_the_run_would(config, capsys):
    models = load_models(replace(config, dry_run=True))
    assert models.policy.packed and models.policy.head.fused and models.policy.device.type == "meta"
    assert "padded" not in capsys.readouterr().err


def test_parts_add_up_to_the_phases(config):
    found = estimate(config)
    held = found.process + sum(found.weights.values()) + found.moments
    assert found.phases["update"] == held + found.updating
    assert found.peak == max(found.phases.values()) == found.phases[found.peak_phase]
    assert found.cache == 2 * 2 * 8 * (8 + 6) * 32 * 4  # keys and values of 2 layers, 8 sequences, width 32
    assert found.gradients < found.updating and found.activations_recomputed < found.activations


def test_loading_is_in_float32(config):
    """Though what is frozen is bfloat16 in the end; the adapters come later."""
    whole, half = (estimate(replace(config, memory_layout=["lora", *more])) for more in ([], ["frozen_bf16"]))
    assert half.loading >= sum(whole.weights.values()) - 2 * whole.gradients
    assert half.loading > sum(half.weights.values())


def test_accumulation_holds_gradients_beside_activations(config):
    once, twice = (estimate(replace(config, gradient_accumulation_steps=n)) for n in (1, 2))
    assert twice.updating > once.updating and twice.activations == once.activations


def test_the_tracker_counts_storages_once():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1000)
    with Tracker() as tracker:
        y = x * 2
        z = y + 1
        del y
        view, inside, of_x = z.view(10, 100), z.add_(1), x[:10]
        assert (tracker.live, tracker.peak) == (4000, 8000)
        del z, view
        assert tracker.live == 4000
        del inside, of_x
    assert (tracker.live, tracker.peak) == (0, 8000)


def test_the_tracker_follows_a_backward_pass():
    """At the most there are the product and what relu keeps of it; then relu's gradient in the product's place."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = torch.empty(100, 100), nn.Parameter(torch.empty(100, 100))
    with Tracker() as tracker:
        torch.relu(x @ weight).sum().backward()
    assert tracker.live == 40_000
    assert 80_000 <= tracker.peak <= 80_008


def test_gaps_are_of_small_pieces():
    with FakeTensorMode(allow_non_fake_inputs=True):
        small, large = torch.empty(1000), torch.empty(HEAP_PIECE // 4)
    with Tracker(gaps=0.5) as tracker:
        kept = [small + 1, large + 1]
    assert tracker.peak == 6000 + HEAP_PIECE and tracker.live == 4000 + HEAP_PIECE
    del kept


def test_the_chunk_inside_an_op_is_added():
    """At a vocabulary of 50,000 a chunk has the 256 tokens that are its least on a CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden, weight = torch.empty(600, 8), torch.empty(50_000, 8)
        narrow = weight.bfloat16()
    ids = torch.zeros(600, dtype=torch.long)
    for operand, converted in ((weight, 0), (narrow, 50_000 * 8 * 4)):
        with Tracker() as tracker:
            rlhf_kernels.linear_token_logprobs(hidden, operand, ids)
        assert tracker.chunk == 256 * 50_000 * 4 + converted
        assert 0 < tracker.peak - tracker.chunk < 20_000


def test_no_weights_are_read(config, tmp_path, capsys):
    for name in ("model_name_or_path", "reward_model_path"):
        path = tmp_path / name
        source = config.model_name_or_path if name == "model_name_or_path" else config.reward_model_path[0]
        shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.safetensors"))
    given = {"model_name_or_path": tmp_path / "model_name_or_path", "reward_model_path": tmp_path / "reward_model_path"}
    given |= {"dataset_name": "nowhere.jsonl", "output_dir": config.output_dir, "device": "cpu"}
    cli.main(["ppo", "--dry_run", *(word for name, value in given.items() for word in (f"--{name}", str(value)))])
    printed = capsys.readouterr().out
    assert "every prompt has 512 tokens (max_prompt_length)" in printed and "in the update" in printed
    assert not Path(config.output_dir).exists()


def test_a_dry_run_does_not_train(config):
    with pytest.raises(ConfigError, match="dry_run: expected false where a run trains"):
        ppo.train(replace(config, dry_run=True))


def test_the_peak_of_a_process(tmp_path):
    """41 million parameters, in a process of their own."""
    folder = layouts.mid_size(tmp_path, layers=2)
    for layout in (["separate"], ["lora"]):
        measured, estimated = layouts.memory(folder, layout, num_mini_batches=1, response_length=16)
        assert estimated == pytest.approx(measured, rel=0.1), layout


def test_the_peak_of_a_process_is_not_its_parents():
    """A child that a large process forks begins with that one's ru_maxrss."""
    ballast = b"\1" * (1 << 30)
    code = "from rlhf.log import peak_of_process; print(peak_of_process())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 1 << 26 < int(found) < len(ballast)
