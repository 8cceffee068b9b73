"""What the launchers of the Triton kernels launch, recorded from CPU tensors of the sizes that matter: the subjects of
tests/test_triton_aot.py and benchmarks/static.py."""

from __future__ import annotations

import importlib

import torch

from rlhf_kernels.triton import KERNELS

from .aot import JITFunction, Launch, recorded_launches

N = 16384
VIEW_OF_GPT2 = {"dtype": torch.bfloat16, "vocab": 50257, "view": True}
ROWS = {
    "bf16": {"dtype": torch.bfloat16, "vocab": 128256},
    "bf16_odd_vocab": {"dtype": torch.bfloat16, "vocab": 50257},
    "bf16_odd_vocab_view": VIEW_OF_GPT2,
    "bf16_softcap": {"dtype": torch.bfloat16, "vocab": 256000, "softcap": 30.0, "temperatures": True},
    "fp16_tiny_vocab": {"dtype": torch.float16, "vocab": 100, "entropy": False},
    "fp32_view": {"dtype": torch.float32, "vocab": 32000, "view": True},
    "fp64": {"dtype": torch.float64, "vocab": 32000},
}


def row_launches(dtype, vocab, softcap=None, temperatures=False, entropy=True, view=False) -> list[Launch]:
    """token_logprobs, forward and backward."""
    logits = torch.zeros(2, 4, vocab, dtype=dtype)
    logits = logits[:, 1:] if view else logits[:, :].flatten(0, 1)
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    per_row = torch.ones(ids.shape) if temperatures else None
    with recorded_launches() as launches:
        out = KERNELS["token_logprobs"](logits, ids, per_row, 0.7, softcap, -100, entropy)
        upstream = (out[0], out[1] if entropy else None)
        KERNELS["token_logprobs_backward"](*upstream, logits, ids, per_row, *out[1:], 0.7, softcap, -100)
    return launches


def tile_launches(dtype, vocab, softcap=None, temperatures=False, entropy=True, view=False) -> list[Launch]:
    """What ops on hidden states launch: gradients over the logits, and of float32 logits into the products' dtype."""
    launches = []
    for logits_dtype in dict.fromkeys((dtype, torch.float32)):
        logits = torch.zeros(16, vocab, dtype=logits_dtype)
        grad = logits if logits_dtype == dtype else torch.zeros(16, vocab, dtype=dtype)
        ids, rows = torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.result_type(logits, torch.zeros(1)))
        temps = rows if temperatures else None
        given = None if grad is logits else logits
        with recorded_launches() as found:
            KERNELS["token_logprobs_backward_into"](
                grad, rows, rows if entropy else None, given, ids, temps, rows, rows, rows, 0.7, softcap, -100, 4096
            )
        launches += found
    return launches


def divergence_launches(dtype, vocab, softcap=None, temperatures=False, entropy=True, view=False) -> list[Launch]:
    """logits_kl, forward and backward, of the reverse and the forward divergence."""
    logits = torch.zeros(2, 4, vocab, dtype=dtype)
    logits = logits[:, 1:] if view else logits[:, :].flatten(0, 1)
    rows = torch.zeros(logits.shape[:-1], dtype=torch.result_type(logits.float(), logits))
    mask, temps = (rows == 0, rows) if temperatures else (None, None)
    grad = torch.zeros(logits.shape, dtype=dtype)
    with recorded_launches() as launches:
        for direction in (0, 1):
            kl, saved = KERNELS["logits_kl"](logits, logits, mask, temps, 0.7, softcap, direction)
            shaping = (mask, temps, saved, 0.7, softcap, direction)
            KERNELS["logits_kl_backward_into"](grad, kl, logits, logits, *shaping)
    return launches


def token_calls(dtype) -> dict[str, tuple]:
    """Calls (op, arguments of its schema) of the ops on tokens: padded and packed, every optional input present and
    absent, both strategies of the scan."""
    padded, packed = torch.zeros(4, N // 4, dtype=dtype), torch.zeros(N, dtype=dtype)
    short = padded[:, :100].contiguous()
    one, bounds = torch.zeros(1, dtype=dtype), torch.tensor([0, N], dtype=torch.int32)
    masks = padded == 0, packed == 0
    clips = (0.2, 0.2, 3.0, 0.2, 0.1, 0.1, 0.1)
    coef = (one[0], 0.0, 3, 0.9, 0.9, 1.0)
    every = (*[packed] * 3, masks[1], bounds, *[packed] * 6, None, *clips, 3, 1.0, 1.0)
    return {
        "masked_whiten": ("masked_whiten", padded, masks[0], True, False, 1e-8),
        "gae": ("gae", padded, padded, masks[0], None, None, 0.9, 0.9, False),
        "gae, short": ("gae", short, short, None, None, one.expand(4).contiguous(), 0.9, 0.9, True),
        "gae, one long sequence": ("gae", packed, packed, masks[1], bounds, one, 0.9, 0.9, True),
        "ppo_advantages": (
            "ppo_advantages", padded, padded, padded, padded[:, 0].contiguous(), masks[0], None, *coef, False, True
        ),
        "ppo_advantages, one long sequence, rewards whitened": (
            "ppo_advantages", packed, packed, packed, one, masks[1], bounds, *coef, True, True
        ),
        "ppo_advantages, one long sequence, a score a token, no whitening": (
            "ppo_advantages", packed, packed, packed, packed, None, bounds, *coef, False, False
        ),
        "ppo_loss, everything": ("ppo_loss", *every, 0, *[True] * 3),
        "ppo_loss, everything, seq_mean_token_sum": ("ppo_loss", *every, 1, *[True] * 3),
        "ppo_loss, everything, seq_mean_token_mean": ("ppo_loss", *every, 2, *[True] * 3),
        "ppo_loss, policy alone, no mask": (
            "ppo_loss", *[padded] * 3, *[None] * 8, one[0], *clips, 0, None, None, 0, True, False, False
        ),
    }  # fmt: skip


def token_launches(dtype) -> dict[str, list[Launch]]:
    found = {}
    for label, (op, *arguments) in token_calls(dtype).items():
        with recorded_launches() as found[label]:
            KERNELS[op](*arguments)
    return found


def adamw_launches(grad_dtype, n, scaled) -> list[Launch]:
    param, grad = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=grad_dtype)
    one = torch.ones(())
    with recorded_launches() as launches:
        scalars = (one, one, one) if scaled else (one, None, None)
        KERNELS["adamw_bf16_"](param, grad, param, param, *scalars, 3, 1e-3, 0.9, 0.999, 1e-8, 0.1)
    return launches


def distinct(launches: list[Launch]) -> list[Launch]:
    return [launch for i, launch in enumerate(launches) if launch not in launches[:i]]


def written_kernels() -> set[tuple[str, str]]:
    """(module, name) of every Triton kernel of the package."""
    modules = {importlib.import_module(f.__module__) for f in KERNELS.values()}
    return {
        (module.__name__, name)
        for module in modules
        for name, f in vars(module).items()
        if isinstance(f, JITFunction) and name.endswith("_kernel") and f.fn.__module__ == module.__name__
    }
