// Shuffles and reductions of a group of threads: a warp (GROUP = WARP) or the block (GROUP = BLOCK). Every thread of
// the group takes part.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/layout.h"

namespace rlhf::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;

// Applies a 32-bit shuffle to every word of a struct.
template <typename V, typename Shuffle>
__device__ V shuffle_words(V value, Shuffle shuffle) {
  static_assert(sizeof(V) % 4 == 0, "shuffles move whole words");
  constexpr int WORDS = sizeof(V) / 4;
  uint32_t words[WORDS];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = shuffle(words[i]);
  memcpy(&value, words, sizeof(V));
  return value;
}

template <typename V>
__device__ V shuffle_down(V value, int step) {
  return shuffle_words(value, [step](uint32_t word) { return __shfl_down_sync(ALL_LANES, word, step); });
}

template <typename V>
__device__ V shuffle_xor(V value, int step) {
  return shuffle_words(value, [step](uint32_t word) { return __shfl_xor_sync(ALL_LANES, word, step); });
}

template <typename V>
__device__ V broadcast_first(V value) {
  return shuffle_words(value, [](uint32_t word) { return __shfl_sync(ALL_LANES, word, 0); });
}

template <int GROUP>
__device__ int group_lane() {
  return threadIdx.x % GROUP;
}

// op, which must commute, over the group: the same result in every run, and of a block in every thread.
template <int GROUP, typename V, typename Op>
__device__ V group_reduce(V value, Op op) {
  static_assert(GROUP == WARP || GROUP == BLOCK, "a group is a warp or the block");
  for (int step = WARP / 2; step > 0; step /= 2) value = op(value, shuffle_xor(value, step));
  if constexpr (GROUP == BLOCK) {
    __shared__ V partial[BLOCK / WARP];
    __syncthreads();  // readers of the last call are done
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = value;
    __syncthreads();
    value = partial[0];
    for (int warp = 1; warp < BLOCK / WARP; ++warp) value = op(value, partial[warp]);
  }
  return value;
}

struct Add {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

struct Max {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

}  // namespace rlhf::cuda
