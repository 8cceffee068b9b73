#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/checks.h"
#include "cpu/masked_whiten_kernel.h"
#include "cpu/parallel.h"

namespace rlhf {
namespace {

Tensor masked_whiten(const Tensor& x, std::optional<Tensor> mask, bool shift_mean, bool unbiased, double eps) {
  check_leader("x", x);
  check_like("mask", mask, ScalarType::Bool, x);
  const Tensor out = torch::stable::empty_like(x);
  with_compute_type(x, [&](auto type) {
    using T = decltype(type);
    const auto& kernels = RLHF_TABLE(masked_whiten_table);
    std::vector<Moments> parts((x.numel() + kWhitenPart - 1) / kWhitenPart);
    const int64_t count = static_cast<int64_t>(parts.size());
    WhitenArgs<T> args = {data<T>(x), data<bool>(mask), x.numel(), parts.data(), {}, mutable_data<T>(out)};
    parallel(count, 1, kernels.moments, args);
    args.by = whitening(merge(parts.data(), count), shift_mean, unbiased, eps);
    parallel(count, 1, kernels.apply, args);
  });
  return out;
}

}  // namespace
}  // namespace rlhf

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("masked_whiten", TORCH_BOX(&rlhf::masked_whiten)); }
