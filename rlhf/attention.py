"""Attention over packed sequences: segments side by side in one row, none of which sees another.

transformers finds attention functions by name. Ours takes `segments` beside the usual arguments, which models hand on
to every layer, and runs each segment by itself: the flash kernel of torch over all of them on a GPU in 16 bits, else
SDPA on one after the other. On 8 segments of 512 tokens in all that is 38 ms for the forward and backward pass of a
Llama of width 128 where a mask of blocks takes 51 and padding 47 (2 CPU cores). Without `segments` it is SDPA.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rlhf.types import cumulated

NAME = "rlhf_segments"
PROBE = (3, 6, 1, 4)  # segments of the forward pass that shows whether a model can be packed
UNHEEDED = ("softcap", "s_aux", "position_bias")  # what a layer may ask for and is not done here


@dataclass(frozen=True)
class Segments:
    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # (segments + 1,) int32 on the device

    @staticmethod
    def of(lengths: Tensor, device: torch.device) -> Segments:  # (B,) int64 on the host
        bounds = cumulated(lengths).int().to(device, non_blocking=True)
        return Segments(tuple(lengths.tolist()), bounds)


def packed_inputs(
    ids: Tensor,  # (N,) int64
    positions: Tensor,  # (N,) int64
    segments: Segments,
) -> dict:
    """Arguments of a model's forward. The mask of four dimensions says nothing: it keeps the model from making one."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": mask, "use_cache": False}
    return inputs | {"segments": segments}


def prefill_inputs(
    ids: Tensor,  # (B, W), padded on the left
    padding: Tensor,  # (B,) of each row
) -> dict[str, Tensor]:
    """Arguments of the forward that fills a cache. Each token sees what is before it in its row, and padding itself, so
    that nothing is NaN."""
    at = torch.arange(ids.shape[1], device=ids.device)
    mask = (at[:, None] >= at) & (at >= padding[:, None, None]) | (at[:, None] == at)
    positions = (at - padding[:, None]).clamp(min=0)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}


def decode_inputs(
    token: Tensor,  # (B,)
    padding: Tensor,  # (B,)
    slot: int,  # tokens in the cache, padding included
) -> dict[str, Tensor]:
    """Arguments of the forward of one more token."""
    seen = torch.arange(slot + 1, device=token.device) >= padding[:, None]
    position = (slot - padding)[:, None]
    return {"input_ids": token[:, None], "position_ids": position, "attention_mask": seen[:, None, None]}


def enable_packing(
    module: nn.Module,
    compute_dtype: torch.dtype = torch.float32,  # by autocast
    probe: bool = True,  # without it what would be tried is taken for granted
) -> str | None:
    """Makes a transformers model take packed inputs, and returns None; or leaves it as it was, and returns why."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if "position_ids" not in inspect.signature(module.base_model.forward).parameters:
        return f"{type(module).__name__} takes no position_ids"
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before, windows = module.config._attn_implementation, set()
    if before != "sdpa":
        return f"{type(module).__name__} runs with {before} attention, not sdpa"

    def watched(*args, **options):
        windows.add(options.get("sliding_window"))
        return attend(*args, **options)

    try:
        AttentionInterface.register(NAME, watched)
        module.set_attn_implementation(NAME)
        reason = (_difference(module, compute_dtype) or _unheard_window(module, windows)) if probe else None
    except Exception as error:  # models raise what their authors chose
        reason = f"{type(error).__name__}: {error!s:.200}"
    finally:
        AttentionInterface.register(NAME, attend)
    if reason:
        module.set_attn_implementation(before)
    return reason


def _unheard_window(module: nn.Module, windows: set[int | None]) -> str | None:
    """A window that stands in the model's mask alone, which packed inputs replace. It is longer than the probe."""
    config = module.config.get_text_config()
    window, longest = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    if not window or window in windows or (longest and window >= longest):
        return None
    return f"{type(module).__name__} does not hand its window of {window} tokens to attention"


