"""Sampling: prompts to a Rollout, with the policy's own weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.attention import decode_inputs, prefill_inputs
from rlhf.forward import only
from rlhf.model import LanguageModel, ModelError
from rlhf.types import PromptBatch, Rollout, pad_sequences

CHECK = 8  # tokens between looks at which responses have ended
ROOM = 64  # tokens by which keys and values of a cache grow


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the likeliest token


def generate(
    model: LanguageModel,
    prompts: PromptBatch,
    sampling: Sampling,
    *,
    seed: tuple[int, ...] = (0,),
    should_stop: Callable[[], bool] = lambda: False,
) -> Rollout:
    """One response to each prompt, up to and including its first EOS token.

    The samples depend on `seed` and the batch alone; torch's global generator is left as it was. Nothing truncates the
    distribution (no top-k, no top-p), and ids that the tokenizer doesn't know are never drawn, so that training scores
    the distribution that was sampled from. `should_stop` is polled at each token; responses are then cut short.
    """
    width = max(map(len, prompts.token_ids))
    padded = [[model.pad_id] * (width - len(p)) + p for p in prompts.token_ids]
    ids = torch.tensor(padded).to(model.device, non_blocking=True)
    padding = torch.tensor([width - len(p) for p in prompts.token_ids]).to(model.device, non_blocking=True)
    sample = _sample if model.packed else _sample_with_transformers
    with torch.no_grad(), model.autocast():
        new_ids = sample(model, ids, padding, sampling, mix(*seed), should_stop)
    return read(model, prompts, new_ids.tolist())


def read(model: LanguageModel, prompts: PromptBatch, new_ids: list[list[int]]) -> Rollout:
    """What was sampled, up to and including the first EOS token of each row."""
    stops = set(model.eos_ids)
    lengths = [next((n for n, token in enumerate(row, start=1) if token in stops), len(row)) for row in new_ids]
    responses = [row[:n] for row, n in zip(new_ids, lengths)]
    finished = [row[-1] in stops for row in responses]
    texts = [row[:-1] if ended else row for row, ended in zip(responses, finished)]
    return Rollout(
        sequences=pad_sequences(prompts.token_ids, responses, model.pad_id).to(model.device),
        finished=torch.tensor(finished),
        prompts=prompts,
        completions=[decode(model.tokenizer, ids) for ids in texts],
        completion_ids=responses,
    )


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _sample(
    model: LanguageModel,
    ids: Tensor,  # (B, W) prompts, padded on the left
    padding: Tensor,  # (B,) of each
    sampling: Sampling,
    seed: int,
    should_stop: Callable[[], bool],
) -> Tensor:  # (B, new tokens)
    """Token by token over the model's own cache. Every CHECK tokens the host learns which rows have ended, and those
    leave the batch once they are a quarter of it: responses of different lengths cost what their tokens cost."""
    count, width, device = *ids.shape, ids.device
    generator = torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(model.eos_ids, dtype=torch.long).to(device, non_blocking=True)
    new_ids = torch.full((count, sampling.max_new_tokens), model.pad_id, device=device)
    rows = torch.arange(count, device=device)  # which are still in the batch
    ended, finite = torch.zeros(count, dtype=torch.bool, device=device), torch.ones((), dtype=torch.bool, device=device)
    held = new_cache(width + sampling.max_new_tokens)
    inputs = prefill_inputs(ids, padding)
    for t in range(sampling.max_new_tokens):
        output = model.module(**inputs, past_key_values=held, use_cache=True, **only(model.module, 1))
        uniform = torch.rand(count, 1, dtype=torch.float64, device=device, generator=generator)
        token, sound = draw(output.logits[:, -1], sampling.temperature, model.vocab_size, uniform[rows])
        finite &= sound
        new_ids[rows, t] = token
        ended |= torch.isin(token, stops)
        if should_stop() or t + 1 == sampling.max_new_tokens:
            new_ids = new_ids[:, : t + 1]
            break
        if (t + 1) % CHECK == 0:
            left = int((~ended).sum())
            if not left:
                new_ids = new_ids[:, : t + 1]
                break
            if left <= 0.75 * len(rows):
                kept = ended.int().argsort(stable=True)[:left]
                rows, padding, token, ended = rows[kept], padding[kept], token[kept], ended[kept]
                held.batch_select_indices(kept)
        inputs = decode_inputs(token, padding, width + t)
    _check_finite(finite)
    return new_ids


def new_cache(most: int):
    """Keys and values of up to `most` tokens, with room for those to come; transformers' own layers copy all that they
    hold for each token."""
    from transformers import Cache
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:  # (B, heads, new, D)
            start = self.get_seq_length()
            stop = start + keys.shape[2]
            if not start:
                self.lazy_initialization(keys, values)
                self.held = [x[:, :, :0] for x in (keys, values)]
            if stop > self.held[0].shape[2]:
                wider = max(stop, min(stop + ROOM, most)) - start
                pairs = zip(self.held, (keys, values))
                self.held = [
                    torch.cat([x[:, :, :start], y.new_empty(*y.shape[:2], wider, y.shape[3])], 2) for x, y in pairs
                ]
            for held, new in zip(self.held, (keys, values)):
                held[:, :, start:stop] = new
            self.keys, self.values = (held[:, :, :stop] for held in self.held)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            stop, self.held = self.get_seq_length(), [held[indices] for held in self.held]
            self.keys, self.values = (held[:, :, :stop] for held in self.held)

    return Cache(layer_class_to_replicate=GrowingLayer)


def draw(
    logits: Tensor,  # (B, V)
    temperature: float,
    vocab_size: int,
    uniform: Tensor,  # (B, 1) float64 in [0, 1)
) -> tuple[Tensor, Tensor]:  # (B,) tokens, and () whether all probabilities are finite
    """One token of each row at the temperature, the likeliest at temperature 0.

    By the inverse of the cumulated probabilities, one random number a row. torch.multinomial takes one a token of the
    vocabulary, from a generator that runs on one core: 30 ms for 64 x 32000, where this takes 3 (2 cores, 2026-11-25).
    float64, so that a token of probability 1e-9 is drawn as often as it should be.
    """
    logits = logits[:, :vocab_size]
    if not temperature:
        return logits.argmax(-1), logits.isfinite().all()
    cumulated = torch.softmax(logits.float() / temperature, -1).double().cumsum(-1)
    total = cumulated[:, -1:]
    # right: a token whose probability is 0 does not move the sum, and is passed over.
    token = torch.searchsorted(cumulated, uniform * total, right=True).clamp_(max=vocab_size - 1)
    return token[:, 0], total.isfinite().all()


def _check_finite(finite: Tensor) -> None:
    if not bool(finite):
        raise ModelError("the model gives logits that are NaN or infinite: damaged weights, or training diverged")


def _sample_with_transformers(model: LanguageModel, ids, padding, sampling, seed, should_stop) -> Tensor:
    """The same tokens from transformers' own loop, for models that take no packed sequences."""
    from transformers import GenerationConfig, LogitsProcessorList

    module, cuda = model.module, [model.device] if model.device.type == "cuda" else []
    ours = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # of what is left by the draw
        eos_token_id=list(model.eos_ids) or None,
        pad_token_id=model.pad_id,
    )
    generator = torch.Generator(model.device).manual_seed(seed)

    def leave_one(_, scores: Tensor) -> Tensor:
        uniform = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device, generator=generator)
        token, finite = draw(scores, sampling.temperature, model.vocab_size, uniform)
        _check_finite(finite)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)

    def stop(ids: Tensor, scores: Tensor, **_) -> Tensor:
        return torch.full((ids.shape[0],), should_stop(), device=ids.device)

    mask = (torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]).long()
    # What ours leaves unset would be taken from the model's own configuration, so that one is set aside.
    own, module.generation_config = module.generation_config, ours
    try:
        with torch.random.fork_rng(cuda):
            found = module.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=ours,
                logits_processor=LogitsProcessorList([leave_one]),
                stopping_criteria=[stop],
            )
    finally:
        module.generation_config = own
    return found[:, ids.shape[1] :]


def mix(*keys: int) -> int:
    """One 63-bit seed for a tuple of integers, such as (seed, step)."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big") >> 1
