// Moments and whitening of a contiguous range, in double.
#pragma once

#include "common/moments.h"
#include "common/vec.h"

namespace rlhf::RLHF_ISA {
namespace {

template <class T>
Moments masked_moments(const T* x, const bool* mask, int64_t n) {
  constexpr int64_t kStep = kLanes<double>;
  const Vec<double> zero{}, one = zero + 1;
  Vec<double> total{}, count{}, squares{};
  for (int64_t i = 0; i < n; i += kStep) {
    const Mask<double> counted = load_mask<double>(mask ? mask + i : nullptr, n - i);
    total += counted ? load_wide(x + i, n - i) : zero;
    count += counted ? one : zero;
  }
  Moments moments;
  moments.count = sum<double>(count);
  if (moments.count == 0) return moments;
  moments.mean = sum<double>(total) / moments.count;
  const Vec<double> mean = broadcast(moments.mean);
  for (int64_t i = 0; i < n; i += kStep) {
    const Mask<double> counted = load_mask<double>(mask ? mask + i : nullptr, n - i);
    const Vec<double> deviation = counted ? load_wide(x + i, n - i) - mean : zero;
    squares += deviation * deviation;
  }
  moments.squares = sum<double>(squares);
  return moments;
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
