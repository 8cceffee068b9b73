// The recursion of generalised advantage estimation over one sequence, last token first.
#pragma once

#include "common/vec.h"

namespace rlhf::RLHF_ISA {
namespace {

struct GaeOptions {
  double gamma, lam;
  bool gap_zero;
};

// The state is double: values of 1e4 would leave three digits of a float advantage, and the conversions stand off the
// chain of the recursion.
template <class T>
void gae_scan(const T* rewards, const T* values, const bool* mask, int64_t n, double next_value,
              const GaeOptions& options, T* advantages, T* returns) {
  const double gamma = options.gamma, decay = options.gamma * options.lam;
  double next_advantage = 0;
  bool gap_counts = false;  // gap_zero, and a counted token comes later
  for (int64_t t = n - 1; t >= 0; --t) {
    if (mask && !mask[t]) {
      advantages[t] = returns[t] = 0;
      if (gap_counts) {
        next_advantage = gamma * next_value + decay * next_advantage;
        next_value = 0;
      }
      continue;
    }
    const double value = values[t];
    next_advantage = (rewards[t] - value + gamma * next_value) + decay * next_advantage;
    next_value = value;
    gap_counts = options.gap_zero;
    advantages[t] = static_cast<T>(next_advantage);
    returns[t] = static_cast<T>(next_advantage + value);
  }
}

}  // namespace
}  // namespace rlhf::RLHF_ISA
