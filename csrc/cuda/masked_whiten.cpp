#include "cuda/masked_whiten.h"

#include "cuda/host.h"

namespace rlhf::cuda {

Tensor masked_whiten_op(Tensor x, OptionalTensor mask, bool shift_mean, bool unbiased, double eps) {
  const Call call("x", x);
  const int64_t tokens = x.numel();
  const Tensor out = call.like();
  const int blocks = token_grid(tokens);
  const Tensor moments = call.scratch(blocks * MOMENTS, ScalarType::Double);
  with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T* in = data<T>(x);
    const bool* counted = call.mask(mask);
    double* partial = mutable_data<double>(moments);
    if (tokens == 0) return;
    masked_moments(in, counted, tokens, partial, call.stream());
    whiten(in, counted, tokens, partial, blocks, {shift_mean, unbiased, eps}, mutable_data<T>(out), call.stream());
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, m) { m.impl("masked_whiten", TORCH_BOX(&masked_whiten_op)); }

}  // namespace rlhf::cuda
