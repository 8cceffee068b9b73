// Count, mean and sum of squared deviations in float64, merged so that a common offset costs nothing (Chan, Golub and
// LeVeque 1979).
#pragma once

#include "cuda/group.cuh"

namespace rlhf::cuda {

struct Moments {
  double count, mean, squares;
};

struct Merge {
  __device__ Moments operator()(const Moments& a, const Moments& b) const {
    const double count = a.count + b.count;
    if (count == 0) return {0, 0, 0};
    const double delta = b.mean - a.mean, share = b.count / count;
    return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share};
  }
};

// One thread's sample: sums of deviations from its first element, which need no division until the end.
struct Sample {
  int64_t count = 0;
  double shift = 0, sum = 0, squares = 0;

  __device__ void add(double x) {
    if (count == 0) shift = x;
    const double deviation = x - shift;
    sum += deviation;
    squares += deviation * deviation;
    ++count;
  }

  __device__ Moments moments() const {
    if (count == 0) return {0, 0, 0};
    const double n = static_cast<double>(count), offset = sum / n;
    return {n, shift + offset, squares - sum * offset};
  }
};

__device__ inline void store_moments(const Sample& sample, Moments* partial) {
  const Moments block = group_reduce<BLOCK>(sample.moments(), Merge());
  if (threadIdx.x == 0) partial[blockIdx.x] = block;
}

// x -> (x - mean) * scale + add
struct Whitening {
  double mean, scale, add;

  __device__ double operator()(double x) const { return (x - mean) * scale + add; }
};

// Every block merges the partial moments of the launch before it, in the same order: cheaper than one more launch for a
// single block.
__device__ inline Whitening whitening(const Moments* partial, int n, bool shift_mean, bool unbiased, double eps) {
  Moments mine = {0, 0, 0};
  for (int i = threadIdx.x; i < n; i += BLOCK) mine = Merge()(mine, partial[i]);
  const Moments all = group_reduce<BLOCK>(mine, Merge());
  const double divisor = all.count - (unbiased ? 1 : 0);
  const double variance = all.squares / (divisor < 1 ? 1 : divisor);
  return {all.mean, 1 / sqrt(variance + eps), shift_mean ? 0 : all.mean};
}

}  // namespace rlhf::cuda
