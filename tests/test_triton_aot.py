"""Every Triton kernel, compiled ahead of time as its launcher would launch it: no spills, the logits by 16 bytes."""

import os
from itertools import chain

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.aot import AMD, NVIDIA, Launch, compile_launch, recorded_launches, resources
from benchmarks.launches import (
    ROWS,
    VIEW_OF_GPT2,
    N,
    adamw_launches,
    distinct,
    divergence_launches,
    row_launches,
    tile_launches,
    token_launches,
    written_kernels,
)
from rlhf_kernels.triton import KERNELS

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter Triton's own functions cannot be compiled"
)
TARGETS = [pytest.param(target, marks=[] if target == "cuda:90" else [pytest.mark.slow]) for target in (*NVIDIA, AMD)]


def _compiled(launches: list[Launch], target: str) -> list[tuple[Launch, object]]:
    return [(launch, resources(*compile_launch(launch, target))) for launch in distinct(launches)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", ROWS)
def test_row_kernels(case, target):
    """No spills, 16-byte loads whatever the vocabulary and the view, 16-byte stores where the gradient's rows allow."""
    used = _compiled(row_launches(**ROWS[case]), target)
    assert [launch.name for launch, _ in used] == ["_forward_kernel", "_backward_kernel"]
    for launch, found in used:
        assert not found.spills and not found.scalar_spills, (launch.name, found)
        assert found.wide_loads, (launch.name, found)
    # A gradient of 50257 columns has rows at other distances from 16 bytes than those of a view on the logits.
    assert used[1][1].wide_stores or ROWS[case] is VIEW_OF_GPT2, used[1][1]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("launches", [tile_launches, divergence_launches], ids=["tiles", "divergence"])
def test_row_kernels_of_ops_on_hidden_states(launches, case, target):
    for launch, found in _compiled(launches(**ROWS[case]), target):
        assert not found.spills and not found.scalar_spills, (launch.name, found)
        assert found.wide_loads, (launch.name, found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_token_kernels(dtype, target):
    used = _compiled(list(chain(*token_launches(dtype).values())), target)
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
    whole = _compiled(adamw_launches(grad_dtype, N, scaled), target)
    odd = _compiled(adamw_launches(grad_dtype, N + 7, scaled), target)
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
    launches = [*row_launches(**ROWS["fp64"]), *divergence_launches(**ROWS["fp64"])]
    launches += [*chain(*token_launches(torch.float32).values()), *adamw_launches(torch.bfloat16, N, True)]
    assert written_kernels() == {(launch.kernel.fn.__module__, launch.name) for launch in launches}
