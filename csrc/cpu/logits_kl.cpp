#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/logits.h"
#include "cpu/logits_kl_kernel.h"
#include "cpu/parallel.h"

namespace rlhf {
namespace {

std::vector<int64_t> saved_shape(const Tensor& per_row) {
  std::vector<int64_t> shape{kSaved};
  for (int64_t size : per_row.sizes()) shape.push_back(size);
  return shape;
}

// `per_row` has the leading shape of the logits.
void check_arguments(const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask,
                     const std::optional<Tensor>& temperatures, const Tensor& per_row) {
  check_logits("logits", logits, "kl", per_row);
  check_logits("ref_logits", ref_logits, "kl", per_row);
  if (ref_logits.scalar_type() != logits.scalar_type() || !same_shape(ref_logits, logits))
    refuse("ref_logits", "expected the dtype and the shape of logits");
  check_same_device("ref_logits", ref_logits, logits);
  check_like("mask", mask, ScalarType::Bool, per_row);
  check_like("temperatures", temperatures, compute_dtype(logits), per_row);
}

template <class T>
KlRows<T> kl_rows(const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask,
                  const std::optional<Tensor>& temperatures, double temperature, const std::optional<double>& softcap,
                  int64_t direction, int64_t count) {
  return {logit_rows<T>("logits", logits, temperatures, temperature, softcap),
          logit_rows<T>("ref_logits", ref_logits, temperatures, temperature, softcap), data<bool>(mask), count,
          direction == 1};
}

std::tuple<Tensor, Tensor> logits_kl(const Tensor& logits, const Tensor& ref_logits, std::optional<Tensor> mask,
                                     std::optional<Tensor> temperatures, double temperature,
                                     std::optional<double> softcap, int64_t direction) {
  if (logits.dim() < 1) refuse("logits", "expected (..., V), got ()");
  const ScalarType dtype = compute_dtype(logits);
  const IntHeaderOnlyArrayRef sizes = logits.sizes();
  const std::vector<int64_t> leading(sizes.begin(), sizes.end() - 1);
  const Tensor kl = torch::stable::new_empty(logits, leading, dtype);
  check_arguments(logits, ref_logits, mask, temperatures, kl);
  const Tensor saved = torch::stable::new_empty(logits, saved_shape(kl), dtype);
  with_compute_type(kl, [&](auto type) {
    using T = decltype(type);
    KlForwardArgs<T> args;
    args.rows = kl_rows<T>(logits, ref_logits, mask, temperatures, temperature, softcap, direction, kl.numel());
    args.kl = mutable_data<T>(kl);
    args.saved = mutable_data<T>(saved);
    parallel(kl.numel(), 1, RLHF_TABLE(logits_kl_table).forward, args);
  });
  return {kl, saved};
}

// Over the logits where none are given: `grad` holds them then.
void logits_kl_backward_into(const Tensor& grad, const Tensor& grad_kl, std::optional<Tensor> given_logits,
                             const Tensor& ref_logits, std::optional<Tensor> mask, std::optional<Tensor> temperatures,
                             const Tensor& saved, double temperature, std::optional<double> softcap,
                             int64_t direction) {
  const Tensor logits = given_logits.value_or(grad);
  const Tensor upstream = torch::stable::contiguous(grad_kl);
  check_arguments(logits, ref_logits, mask, temperatures, upstream);
  check_like("grad", grad, logits.scalar_type(), logits);
  const ScalarType dtype = compute_dtype(logits);
  check_like("grad_kl", upstream, dtype, upstream);
  const Tensor dense_saved = torch::stable::contiguous(saved);
  check_dense("saved", dense_saved, dtype, logits);
  if (dense_saved.numel() != kSaved * upstream.numel()) refuse("saved", "expected six numbers a row");
  with_compute_type(upstream, [&](auto type) {
    using T = decltype(type);
    KlBackwardArgs<T> args;
    args.rows = kl_rows<T>(logits, ref_logits, mask, temperatures, temperature, softcap, direction, upstream.numel());
    args.grad_kl = data<T>(upstream);
    args.saved = data<T>(dense_saved);
    args.grad_logits = grad.mutable_data_ptr();
    parallel(upstream.numel(), 1, RLHF_TABLE(logits_kl_table).backward, args);
  });
}

}  // namespace
}  // namespace rlhf

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("logits_kl", TORCH_BOX(&rlhf::logits_kl));
  m.impl("logits_kl_backward_into", TORCH_BOX(&rlhf::logits_kl_backward_into));
}
