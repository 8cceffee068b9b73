// The recursion of generalised advantage estimation, parallel over time.
//
// S_t = decay S_next + (1 - lam) V_t + lam r_t on counted tokens, S_t = S_next on skipped ones, and A_t = r_t - V_t +
// gamma S_next. Every token is an affine map of the state after it, and maps compose: four tokens in a thread, threads
// by shuffles, warps in shared memory, tiles by a carry from the end of the sequence, and chunks of a long sequence by
// a launch before that stores each chunk's map.
#pragma once

#include "cuda/group.cuh"
#include "cuda/quads.cuh"
#include "cuda/scan.h"

namespace rlhf::cuda {

// x -> a x + b
template <typename T>
struct Affine {
  T a, b;
};

template <typename T>
__device__ Affine<T> identity() {
  return {T(1), T(0)};
}

template <typename T>
__device__ Affine<T> after(Affine<T> outer, Affine<T> inner) {
  return {outer.a * inner.a, outer.a * inner.b + outer.b};
}

// The composition of all maps of later lanes over `carry`; `carry` becomes that of the whole group.
template <int GROUP, typename T>
__device__ Affine<T> scan_later(Affine<T> own, Affine<T>& carry) {
  const int lane = threadIdx.x % WARP;
  Affine<T> inclusive = own;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    const Affine<T> later = shuffle_down(inclusive, step);
    if (lane + step < WARP) inclusive = after(inclusive, later);
  }
  Affine<T> exclusive = shuffle_down(inclusive, 1);
  if (lane == WARP - 1) exclusive = identity<T>();
  Affine<T> entering = carry;
  if constexpr (GROUP == WARP) {
    carry = after(broadcast_first(inclusive), carry);
  } else {
    __shared__ Affine<T> totals[BLOCK / WARP];
    __syncthreads();  // readers of the last tile are done
    if (lane == 0) totals[threadIdx.x / WARP] = inclusive;
    __syncthreads();
#pragma unroll
    for (int warp = BLOCK / WARP - 1; warp >= 0; --warp) {
      if (warp == static_cast<int>(threadIdx.x / WARP)) entering = carry;
      carry = after(totals[warp], carry);
    }
  }
  return after(exclusive, entering);
}

// A group's share of the work: some of the tiles of one sequence.
template <int GROUP>
struct Chunk {
  int64_t row;
  Range range;          // the whole sequence
  int64_t origin;       // first token of tile 0, a multiple of QUAD
  int64_t first, last;  // tiles

  __device__ Chunk(const Layout& layout, int64_t unit, int chunks) : row(unit / chunks), range(sequence(layout, row)) {
    constexpr int64_t TILE = QUAD * GROUP;
    origin = range.begin / QUAD * QUAD;
    const int64_t tiles = range.begin < range.end ? (range.end - origin + TILE - 1) / TILE : 0;
    const int64_t share = (tiles + chunks - 1) / chunks;
    first = unit % chunks * share < tiles ? unit % chunks * share : tiles;
    last = first + share < tiles ? first + share : tiles;
  }

  // The first of the four tokens of this thread in a tile.
  __device__ int64_t quad(int64_t tile) const { return origin + (tile * GROUP + group_lane<GROUP>()) * QUAD; }
};

// Units of work of this launch: unit = row * chunks + chunk, a group each.
template <int GROUP>
struct Units {
  __device__ static int64_t first() { return blockIdx.x * int64_t(BLOCK / GROUP) + threadIdx.x / GROUP; }
  __device__ static int64_t step() { return gridDim.x * int64_t(BLOCK / GROUP); }
};

// One past the last counted token of a sequence, or its begin where none counts.
template <int GROUP>
__device__ int64_t counted_end(const bool* mask, Range range) {
  if (mask == nullptr) return range.end;
  const int64_t origin = range.begin / QUAD * QUAD;
  for (int64_t tile = (range.end - origin - 1) / (QUAD * GROUP); range.begin < range.end && tile >= 0; --tile) {
    const int64_t first = origin + (tile * GROUP + group_lane<GROUP>()) * QUAD;
    const Quad<bool> counted = load(mask, first, range);
    int64_t end = range.begin;
    for (int i = 0; i < QUAD; ++i) end = counted.at[i] ? first + i + 1 : end;
    end = group_reduce<GROUP>(end, Max());
    if (end > range.begin) return end;
  }
  return range.begin;
}

template <typename T>
struct Tokens {
  Quad<T> rewards, values;  // anything, NaN included, where not counted
  Quad<bool> counted;
};

template <typename T>
struct Recursion {
  T gamma, lam, keep, decay;  // keep = 1 - lam, decay = gamma * lam

  __host__ Recursion(double gamma, double lam)
      : gamma(T(gamma)), lam(T(lam)), keep(T(1 - lam)), decay(T(gamma * lam)) {}

  __device__ Affine<T> map(const Tokens<T>& x, int i, bool gap_step) const {
    if (x.counted.at[i]) return {decay, keep * x.values.at[i] + lam * x.rewards.at[i]};
    return {gap_step ? decay : T(1), T(0)};
  }
};

// Runs a chunk from its last tile to its first and returns its map over `carry`. `load(quad)` gives Tokens; `emit(quad,
// tokens, advantages)` takes the results, which are meaningless where a token does not count. Masked tokens before
// `gap_end` are steps of value and reward 0.
template <int GROUP, typename T, typename Load, typename Emit>
__device__ Affine<T> sweep(const Chunk<GROUP>& chunk, const Recursion<T>& p, int64_t gap_end, Affine<T> carry,
                           Load load, Emit emit) {
  for (int64_t tile = chunk.last - 1; tile >= chunk.first; --tile) {
    const int64_t first = chunk.quad(tile);
    const Tokens<T> tokens = load(first);
    Affine<T> maps[QUAD], own = identity<T>();
#pragma unroll
    for (int i = QUAD - 1; i >= 0; --i) {
      maps[i] = p.map(tokens, i, first + i < gap_end);
      own = after(maps[i], own);
    }
    T next = scan_later<GROUP>(own, carry).b;
    Quad<T> advantages;
#pragma unroll
    for (int i = QUAD - 1; i >= 0; --i) {
      advantages.at[i] = tokens.rewards.at[i] - tokens.values.at[i] + p.gamma * next;
      next = maps[i].a * next + maps[i].b;
    }
    emit(first, tokens, advantages);
  }
  return carry;
}

// The state that a chunk starts from: `boundary` after the end of the sequence, through the maps of the chunks that
// come later in time.
template <int GROUP, typename T>
__device__ Affine<T> entering_state(const Chunk<GROUP>& chunk, int64_t unit, int chunks, T boundary,
                                    const Affine<T>* maps) {
  Affine<T> state = {T(0), boundary};
  const int64_t last_unit = (chunk.row + 1) * chunks - 1;
#pragma unroll 4
  for (int64_t later = last_unit; later > unit; --later) state = after(maps[later], state);
  return state;
}

}  // namespace rlhf::cuda
