"""Sampling: prompts to a Rollout, with the policy's own weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.model import LanguageModel, ModelError
from rlhf.types import PromptBatch, Rollout, pad_sequences


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
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts.token_ids]
    ids, mask = torch.tensor(padded, device=model.device), torch.tensor(mask, device=model.device)
    new_ids = _sample(model, ids, mask, sampling, seed, should_stop)[:, width:]

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


def _sample(model: LanguageModel, ids: Tensor, mask: Tensor, sampling: Sampling, seed, should_stop) -> Tensor:
    from transformers import GenerationConfig, LogitsProcessorList

    module, cuda = model.module, [model.device] if model.device.type == "cuda" else []
    ours = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # of what _Draw leaves
        eos_token_id=list(model.eos_ids) or None,
        pad_token_id=model.pad_id,
    )
    draw = LogitsProcessorList([_Draw(sampling.temperature, model.vocab_size)])

    def stop(ids: Tensor, scores: Tensor, **_) -> Tensor:
        return torch.full((ids.shape[0],), should_stop(), device=ids.device)

    # What ours leaves unset would be taken from the model's own configuration, so that one is set aside.
    own, module.generation_config = module.generation_config, ours
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda), model.autocast():
            torch.manual_seed(mix(*seed))
            return module.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=ours,
                logits_processor=draw,
                stopping_criteria=[stop],
            )
    finally:
        module.generation_config = own


class _Draw:
    """Leaves one token of each row: drawn at the temperature, the likeliest at temperature 0.

    By the inverse of the cumulated probabilities, one random number a row. torch.multinomial takes one a token of the
    vocabulary, from a generator that runs on one core: 30 ms for 64 x 32000, where this takes 3 (2 cores, 2026-11-25).
    float64, so that a token of probability 1e-9 is drawn as often as it should be.
    """

    def __init__(self, temperature: float, vocab_size: int) -> None:
        self.temperature, self.vocab_size = temperature, vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores[:, : self.vocab_size]
        if not self.temperature:
            return scores
        cumulated = cumulated_probabilities(scores, self.temperature)
        total = cumulated[:, -1:]
        if not bool(total.isfinite().all()):
            raise ModelError("the model gives logits that are NaN or infinite: damaged weights, or training diverged")
        drawn = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * total
        # right: a token whose probability is 0 does not move the sum, and is passed over.
        token = torch.searchsorted(cumulated, drawn, right=True).clamp_(max=self.vocab_size - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def cumulated_probabilities(scores: Tensor, temperature: float) -> Tensor:  # (B, V) to (B, V) float64
    return torch.softmax(scores / temperature, -1, dtype=torch.float32).double().cumsum(-1)


def mix(*keys: int) -> int:
    """One 63-bit seed for a tuple of integers, such as (seed, step)."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big") >> 1
