#pragma once

#include "cuda/layout.h"

namespace rlhf::cuda {

constexpr int MOMENTS = 3;  // float64 numbers of one block's partial moments

struct WhitenOptions {
  bool shift_mean, unbiased;
  double eps;
};

// Partial moments of the counted elements: `partial` is (token_grid(tokens), MOMENTS).
template <typename T>
void masked_moments(const T* x, const bool* mask, int64_t tokens, double* partial, void* stream);

// Whitens with the moments that `n_partial` blocks left; `out` may be `x`.
template <typename T>
void whiten(const T* x, const bool* mask, int64_t tokens, const double* partial, int n_partial, WhitenOptions options,
            T* out, void* stream);

}  // namespace rlhf::cuda
