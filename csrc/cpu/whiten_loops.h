// Moments and whitening of a contiguous range, in double.
#pragma once

#include "common/moments.h"
#include "common/vec.h"

namespace rlhf::RLHF_ISA {
namespace {

// Deviations are from a counted element near the front, not from 0, so that one pass loses nothing to a common offset.
template <class T>
Moments masked_moments(const T* x, const bool* mask, int64_t n) {
  constexpr int64_t kStep = kLanes<double>;
  int64_t first = 0;
  while (mask && first < n && !mask[first]) ++first;
  if (first >= n) return {};
  const double pivot = x[first];
  const Vec<double> zero{}, one = zero + 1;
  Vec<double> total{}, count{}, squares{};
  for (int64_t i = 0; i < n; i += kStep) {
    const Mask<double> counted = load_mask<double>(mask ? mask + i : nullptr, n - i);
    const Vec<double> deviation = counted ? load_wide(x + i, n - i) - pivot : zero;
    count += counted ? one : zero;
    total += deviation;
    squares += deviation * deviation;
  }
  const double tokens = sum<double>(count), mean = sum<double>(total) / tokens;
  return {tokens, pivot + mean, sum<double>(squares) - tokens * mean * mean};
}

// `out` may be `x`.
template <class T>
void whiten(const T* x, const bool* mask, int64_t n, const Whitening& by, T* out) {
  constexpr int64_t kStep = kLanes<double>;
  const Vec<double> mean = broadcast(by.mean), scale = broadcast(by.scale), shift = broadcast(by.shift);
  for (int64_t i = 0; i < n; i += kStep) {
    const Mask<double> counted = load_mask<double>(mask ? mask + i : nullptr, n - i);
    const Vec<double> y = (load_wide(x + i, n - i) - mean) * scale + shift;
    store_wide(out + i, counted ? y : Vec<double>{}, n - i);
  }
}

}  // namespace
}  // namespace rlhf::RLHF_ISA
