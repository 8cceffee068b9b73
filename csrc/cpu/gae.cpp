#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/gae_kernel.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"

namespace rlhf {
namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, std::optional<Tensor> mask,
                               std::optional<Tensor> cu_seqlens, std::optional<Tensor> bootstrap_values, double gamma,
                               double lam, bool gap_zero) {
  check_leader("rewards", rewards);
  const ScalarType dtype = rewards.scalar_type();
  const Sequences sequences = sequences_of("rewards", rewards, cu_seqlens);
  check_like("values", values, dtype, rewards);
  check_like("mask", mask, ScalarType::Bool, rewards);
  if (bootstrap_values) check_per_sequence("bootstrap_values", *bootstrap_values, sequences, rewards);
  const Tensor advantages = torch::stable::empty_like(rewards), returns = torch::stable::empty_like(rewards);
  with_compute_type(rewards, [&](auto type) {
    using T = decltype(type);
    const GaeArgs<T> args = {sequences,
                             data<T>(rewards),
                             data<T>(values),
                             data<bool>(mask),
                             data<T>(bootstrap_values),
                             gamma,
                             lam,
                             gap_zero,
                             mutable_data<T>(advantages),
                             mutable_data<T>(returns)};
    parallel(sequences.count, sequence_grain(sequences, rewards.numel()), RLHF_TABLE(gae_table), args);
  });
  return {advantages, returns};
}

}  // namespace
}  // namespace rlhf

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("gae", TORCH_BOX(&rlhf::gae)); }