@torch.no_grad()
def _difference(module: nn.Module, compute_dtype: torch.dtype) -> str | None:
    """Whether hidden states of packed segments, and of a row continued over a cache, are those of each alone."""
    half = compute_dtype != torch.float32
    with torch.autocast(module.device.type, dtype=compute_dtype, enabled=half):
        found, expected = _packed_and_alone(module)
    error = float((found - expected).abs().max() / expected.abs().max())
    allowed = max(1e-4, 8 * max(torch.finfo(dtype).eps for dtype in (found.dtype, compute_dtype)))
    return None if error <= allowed else f"packed and unpacked hidden states differ by {error:.1e} of the largest"


def _packed_and_alone(module: nn.Module) -> tuple[Tensor, Tensor]:
    from transformers import DynamicCache

    trunk, embedding = module.base_model, module.get_input_embeddings()
    device = embedding.weight.device
    lengths = torch.tensor(PROBE)
    ids = torch.arange(1, 1 + int(lengths.sum()), device=device) % embedding.num_embeddings
    positions = torch.cat([torch.arange(n, device=device) for n in PROBE])
    packed = trunk(**packed_inputs(ids, positions, Segments.of(lengths, device))).last_hidden_state[0]
    alone = [trunk(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in ids.split(PROBE)]

    first, second = ids.split(PROBE)[:2]  # 3 tokens and 6: all but the last fill a cache, padded to 5
    padding, cache = torch.tensor([3, 0], device=device), DynamicCache()
    rows = torch.stack([torch.cat([first[:1].expand(3), first[:-1]]), second[:-1]])
    trunk(**prefill_inputs(rows, padding), past_key_values=cache, use_cache=True)
    last = decode_inputs(torch.stack([first[-1], second[-1]]), padding, 5)
    continued = trunk(**last, past_key_values=cache, use_cache=True).last_hidden_state[:, 0]

    return torch.cat([packed, continued]), torch.cat([*alone, alone[0][-1:], alone[1][-1:]])


def attend(
    module: nn.Module,
    query: Tensor,  # (B, heads, T, D); (1, heads, N, D) with segments
    key: Tensor,  # (B, key heads, T, D)
    value: Tensor,  # (B, key heads, T, D)
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options,
) -> tuple[Tensor, None]:  # (B, T, heads, D)
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if attention_mask is not None and sliding_window and key.shape[2] > sliding_window:
            attention_mask = attention_mask & _window(query.shape[2], key.shape[2], sliding_window, key.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **options
        )
    if torch.is_autocast_enabled(query.device.type):  # as SDPA does by itself: rotary embeddings leave float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if asked := [name for name in UNHEEDED if options.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(asked)}")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _flash():
        return _flash_segments(query, key, value, segments, scaling, sliding_window), None
    return _sdpa_segments(query, key, value, segments, scaling, sliding_window), None


def _sdpa_segments(query, key, value, segments, scaling, window) -> Tensor:
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    count, length = len(segments.lengths), segments.lengths[0]
    if min(segments.lengths) == max(segments.lengths):  # rows of a batch: 7 ms in place of 12 for 64 of 64 tokens
        query, key, value = (x.unflatten(2, (count, length)).transpose(1, 2)[0] for x in (query, key, value))
        parts = [(query, key, value)]
    else:
        parts = zip(*(x.split(segments.lengths, 2) for x in (query, key, value)))
    outputs = []
    for q, k, v in parts:
        mask = None
        if window and q.shape[2] > window:
            mask = _window(q.shape[2], q.shape[2], window, q.device)
        outputs.append(scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling))
    if len(outputs) == 1:
        return outputs[0].transpose(1, 2).flatten(0, 1)[None]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _window(queries: int, keys: int, window: int, device: torch.device) -> Tensor:  # (queries, keys) bool
    """The last queries of the keys; each sees itself and the window - 1 keys before it."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


@cache
def _flash():
    """torch's attention over sequences of different lengths, where this torch has it with scale and window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    taken = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= taken.keys() else None


def _flash_segments(query, key, value, segments, scaling, window) -> Tensor:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    longest, bounds = max(segments.lengths), segments.cu_seqlens
    seen = (window - 1 if window else -1, 0)  # tokens before and after that a token sees
    gqa = q.shape[1] != k.shape[1]
    out = _flash()(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=seen, enable_gqa=gqa)
    return out[None]
