// Count, mean and sum of squared deviations of a sample.
#pragma once

#include <cmath>
#include <cstdint>

namespace rlhf {

struct Moments {
  double count = 0, mean = 0, squares = 0;
};

// The moments of all parts together, in their order: exact where sums of squares would cancel (Chan, Golub and LeVeque
// 1979), and the same however many threads made the parts.
inline Moments merge(const Moments* parts, int64_t n) {
  Moments all;
  for (int64_t i = 0; i < n; ++i) {
    const Moments& part = parts[i];
    if (part.count == 0) continue;
    const double total = all.count + part.count, step = part.mean - all.mean;
    all.squares += part.squares + step * step * (all.count / total) * part.count;
    all.mean += step * (part.count / total);
    all.count = total;
  }
  return all;
}

// y = (x - mean) * scale + shift
struct Whitening {
  double mean, scale, shift;
};

inline Whitening whitening(const Moments& moments, bool shift_mean, bool unbiased, double eps) {
  const double freedom = moments.count - (unbiased ? 1 : 0);
  const double variance = moments.squares / (freedom > 1 ? freedom : 1);
  return {moments.mean, 1 / std::sqrt(variance + eps), shift_mean ? 0 : moments.mean};
}

}  // namespace rlhf
