"""Every Triton kernel, compiled ahead of time as its launcher would launch it: no spills, the logits by 16 bytes."""

import os

import pytest
import torch

pytest.importorskip("triton")
from triton_aot import AMD, NVIDIA, Launch, compile_launch, recorded_launches, resources

from rlhf_kernels.triton import KERNELS

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter Triton's own functions cannot be compiled"
)
TARGETS = [pytest.param(target, marks=[] if target == "cuda:90" else [pytest.mark.slow]) for target in (*NVIDIA, AMD)]
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


def _row_launches(dtype, vocab, softcap=None, temperatures=False, entropy=True, view=False) -> list[Launch]:
    logits = torch.zeros(2, 4, vocab, dtype=dtype)
    logits = logits[:, 1:] if view else logits[:, :].flatten(0, 1)
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    per_row = torch.ones(ids.shape) if temperatures else None
    with recorded_launches() as launches:
        out = KERNELS["token_logprobs"](logits, ids, per_row, 0.7, softcap, -100, entropy)
        upstream = (out[0], out[1] if entropy else None)
        KERNELS["token_logprobs_backward"](*upstream, logits, ids, per_row, *out[1:], 0.7, softcap, -100)
    return launches


def _tile_launches(dtype, vocab, softcap=None, temperatures=False, entropy=True, view=False) -> list[Launch]:
    """What ops on hidden states launch: gradients over the logits, and of float32 logits into the products' dtype."""
    launches = []
    for logits_dtype in {dtype, torch.float32}:
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


def _divergence_launches(dtype, vocab, softcap=None, temperatures=False, entropy=True, view=False) -> list[Launch]:
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


def _token_launches(dtype) -> list[Launch]:
    """Padded and packed, every optional input present and absent, both strategies of the scan."""
    padded, packed = torch.zeros(4, N // 4, dtype=dtype), torch.zeros(N, dtype=dtype)
    one, bounds = torch.zeros(1, dtype=dtype), torch.tensor([0, N], dtype=torch.int32)
    masks = padded == 0, packed == 0
    clips = (0.2, 0.2, 3.0, 0.2, 0.1, 0.1, 0.1)
    with recorded_launches() as launches:
        KERNELS["masked_whiten"](padded, masks[0], True, False, 1e-8)
        KERNELS["gae"](padded, padded, masks[0], None, None, 0.9, 0.9, False)
        KERNELS["gae"](padded[:, :100].contiguous(), padded[:, :100].contiguous(), None, None, one, 0.9, 0.9, True)
        KERNELS["gae"](packed, packed, masks[1], bounds, one, 0.9, 0.9, True)
        coef = (one[0], 0.0, 3, 0.9, 0.9, 1.0)
        KERNELS["ppo_advantages"](packed, packed, packed, one, masks[1], bounds, *coef, True, True)
        KERNELS["ppo_advantages"](packed, packed, packed, packed, None, bounds, *coef, False, False)
        for reduction in range(3):
            KERNELS["ppo_loss"](
                *[packed] * 3, masks[1], bounds, *[packed] * 6, None, *clips, 3, 1.0, 1.0, reduction, *[True] * 3
            )
        KERNELS["ppo_loss"](*[padded] * 3, *[None] * 8, one[0], *clips, 0, None, None, 0, True, False, False)
    return launches


def _adamw_launches(grad_dtype, n, scaled) -> list[Launch]:
    param, grad = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=grad_dtype)
    one = torch.ones(())
    with recorded_launches() as launches:
        scalars = (one, one, one) if scaled else (one, None, None)
        KERNELS["adamw_bf16_"](param, grad, param, param, *scalars, 3, 1e-3, 0.9, 0.999, 1e-8, 0.1)
    return launches


def _compiled(launches: list[Launch], target: str) -> list[tuple[Launch, object]]:
    distinct: list[Launch] = []
    for launch in launches:
        if launch not in distinct:
            distinct.append(launch)
    return [(launch, resources(*compile_launch(launch, target))) for launch in distinct]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", ROWS)
