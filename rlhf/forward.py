"""The forward passes that everything uses, in sampling's scoring and in training alike.

Sequences run packed, without padding, where the model allows it; else padded on the right, where no token of a causal
model looks. Either way what follows the trunk works on response tokens alone, (n,) of them, row after row.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import rlhf_kernels
from rlhf.attention import Segments, packed_inputs
from rlhf.model import LanguageModel, Scorer, ValueHead
from rlhf.types import SequenceBatch

CHUNK = 1 << 23  # logits held at a time where nothing but their order is asked for: 32 MB in float32


def response_hidden(model: LanguageModel, batch: SequenceBatch) -> Tensor:  # (n, H)
    """The last hidden states from which each counted response token is predicted."""
    with model.autocast():
        hidden = model.head.hidden(**_inputs(model, batch))
    return _counted(model, hidden, batch).index_select(0, batch.predictors)


def token_logprobs(
    model: LanguageModel,
    batch: SequenceBatch,
    temperature: float = 1.0,
    *,
    hidden: Tensor | None = None,  # response_hidden, where it is known
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:  # (n,) log-probabilities and entropies in nats
    """The log-probability of every counted response token, in sampling and in training alike (in bfloat16 on a CPU
    sampling rounds logits, training does not)."""
    options = {"temperature": temperature, "return_entropy": entropy}
    if not model.head.fused:
        found = rlhf_kernels.token_logprobs(_logits(model, batch), batch.response_ids, **options)
    else:
        hidden = response_hidden(model, batch) if hidden is None else hidden
        with model.autocast():
            found = rlhf_kernels.linear_token_logprobs(
                hidden, token_ids=batch.response_ids, **options, **model.head_options()
            )
    return found if entropy else (found, None)


def response_logprobs(
    model: LanguageModel,
    batch: SequenceBatch,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (B, R) log-probabilities and entropies in nats, 0 where no token counts
    logprobs, entropy = token_logprobs(model, batch, temperature, entropy=True)
    return batch.unpack(logprobs), batch.unpack(entropy)


@torch.no_grad()
def likeliest_tokens(
    model: LanguageModel,
    batch: SequenceBatch,
    hidden: Tensor | None = None,  # response_hidden, where it is known
) -> Tensor:  # (n,) int64
    """What the model itself would have written in place of each counted response token. Costs the head's product once
    more; logits are held a chunk at a time."""
    if not model.head.fused:
        return _logits(model, batch).argmax(-1)
    hidden = response_hidden(model, batch) if hidden is None else hidden
    weight, bias = (model.head_options()[name] for name in ("weight", "bias"))  # a cap or scale changes no order
    pieces = hidden.to(weight.dtype).split(max(1, CHUNK // len(weight)))
    with model.autocast():
        return torch.cat([linear(piece, weight, bias).argmax(-1) for piece in pieces])


def _logits(model: LanguageModel, batch: SequenceBatch) -> Tensor:  # (n, V)
    """Of the ids that the tokenizer knows; formed for response tokens alone where the model can leave out others."""
    inputs, wanted = _inputs(model, batch), batch.predictors
    kept = only(model.module, wanted) if model.packed else {}
    with model.autocast():
        logits = model.module(**inputs, **kept).logits
    logits = logits[0] if kept else _counted(model, logits, batch)[wanted]
    return logits[:, : model.vocab_size]


def only(module: nn.Module, tokens: int | Tensor) -> dict[str, int | Tensor]:
    """The argument by which a model forms logits of its last `tokens`, or of those with these indices, alone."""
    return {"logits_to_keep": tokens} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}


def token_values(
    model: Scorer | ValueHead,
    batch: SequenceBatch,
    policy_hidden: Tensor | None = None,  # (n, H), which a ValueHead reads
) -> Tensor:  # (n,) float32, before each response token
    if isinstance(model, ValueHead):
        hidden = response_hidden(model.policy, batch) if policy_hidden is None else policy_hidden
        return linear(hidden.float(), model.module.weight.float())[:, 0]
    return token_scores(model, batch).index_select(0, batch.predictors)


def response_values(model: Scorer, batch: SequenceBatch) -> Tensor:  # (B, R), before each response token
    return batch.unpack(token_values(model, batch))


def sequence_scores(model: Scorer, batch: SequenceBatch) -> Tensor:  # (B,), at the last token by length
    return token_scores(model, batch)[batch.last_tokens]


@torch.no_grad()
def score_sequences(
    model: Scorer,
    batch: SequenceBatch,
    sequences: int,  # in one forward pass, or
    tokens: int | None,
) -> Tensor:  # (B,)
    scores = torch.zeros(len(batch), device=model.device)
    for rows in batch.micro_batches(sequences, tokens, model.packed):
        scores[rows.to(model.device)] = sequence_scores(model, batch.rows(rows))
    return scores


def token_scores(model: Scorer, batch: SequenceBatch) -> Tensor:  # (N,) float32
    """The one reward at every token: of a model with several objectives, the weighted sum of their scores."""
    scores, weights = objective_scores(model, batch), getattr(model.module.config, "objective_weights", None)
    return sum(w * score for w, score in zip(weights, scores.unbind(1))) if weights else scores[:, 0]


def objective_scores(model: Scorer, batch: SequenceBatch) -> Tensor:  # (N, heads) float32
    """Each head at every token, less the configuration's reward_mean, over its reward_std. Heads run in float32."""
    with model.autocast():
        hidden = model.module.base_model(**_inputs(model, batch, model.module.base_model)).last_hidden_state
    head = model.module.score
    hidden = _counted(model, hidden, batch).float()
    raw = linear(hidden, head.weight.float(), None if head.bias is None else head.bias.float())
    means, deviations = (_of_heads(model, *named) for named in (("reward_mean", 0.0), ("reward_std", 1.0)))
    return torch.stack([(r - mean) / std for r, mean, std in zip(raw.unbind(1), means, deviations)], 1)


def _of_heads(model: Scorer, name: str, default: float) -> list[float]:
    """A number a head; the configuration of a model with one head has the number itself."""
    value = getattr(model.module.config, name, default)
    return value if isinstance(value, list) else [value] * model.module.score.out_features


def _inputs(model: LanguageModel | Scorer, batch: SequenceBatch, module: nn.Module | None = None) -> dict:
    if model.packed:
        segments = Segments.of(batch.lengths, batch.ids.device)
        return packed_inputs(batch.ids.flatten()[batch.tokens], batch.positions, segments)
    # No attention mask: without one attention skips what lies above the diagonal.
    inputs = {"input_ids": batch.ids, "use_cache": False}
    if "position_ids" in inspect.signature((module or model.module).forward).parameters:
        inputs["position_ids"] = torch.arange(batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
    return inputs


def _counted(model: LanguageModel | Scorer, per_token: Tensor, batch: SequenceBatch) -> Tensor:
    """(1, N, ...) packed or (B, T, ...) padded to (N, ...)."""
    return per_token[0] if model.packed else per_token.flatten(0, 1)[batch.tokens]
