"""Packed segments, caches and windows: the same hidden states and tokens as one sequence at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf import rollout
from rlhf.attention import NAME, Segments, _window, attend, enable_packing, packed_inputs
from rlhf.config import RunConfig, SFTConfig
from rlhf.forward import response_logprobs, response_values, sequence_scores
from rlhf.log import say_how_logprobs_are_formed
from rlhf.model import load_language_model, load_scorer
from rlhf.rollout import Sampling, generate
from rlhf.types import PromptBatch, pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = RunConfig(output_dir="unused", device="cpu")
PADDED = SFTConfig(model_name_or_path="m", dataset_name="d", output_dir="o", device="cpu", padding_free=False)
PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 5, 6, 7, 4, 5], [4, 4]]
RESPONSES = [[5, 6, 2], [9, 10, 11, 12, 4, 2], [6, 7, 8, 9], [7]]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
LAYERS = ["sliding_attention", "full_attention"]
KINDS = {
    "llama": GROUPED, "mistral": GROUPED | {"sliding_window": 5}, "qwen2": GROUPED, "qwen3": GROUPED,
    "gemma": GROUPED, "gemma3_text": GROUPED | {"sliding_window": 4, "layer_types": LAYERS},
    "phi3": GROUPED, "granite": GROUPED, "cohere": {"num_key_value_heads": 2}, "gpt2": {}, "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}  # fmt: skip


def build(kind: str, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


@pytest.fixture(params=KINDS)
def pair(request, tiny_model):
    """The same weights packed and padded."""
    model = load_language_model(tiny_model, RUN)
    packed, padded = (build(request.param, **KINDS[request.param]) for _ in range(2))
    assert enable_packing(packed) is None
    return replace(model, module=packed, vocab_size=64), replace(model, module=padded, vocab_size=64)


def test_packed_equals_padded_in_values_and_gradients(pair):
    batch, found = pad_sequences(PROMPTS, RESPONSES, 0), []
    for model in pair:
        logprobs, entropy = response_logprobs(model, batch, 0.7)
        upstream = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
        (logprobs * upstream + entropy * upstream**2).sum().backward()
        found.append((logprobs.detach(), entropy.detach(), [p.grad for p in model.module.parameters()]))
    assert pair[0].packed and not pair[1].packed
    (logprobs, entropy, grads), (expected, expected_entropy, slopes) = found
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-5)
    largest = max(float(g.abs().max()) for g in slopes if g is not None)
    for ours, theirs in zip(grads, slopes):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_our_decoding_draws_the_tokens_that_transformers_would(pair, temperature):
    """Prompts of different lengths, beyond the windows; some rows end early and leave the batch."""
    prompts = PromptBatch(PROMPTS * 3, ["text"] * 12, {})
    rollouts = []
    for model in pair:
        model = replace(model, eos_ids=(2, 5, 9, 11, 12, 20, 21, 22, 30, 31))
        rollouts.append(generate(model, prompts, Sampling(24, temperature), seed=(3,)))
    assert rollouts[0].completion_ids == rollouts[1].completion_ids
    if temperature:
        assert len({len(ids) for ids in rollouts[0].completion_ids}) > 3


def test_rows_that_have_ended_leave_the_batch(pair, monkeypatch):
    sizes, model = [], replace(pair[0], eos_ids=tuple(range(0, 64, 4)))
    forward = type(model.module).forward
    monkeypatch.setattr(
        type(model.module), "forward", lambda self, input_ids, **rest: sizes.append(len(input_ids)) or forward(
            self, input_ids, **rest))  # fmt: skip
    generate(model, PromptBatch([[4, 5]] * 32, ["text"] * 32, {}), Sampling(40), seed=(1,))
    assert sizes[0] == 32 and sizes[rollout.CHECK] < 32 and sizes == sorted(sizes, reverse=True) and len(sizes) <= 40


def test_what_stands_beside_a_segment_changes_nothing_of_it(tiny_model):
    model = load_language_model(tiny_model, RUN)
    expected, _ = response_logprobs(model, pad_sequences(PROMPTS, RESPONSES, 0))
    others = [[9, 9], [9], [9] * 6, [9, 4]]
    for row in range(4):
        prompts, responses = others.copy(), others.copy()
        prompts[row], responses[row] = PROMPTS[row], RESPONSES[row]
        found, _ = response_logprobs(model, pad_sequences(prompts, responses, 0))
        length = len(RESPONSES[row])
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=0, atol=2e-6)


def test_a_run_says_why_it_pads(tiny_model, capsys):
    say_how_logprobs_are_formed(load_language_model(tiny_model, RUN))
    assert capsys.readouterr().err.count("padded") == 0
    say_how_logprobs_are_formed(load_language_model(tiny_model, PADDED))
    assert "sequences are padded: padding_free is false" in capsys.readouterr().err


def test_scorers_pack_too(tiny_reward_model):
    packed, padded = load_scorer(tiny_reward_model, RUN), load_scorer(tiny_reward_model, PADDED)
    assert packed.packed and not padded.packed and padded.padded_because == "padding_free is false"
    batch = pad_sequences(PROMPTS, RESPONSES, 0)
    for read in (sequence_scores, response_values):
        torch.testing.assert_close(read(packed, batch), read(padded, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gemma2", GROUPED | {"attn_implementation": "eager"}, "runs with eager attention, not sdpa"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "takes no position_ids"),
    ],
)
def test_what_cannot_be_packed_says_why_and_stays_as_it_was(kind, changes, reason):
    module = build(kind, **changes)
    before = module.config._attn_implementation
    assert reason in enable_packing(module)
    assert module.config._attn_implementation == before != NAME


def test_a_model_that_mixes_segments_is_not_packed(tiny_model):
    """One whose layers look back across a boundary by other means than attention."""
    module = load_language_model(tiny_model, PADDED).module
    mix = lambda _, args, out: out + out.roll(1, 1)  # noqa: E731
    module.base_model.layers[0].register_forward_hook(mix)
    assert "hidden states differ by" in enable_packing(module)
    assert module.config._attn_implementation != NAME


@pytest.mark.parametrize("asked", ["softcap", "s_aux", "position_bias"])
def test_what_a_layer_asks_for_is_never_dropped(asked):
    q = torch.randn(1, 2, 5, 4)
    segments = Segments.of(torch.tensor([2, 3]), q.device)
    with pytest.raises(NotImplementedError, match=asked):
        attend(nn.Module(), q, q, q, None, segments=segments, **{asked: 30.0})


def test_a_window_is_of_the_last_tokens():
    assert _window(2, 5, 3, torch.device("cpu")).tolist() == [
        [False, True, True, True, False],
        [False, False, True, True, True],
    ]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("lengths", [(4, 1, 4), (3, 3, 3), (9,)])
def test_segments_are_what_a_loop_over_them_gives(lengths, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    segments = Segments.of(torch.tensor(lengths), q.device)
    out, _ = attend(nn.Module(), q, k, v, None, segments=segments, scaling=0.3, sliding_window=window)
    assert out.shape == (1, 9, 4, 8)
    for stop, n in zip(torch.tensor(lengths).cumsum(0).tolist(), lengths):
        start = stop - n
        unseen = torch.ones(n, n).triu(1) + (torch.ones(n, n).tril(-window) if window else 0)
        for head in range(4):
            scores = 0.3 * q[0, head, start:stop] @ k[0, head // 2, start:stop].T
            scores = scores.masked_fill(unseen.bool(), -torch.inf)
            torch.testing.assert_close(out[0, start:stop, head], scores.softmax(-1) @ v[0, head // 2, start:stop])


def test_the_mask_of_packed_inputs_says_nothing():
    inputs = packed_inputs(torch.tensor([4, 5]), torch.tensor([0, 0]), Segments.of(torch.tensor([1, 1]), "cpu"))
    assert inputs["attention_mask"].shape == (1, 1, 1, 1) and inputs["use_cache"] is False


@pytest.mark.parametrize(("window", "packs"), [(16, False), (256, True), (None, True)])
def test_a_window_that_attention_is_not_told_of_is_not_packed(window, packs):
    """PhiMoE's window stands in its mask alone, and is longer than the probe. One of all positions does nothing."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 256}
    reason = enable_packing(build("phimoe", **GROUPED | experts, sliding_window=window))
    assert (reason is None) == packs and (packs or "its window of 16 tokens" in reason)
