// Estimators of the KL divergence at x = logprobs - ref_logprobs; codes in the order of ESTIMATORS in ops/token_kl.py.
#pragma once

#include <cuda_runtime.h>

namespace rlhf::cuda {

constexpr int KL_VALUES = 4;  // k1, abs, k2, k3; the next four are the same values with the gradient of k2

template <typename T>
__device__ T kl_value(T x, int estimator) {
  switch (estimator % KL_VALUES) {
    case 0:
      return x;
    case 1:
      return x < 0 ? -x : x;
    case 2:
      return T(0.5) * x * x;
    default:
      return expm1(-x) + x;
  }
}

template <typename T>
__device__ T kl_gradient(T x, int estimator) {
  switch (estimator) {
    case 0:
      return T(1);
    case 1:
      return T((x > 0) - (x < 0));
    case 3:
      return -expm1(-x);
    default:
      return x;
  }
}

// x in [-bound, bound]; NaN stays NaN.
template <typename T>
__device__ T clamp_to(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

}  // namespace rlhf::cuda
