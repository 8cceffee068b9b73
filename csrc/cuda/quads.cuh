// Tokens in groups of four: 16-byte accesses where the pointer allows them, single ones at the ends of a sequence.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/layout.h"

namespace rlhf::cuda {

constexpr int QUAD = 4;

template <typename T>
struct alignas(16) Quad {
  T at[QUAD];
};

template <>
struct alignas(4) Quad<bool> {
  bool at[QUAD];
};

struct Range {
  int64_t begin, end;
};

// Bounds that do not rise from 0 to N give empty or short sequences, never an access outside the tensor.
__device__ inline Range sequence(const Layout& layout, int64_t row) {
  int64_t begin = row * layout.length, end = begin + layout.length;
  if (layout.cu_seqlens != nullptr) {
    begin = layout.cu_seqlens[row];
    end = layout.cu_seqlens[row + 1];
  }
  begin = begin < 0 ? 0 : begin > layout.tokens ? layout.tokens : begin;
  end = end < begin ? begin : end > layout.tokens ? layout.tokens : end;
  return {begin, end};
}

template <typename T>
__device__ bool whole(const T* x, int64_t first, Range range) {
  const bool aligned = reinterpret_cast<uintptr_t>(x + first) % alignof(Quad<T>) == 0;
  return aligned && first >= range.begin && first + QUAD <= range.end;
}

// x[first .. first + 3]; what lies outside the range is not read and comes back as 0.
template <typename T>
__device__ Quad<T> load(const T* x, int64_t first, Range range) {
  if (whole(x, first, range)) return *reinterpret_cast<const Quad<T>*>(x + first);
  Quad<T> out;
  for (int i = 0; i < QUAD; ++i) {
    const int64_t token = first + i;
    out.at[i] = token >= range.begin && token < range.end ? x[token] : T(0);
  }
  return out;
}

// The same for an input that may be absent.
template <typename T>
__device__ Quad<T> load_or_zero(const T* x, int64_t first, Range range) {
  return x == nullptr ? Quad<T>{} : load(x, first, range);
}

// By intrinsics, because nvcc 13.0 splits a struct's store into words where its members are chosen one by one.
__device__ inline void store_whole(float* x, const Quad<float>& value) {
  __stcg(reinterpret_cast<float4*>(x), make_float4(value.at[0], value.at[1], value.at[2], value.at[3]));
}

__device__ inline void store_whole(double* x, const Quad<double>& value) {
  __stcg(reinterpret_cast<double2*>(x), make_double2(value.at[0], value.at[1]));
  __stcg(reinterpret_cast<double2*>(x) + 1, make_double2(value.at[2], value.at[3]));
}

template <typename T>
__device__ void store(T* x, int64_t first, Range range, const Quad<T>& value) {
  if (whole(x, first, range)) return store_whole(x + first, value);
  for (int i = 0; i < QUAD; ++i) {
    const int64_t token = first + i;
    if (token >= range.begin && token < range.end) x[token] = value.at[i];
  }
}

// Which of the four tokens count: inside the range and not masked.
__device__ inline Quad<bool> load_counted(const bool* mask, int64_t first, Range range) {
  if (mask != nullptr) return load(mask, first, range);
  Quad<bool> out;
  for (int i = 0; i < QUAD; ++i) out.at[i] = first + i >= range.begin && first + i < range.end;
  return out;
}

}  // namespace rlhf::cuda
