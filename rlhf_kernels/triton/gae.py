"""GAE on GPUs as a scan of affine maps, from the end of a sequence to its beginning.

With S_t = (1 - lam) V_t + lam r_t + gamma lam S_next, A_t = r_t - V_t + gamma S_next: a token is the map s -> a s + b,
skipped tokens are the identity, and S after the last counted token is the bootstrap value, or 0. A block of lanes scans
the maps of the *next* tokens, so that each lane gets its S_next. Lanes run backwards in time, so that the scan needs no
reverse=True, which was reported wrong for maps that do not commute (triton-lang/triton#4362).

Two strategies, one kernel. Usually a program walks a sequence block by block, carrying S. Few long sequences would
leave a GPU idle: then each block is a program of its own, and starts from the composed maps of the later blocks, which
a first launch has stored.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._layout import check_cu_seqlens
from ._common import check_tokens, counted, last_counted, launch, sequence_bounds

BLOCK = 1024
FEW_SEQUENCES, LONG = 64, 8 * BLOCK  # at most so many, at least so long, are cut into blocks: an estimate, never timed
MOST_BLOCKS = 65535  # of a grid's second axis


@triton.jit
def _compose(a_late, b_late, a_early, b_early):
    return a_early * a_late, a_early * b_late + b_early


@triton.jit
def _sequence(cu_seqlens, length, n_tokens):
    """(where this program's sequence begins, its tokens): positions inside it are int32, for registers."""
    begin, end = sequence_bounds(tl.program_id(0).to(tl.int64), cu_seqlens, length, n_tokens)
    return begin, (end - begin).to(tl.int32)


@triton.jit
def _next_maps(rewards, values, mask, position, inside, n, last, gamma, lam, GAP_ZERO: tl.constexpr):
    """The maps (a, b) of the tokens that follow `position`; the identity for a skipped one and after the last."""
    DTYPE: tl.constexpr = rewards.dtype.element_ty
    following = position + 1
    counts = counted(mask, following, inside & (following < n))
    r = tl.load(rewards + following, mask=counts, other=0.0)
    v = tl.load(values + following, mask=counts, other=0.0)
    steps = inside & (following <= last) if GAP_ZERO else counts
    # 1 - lam and gamma lam are rounded once: 1 - float32(0.999) would be wrong in the fifth digit.
    a = tl.where(steps, tl.full((), gamma * lam, DTYPE), 1.0)
    return a, tl.where(counts, tl.full((), 1.0 - lam, DTYPE) * v + tl.full((), lam, DTYPE) * r, 0.0)


@triton.jit
def _last_lane(x, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0), 0)


@triton.jit
def _later(maps, s, n_maps, BLOCK: tl.constexpr):
    """s after the maps 0 .. n_maps - 1, the last one first. maps is interleaved: a0 b0 a1 b1 ..."""
    for start in range(0, n_maps, BLOCK):
        index = n_maps - 1 - start - tl.arange(0, BLOCK)
        a = tl.load(maps + 2 * index, mask=index >= 0, other=1.0)
        b = tl.load(maps + 2 * index + 1, mask=index >= 0, other=0.0)
        a, b = tl.associative_scan((a, b), 0, _compose)
        s = _last_lane(a, BLOCK) * s + _last_lane(b, BLOCK)
    return s


@triton.jit
def _block_maps_kernel(
    rewards, values, mask, cu_seqlens, maps, length, n_tokens, gamma: tl.float64, lam: tl.float64,
    GAP_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Composes the maps of one block of a sequence into maps (B, blocks, 2)."""
    begin, n = _sequence(cu_seqlens, length, n_tokens)
    rewards += begin
    values += begin
    mask = None if mask is None else mask + begin
    block = tl.program_id(1)
    low = block * BLOCK
    if low < n:
        last = last_counted(mask, 0, n, BLOCK) if GAP_ZERO else n
        position = tl.minimum(low + BLOCK, n) - 1 - tl.arange(0, BLOCK)
        a, b = _next_maps(rewards, values, mask, position, position >= low, n, last, gamma, lam, GAP_ZERO)
        a, b = tl.associative_scan((a, b), 0, _compose)
        at = maps + 2 * (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + block)
        tl.store(at, _last_lane(a, BLOCK))
        tl.store(at + 1, _last_lane(b, BLOCK))


@triton.jit
def _gae_kernel(
    rewards, values, mask, cu_seqlens, bootstrap_values, maps, advantages, returns, length, n_tokens,
    gamma: tl.float64, lam: tl.float64, GAP_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without `maps` a program has a whole sequence, with them one block of it."""
    DTYPE: tl.constexpr = rewards.dtype.element_ty
    begin, n = _sequence(cu_seqlens, length, n_tokens)
    rewards += begin
    values += begin
    mask = None if mask is None else mask + begin
    advantages += begin
    returns += begin
    last = last_counted(mask, 0, n, BLOCK) if GAP_ZERO else n
    sequence = tl.program_id(0).to(tl.int64)
    s = tl.full((), 0.0, DTYPE)
    if bootstrap_values is not None:
        s = tl.load(bootstrap_values + sequence)
    low, high = 0, n
    if maps is not None:
        block = tl.program_id(1)
        low = block * BLOCK
        high = tl.minimum(low + BLOCK, n)
        s = _later(maps + 2 * (sequence * tl.num_programs(1) + block + 1), s, tl.cdiv(n, BLOCK) - 1 - block, BLOCK)
    for start in range(0, high - low, BLOCK):
        position = high - 1 - start - tl.arange(0, BLOCK)
        inside = position >= low
        a, b = _next_maps(rewards, values, mask, position, inside, n, last, gamma, lam, GAP_ZERO)
        a, b = tl.associative_scan((a, b), 0, _compose)
        s_next = a * s + b
        counts = counted(mask, position, inside)
        r = tl.load(rewards + position, mask=counts, other=0.0)
        v = tl.load(values + position, mask=counts, other=0.0)
        advantage = tl.where(counts, r - v + tl.full((), gamma, DTYPE) * s_next, 0.0)
        tl.store(advantages + position, advantage, mask=inside)
        tl.store(returns + position, advantage + v, mask=inside)
        s = _last_lane(s_next, BLOCK)


def gae(
    rewards: Tensor,  # (B, T) or (N,), contiguous, as all below
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap_values: Tensor | None,
    gamma: float,
    lam: float,
    gap_zero: bool,
) -> tuple[Tensor, Tensor]:
    check_tokens(rewards, rewards=rewards, values=values, mask=mask)
    check_cu_seqlens(cu_seqlens, rewards.numel())
    advantages, returns = rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
    if not rewards.numel():
        return advantages, returns
    longest = rewards.shape[-1]  # packed: an upper bound
    n_sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    block = min(max(triton.next_power_of_2(longest), 128), BLOCK)
    sizes = {"GAP_ZERO": gap_zero, "BLOCK": block, "num_warps": block // 128}
    tokens, layout = (rewards, values, mask, cu_seqlens), (longest, rewards.numel(), gamma, lam)
    maps, blocks = None, 1
    if n_sequences <= FEW_SEQUENCES and LONG <= longest <= MOST_BLOCKS * BLOCK:
        blocks = triton.cdiv(longest, BLOCK)
        maps = rewards.new_empty((n_sequences, blocks, 2))
        launch(_block_maps_kernel, (n_sequences, blocks), rewards, *tokens, maps, *layout, **sizes)
    results = (maps, advantages, returns)
    launch(_gae_kernel, (n_sequences, blocks), rewards, *tokens, bootstrap_values, *results, *layout, **sizes)
    return advantages, returns
