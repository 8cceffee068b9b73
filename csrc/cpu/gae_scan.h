// The recursion of generalised advantage estimation over one sequence, last token first.
#pragma once

#include "common/vec.h"

namespace rlhf::RLHF_ISA {
namespace {

// The state is double: values of 1e4 would leave three digits of a float advantage.
struct GaeScan {
  double gamma, decay;  // decay = gamma * lam
  bool gap_zero;
  double next_value;
  double next_advantage = 0;
  bool gap_counts = false;  // gap_zero, and a counted token comes later

  RLHF_INLINE void skip() {
    if (!gap_counts) return;
    next_advantage = gamma * next_value + decay * next_advantage;
    next_value = 0;
  }

  // Advantage of a counted token.
  RLHF_INLINE double step(double reward, double value) {
    next_advantage = (reward - value + gamma * next_value) + decay * next_advantage;
    next_value = value;
    gap_counts = gap_zero;
    return next_advantage;
  }
};

// Lane i of the result is lane i + shift of x; `fill` beyond its end.
template <int kShift>
RLHF_INLINE Vec<double> from_later(Vec<double> x, Vec<double> fill) {
  Mask<double> index;
  for (int i = 0; i < kLanes<double>; ++i) index[i] = i + kShift;
  return __builtin_shuffle(x, fill, index);
}

// kLanes tokens that all count, in log2(kLanes) steps. A product and a sum a token, each waiting for the last, took 1.8
// ms instead of 0.9 (512 x 2048 float, one core of a Xeon with AVX-512).
struct GaeBlock {
  Vec<double> powers;  // lane i: decay ^ (kLanes - i)

  explicit GaeBlock(double decay) {
    double power = 1;
    for (int i = kLanes<double> - 1; i >= 0; --i) powers[i] = power *= decay;
  }

  template <int kShift>
  RLHF_INLINE Vec<double> scan(Vec<double> x) const {
    if constexpr (kShift < kLanes<double>) {
      return scan<2 * kShift>(x + powers[kLanes<double> - kShift] * from_later<kShift>(x, Vec<double>{}));
    }
    return x;
  }

  RLHF_INLINE Vec<double> operator()(GaeScan& state, Vec<double> rewards, Vec<double> values) const {
    const Vec<double> next_values = from_later<1>(values, broadcast(state.next_value));
    const Vec<double> deltas = rewards - values + state.gamma * next_values;
    const Vec<double> advantages = scan<1>(deltas) + powers * state.next_advantage;
    state.next_advantage = advantages[0];
    state.next_value = values[0];
    state.gap_counts = state.gap_zero;
    return advantages;
  }
};

template <class T>
void gae_scan(const T* rewards, const T* values, const bool* mask, int64_t n, GaeScan state, T* advantages,
              T* returns) {
  constexpr int kBlock = kLanes<double>;
  const GaeBlock block(state.decay);
  for (int64_t t = n - 1; t >= 0; --t) {
    if (mask && !mask[t]) {
      advantages[t] = returns[t] = 0;
      state.skip();
      continue;
    }
    bool all_count = t >= kBlock - 1;
    for (int i = 1; mask && all_count && i < kBlock; ++i) all_count = mask[t - i];
    if (all_count) {
      t -= kBlock - 1;
      const Vec<double> value = load_wide(values + t, kBlock);
      const Vec<double> advantage = block(state, load_wide(rewards + t, kBlock), value);
      store_wide(advantages + t, advantage, kBlock);
      store_wide(returns + t, advantage + value, kBlock);
    } else {
      const double advantage = state.step(rewards[t], values[t]);
      advantages[t] = static_cast<T>(advantage);
      returns[t] = static_cast<T>(advantage + values[t]);
    }
  }
}

}  // namespace
}  // namespace rlhf::RLHF_ISA
