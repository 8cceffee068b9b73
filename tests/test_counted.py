"""Response tokens that do not count: read, never projected to the vocabulary, in no loss and no denominator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_fused_head import _on_logits
from torch.nn.functional import cross_entropy

import rlhf_kernels
from rlhf import forward
from rlhf.config import SFTConfig
from rlhf.forward import likeliest_tokens, response_logprobs, token_logprobs
from rlhf.losses import completion_loss
from rlhf.model import LanguageModel, load_language_model
from rlhf.types import SequenceBatch, pad_sequences

pytestmark = pytest.mark.usefixtures("one_thread")

RUN = SFTConfig(model_name_or_path="m", dataset_name="d", output_dir="o", device="cpu")
PROMPTS = [[4, 5, 6], [7], [8, 9], [4]]
RESPONSES = [[5, 6, 10, 11, 2], [9, 4, 4, 7, 8, 10, 2, 3], [7, 7, 2], [5, 6]]
YES, NO = True, False
COUNTED = [[YES, YES, NO, NO, YES], [NO, NO, YES, YES, NO, YES, NO, NO], [YES, YES, YES], [NO, NO]]
COUNTS = [3, 3, 3, 0]


@pytest.fixture(scope="module")
def model(tiny_model) -> LanguageModel:
    return load_language_model(tiny_model, RUN)


@pytest.fixture(scope="module")
def padded(tiny_model) -> LanguageModel:
    return load_language_model(tiny_model, replace(RUN, padding_free=False))


def batch_of(responses=RESPONSES, counted=COUNTED) -> SequenceBatch:
    return pad_sequences(PROMPTS, responses, 0, counted)


def loss_by_hand(module) -> torch.Tensor:
    """Plain torch, a sequence at a time: the mean over the tokens that count, labels -100 elsewhere."""
    total = 0.0
    for prompt, response, counted in zip(PROMPTS, RESPONSES, COUNTED):
        labels = [-100] * (len(prompt) - 1) + [i if yes else -100 for i, yes in zip(response, counted)]
        logits = module(torch.tensor([prompt + response])).logits[0, :-1]
        total = total + cross_entropy(logits, torch.tensor(labels), ignore_index=-100, reduction="sum")
    return total / sum(COUNTS)


def gradients(loss: torch.Tensor, module) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(module.parameters()))


def test_where_counted_tokens_stand():
    batch = batch_of()
    assert batch.counted_lengths.tolist() == COUNTS and batch.cu_seqlens.tolist() == [0, 3, 6, 9, 9]
    assert batch.response_ids.tolist() == [5, 6, 2, 4, 7, 10, 7, 7, 2]
    assert batch.response_mask.tolist() == [[*row, *[NO] * (8 - len(row))] for row in COUNTED]
    values = torch.arange(1.0, 10.0)
    whole = batch.unpack(values)
    assert whole.shape == (4, 8) and torch.equal(batch.pack(whole), values)
    assert torch.equal(whole != 0, batch.response_mask)
    part = batch.rows(torch.tensor([2, 0]))
    assert part.counted.tolist() == [[YES, YES, YES, NO, NO], COUNTED[0]]
    assert part.response_ids.tolist() == [7, 7, 2, 5, 6, 2]


def test_a_mask_of_all_tokens_changes_no_bit(model):
    every = batch_of(counted=[[YES] * len(response) for response in RESPONSES])
    for ours, expected in zip(response_logprobs(model, every), response_logprobs(model, batch_of(counted=None))):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", ["fused", "logits", "padded"])
def test_logprobs_and_entropies_are_those_of_all_tokens_and_0_elsewhere(model, padded, kind):
    chosen = {"fused": model, "logits": _on_logits(model), "padded": padded}[kind]
    assert chosen.packed == (kind != "padded")
    batch = batch_of()
    for ours, expected in zip(response_logprobs(chosen, batch), response_logprobs(model, batch_of(counted=None))):
        assert not ours[~batch.response_mask].any()
        torch.testing.assert_close(ours, expected * batch.response_mask, rtol=0, atol=1e-5)
    likeliest = likeliest_tokens(chosen, batch)
    assert torch.equal(likeliest, batch.pack(every_likeliest(model)))


def every_likeliest(model: LanguageModel) -> torch.Tensor:  # (B, R)
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        logits = model.module(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, : model.vocab_size]
        rows.append(torch.nn.functional.pad(logits.argmax(-1), (0, 8 - len(response))))
    return torch.stack(rows)


@pytest.mark.parametrize("rows", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 1], [0, 2]]])
def test_loss_and_gradient_are_those_of_plain_torch_whatever_the_micro_batches(model, padded, rows):
    """A micro-batch may have no token that counts."""
    expected = loss_by_hand(model.module)
    slopes = gradients(expected, model.module)
    for chosen in (model, padded, _on_logits(model)):
        batch = batch_of()
        parts = [token_logprobs(chosen, batch.rows(torch.tensor(part)))[0] for part in rows]
        loss = sum(completion_loss(part, sum(COUNTS)) for part in parts)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        for ours, slope in zip(gradients(loss, chosen.module), slopes):
            torch.testing.assert_close(ours, slope, rtol=1e-4, atol=1e-6)


def test_tokens_that_do_not_count_are_never_projected(model, monkeypatch):
    sizes, call = [], rlhf_kernels.linear_token_logprobs

    def watched(hidden, *rest, **options):
        sizes.append((len(hidden), len(options["token_ids"])))
        return call(hidden, *rest, **options)

    monkeypatch.setattr(forward.rlhf_kernels, "linear_token_logprobs", watched)
    token_logprobs(model, batch_of())
    assert sizes == [(9, 9)]


def test_what_follows_the_last_counted_token_does_not_matter(model, padded):
    """And what stands between counted tokens does: it is read."""
    after, between = [list(r) for r in RESPONSES], [list(r) for r in RESPONSES]
    after[1][6:], between[0][2] = [11, 12], 12
    for chosen in (model, padded):
        expected, same, other = (response_logprobs(chosen, batch_of(r))[0] for r in (RESPONSES, after, between))
        assert torch.equal(same, expected)
        assert torch.equal(other[0, :2], expected[0, :2]) and not torch.equal(other[0, 4], expected[0, 4])


def test_a_ppo_loss_over_counted_tokens_is_that_under_their_mask(model):
    batch = batch_of()
    logprobs, _ = response_logprobs(model, batch)
    old, advantages = logprobs.detach() + 0.1 * torch.randn(4, 8), torch.randn(4, 8)
    options = rlhf_kernels.PPOLossOptions(reduction="seq_mean_token_mean")
    expected, _ = rlhf_kernels.ppo_loss(logprobs, old, advantages, batch.response_mask, options=options)
    packed = (batch.pack(x) for x in (logprobs, old, advantages))
    ours, stats = rlhf_kernels.ppo_loss(*packed, cu_seqlens=batch.cu_seqlens, options=options)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6) and stats.as_dict()["tokens"] == sum(COUNTS)
