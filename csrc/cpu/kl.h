// Estimators of the KL per token at x = logprob - reference logprob, numbered as ESTIMATORS in
// rlhf_kernels/ops/token_kl.py.
#pragma once

#include "common/vec_math.h"

namespace rlhf::RLHF_ISA {
namespace {

// k1, abs, k2, k3; the same values again for the estimators with a plus.
template <class T>
RLHF_INLINE Vec<T> kl_value(Vec<T> x, int64_t estimator) {
  switch (estimator % 4) {
    case 0:
      return x;
    case 1:
      return abs<T>(x);
    case 2:
      return T(0.5) * x * x;
    default:
      return exp_pair(-x).expm1 + x;
  }
}

// d kl_value / dx; with a plus, the gradient of k2.
template <class T>
RLHF_INLINE Vec<T> kl_gradient(Vec<T> x, int64_t estimator) {
  const Vec<T> zero{}, one = zero + 1;
  switch (estimator) {
    case 0:
      return one;
    case 1:
      return x > 0 ? one : (x < 0 ? -one : x);
    case 3:
      return -exp_pair(-x).expm1;
    default:
      return x;
  }
}

}  // namespace
}  // namespace rlhf::RLHF_ISA