def test_row_kernels(case, target):
    """No spills, 16-byte loads whatever the vocabulary and the view, 16-byte stores where the gradient's rows allow."""
    used = _compiled(_row_launches(**ROWS[case]), target)
    assert [launch.name for launch, _ in used] == ["_forward_kernel", "_backward_kernel"]
    for launch, found in used:
        assert not found.spills and not found.scalar_spills, (launch.name, found)
        assert found.wide_loads, (launch.name, found)
    # A gradient of 50257 columns has rows at other distances from 16 bytes than those of a view on the logits.
    assert used[1][1].wide_stores or ROWS[case] is VIEW_OF_GPT2, used[1][1]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("launches", [_tile_launches, _divergence_launches], ids=["tiles", "divergence"])
def test_row_kernels_of_ops_on_hidden_states(launches, case, target):
    for launch, found in _compiled(launches(**ROWS[case]), target):
        assert not found.spills and not found.scalar_spills, (launch.name, found)
        assert found.wide_loads, (launch.name, found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_token_kernels(dtype, target):
    used = _compiled(_token_launches(dtype), target)
    names = {launch.name for launch, _ in used}
    assert names >= {"_moments_kernel", "_whiten_kernel", "_block_maps_kernel", "_gae_kernel", "_shape_kernel"}
    assert names >= {"_add_scores_kernel", "_count_kernel", "_pass_kernel", "_reduce_kernel"}
    for launch, found in used:
        assert not found.spills, (launch.name, found)
        # float64 constants are pairs of scalar registers on AMD; what does not fit stays in lanes of vector registers.
        assert not found.scalar_spills or dtype == torch.float64, (launch.name, found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_adamw_kernel(grad_dtype, scaled, target):
    """Four tensors in and three out by 16 bytes, of sizes that are no multiple of 16 too, but for the tail. AMD's 64
    lanes a warp leave 8 bytes a lane."""
    whole = _compiled(_adamw_launches(grad_dtype, N, scaled), target)
    odd = _compiled(_adamw_launches(grad_dtype, N + 7, scaled), target)
    assert len(whole) == 1 and len(odd) == 2 and odd[0][0] == whole[0][0]
    for launch, found in odd:
        assert not found.spills and not found.scalar_spills, (launch.name, found)
    assert target == AMD or (whole[0][1].wide_loads >= 4 and whole[0][1].wide_stores >= 3), whole[0][1]


def test_adamw_compiles_once_for_every_seed_and_size():
    kinds = []
    for seed in (0, 1, 2**62):
        for n in (N, 2 * N):
            with recorded_launches() as launches:
                x = torch.zeros(n, dtype=torch.bfloat16)
                KERNELS["adamw_bf16_"](x, x, x, x, torch.ones(()), None, None, seed, 1e-3, 0.9, 0.999, 1e-8, 0.1)
            kinds += launches
    assert all(kind == kinds[0] for kind in kinds)


def test_every_kernel_is_compiled():
    """A kernel that no launcher above reaches would go unseen."""
    import importlib

    from triton.runtime.jit import JITFunction

    modules = [
        importlib.import_module(f"rlhf_kernels.triton.{name}")
        for name in ("token_logprobs", "logits_kl", "gae", "masked_whiten", "ppo_advantages", "ppo_loss", "adamw_bf16")
    ]
    written = {
        (m.__name__, name)
        for m in modules
        for name, f in vars(m).items()
        if isinstance(f, JITFunction) and name.endswith("_kernel")
    }
    launches = [*_row_launches(**ROWS["fp64"]), *_divergence_launches(**ROWS["fp64"]), *_token_launches(torch.float32)]
    launches += _adamw_launches(torch.bfloat16, N, True)
    launched = {(launch.kernel.fn.__module__, launch.name) for launch in launches}
    assert written == launched
