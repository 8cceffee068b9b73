"""On a GPU: packed attention, sampling and a PPO step of every memory layout, against the same on the CPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from rlhf import ppo
from rlhf.attention import Segments, _flash, attend
from rlhf.config import PPOConfig, RunConfig
from rlhf.forward import response_logprobs
from rlhf.layout import load_models
from rlhf.model import load_language_model
from rlhf.rollout import Sampling, generate
from rlhf.types import PromptBatch, pad_sequences

pytestmark = pytest.mark.gpu
PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 5], [4, 4]]
RESPONSES = [[5, 6, 2], [9, 10, 11, 12, 4, 2], [6], [7, 8]]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_flash_kernel_gives_what_sdpa_gives_segment_by_segment(groups, window):
    if _flash() is None:
        pytest.skip("this torch has no varlen_attn with scale, window and groups")
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = torch.tensor([130, 1, 64, 257])
    shape = (1, 8, int(lengths.sum()), 64)
    q, k, v = (torch.randn(shape, device="cuda", generator=generator) for _ in range(3))
    k, v = (x[:, : 8 // groups].contiguous() for x in (k, v))
    segments, options = Segments.of(lengths, q.device), {"scaling": 0.1, "sliding_window": window}
    expected, _ = attend(None, q.double(), k.double(), v.double(), None, segments=segments, **options)
    found, _ = attend(None, *(x.bfloat16() for x in (q, k, v)), None, segments=segments, **options)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.03)


def test_logprobs_are_those_of_the_cpu(tiny_model):
    runs = [RunConfig(output_dir="o", device=device, dtype="float32") for device in ("cpu", "cuda")]
    models = [load_language_model(tiny_model, run) for run in runs]
    found = [response_logprobs(m, pad_sequences(PROMPTS, RESPONSES, 0).to(m.device))[0].cpu() for m in models]
    assert all(model.packed for model in models)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


def test_the_likeliest_tokens_are_those_of_the_cpu(tiny_model):
    prompts, found = PromptBatch(PROMPTS, ["text"] * 4, {}), []
    for device in ("cpu", "cuda"):
        model = load_language_model(tiny_model, RunConfig(output_dir="o", device=device, dtype="float32"))
        found.append(generate(model, prompts, Sampling(20, temperature=0)).completion_ids)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory_layout": ["shared_value"]},
        {"memory_layout": ["lora"]},
        {"memory_layout": ["separate", "frozen_bf16", "offload"]},
        {"optim": "adamw_bf16"},
        {"advantage": "grpo", "num_generations": 4},
        {"kl_estimator": "full", "gradient_checkpointing": True},
    ],
)
def test_ppo_trains(tiny_model, tiny_reward_model, corpus, tmp_path, changes, dtype):
    config = PPOConfig(
        model_name_or_path=tiny_model,
        dataset_name=corpus,
        output_dir=str(tmp_path / "ppo"),
        reward_model_path=tiny_reward_model,
        device="cuda",
        dtype=dtype,
        response_length=12,
        max_prompt_length=8,
        learning_rate=1e-3,
        max_steps=3,
        report_to="none",
        **changes,
    )
    if config.has("offload"):
        models = load_models(replace(config, output_dir=str(tmp_path / "other")))
        assert {p.device.type for module in models.offloaded for p in module.parameters()} == {"cpu"}
        with models.on_device():
            assert {p.device.type for module in models.offloaded for p in module.parameters()} == {"cuda"}
        assert all(p.is_pinned() for module in models.offloaded for p in module.parameters())
    result = ppo.train(config)
    rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(value is not None and math.isfinite(value) for row in rows for value in row.values())
    tolerance = 1e-5 if dtype == "float32" else 0.05
    assert rows[0]["val/ratio_first"] == pytest.approx(1.0, abs=tolerance)
