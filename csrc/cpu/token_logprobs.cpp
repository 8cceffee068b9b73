#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/logits.h"
#include "cpu/parallel.h"
#include "cpu/token_logprobs_kernel.h"

namespace rlhf {
namespace {

template <class Id>
void check_ids(const Tensor& token_ids, int64_t vocab, int64_t ignore_index) {
  const Id* ids = data<Id>(token_ids);
  for (int64_t row = 0; row < token_ids.numel(); ++row) {
    const int64_t id = ids[row];
    if ((id >= 0 && id < vocab) || id == ignore_index) continue;
    std::vector<int64_t> position(token_ids.dim());
    for (int64_t d = token_ids.dim() - 1, rest = row; d >= 0; --d) {
      position[d] = rest % token_ids.size(d);
      rest /= token_ids.size(d);
    }
    refuse_value("token_ids", "expected ids in [0, " + std::to_string(vocab) +
                                  ") or ignore_index=" + std::to_string(ignore_index) + ", got " + std::to_string(id) +
                                  " at position " + tuple_text(position));
  }
}

void check_rows(const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& temperatures) {
  check_logits("logits", logits, "token_ids", token_ids);
  const ScalarType ids = token_ids.scalar_type();
  if (ids != ScalarType::Long && ids != ScalarType::Int) refuse("token_ids", "expected int64 or int32");
  check_like("token_ids", token_ids, ids, token_ids);
  check_same_device("token_ids", token_ids, logits);
  check_like("temperatures", temperatures, compute_dtype(logits), token_ids);
}

void check_arguments(const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& temperatures,
                     int64_t ignore_index) {
  check_rows(logits, token_ids, temperatures);
  const int64_t vocab = logits.size(token_ids.dim());
  if (token_ids.scalar_type() == ScalarType::Int) {
    check_ids<int32_t>(token_ids, vocab, ignore_index);
  } else {
    check_ids<int64_t>(token_ids, vocab, ignore_index);
  }
}

template <class T>
TokenRows<T> token_rows(const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& temperatures,
                        double temperature, const std::optional<double>& softcap, int64_t ignore_index) {
  TokenRows<T> rows;
  static_cast<LogitRows<T>&>(rows) = logit_rows<T>("logits", logits, temperatures, temperature, softcap);
  rows.ids = token_ids.const_data_ptr();
  rows.narrow_ids = token_ids.scalar_type() == ScalarType::Int;
  rows.ignore_index = ignore_index;
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits, const Tensor& token_ids,
                                                          std::optional<Tensor> temperatures, double temperature,
                                                          std::optional<double> softcap, int64_t ignore_index,
                                                          bool return_entropy) {
  check_arguments(logits, token_ids, temperatures, ignore_index);
  const ScalarType dtype = compute_dtype(logits);
  const auto per_row = [&] { return torch::stable::new_empty(token_ids, token_ids.sizes(), dtype); };
  const Tensor logprobs = per_row(), row_max = per_row(), log_sum = per_row();
  const Tensor entropy = return_entropy ? per_row() : torch::stable::new_empty(token_ids, {0}, dtype);
  with_compute_type(logprobs, [&](auto type) {
    using T = decltype(type);
    ForwardArgs<T> args;
    args.rows = token_rows<T>(logits, token_ids, temperatures, temperature, softcap, ignore_index);
    args.logprobs = mutable_data<T>(logprobs);
    args.entropy = return_entropy ? mutable_data<T>(entropy) : nullptr;
    args.row_max = mutable_data<T>(row_max);
    args.log_sum = mutable_data<T>(log_sum);
    parallel(token_ids.numel(), 1, RLHF_TABLE(token_logprobs_table).forward, args);
  });
  return {logprobs, entropy, row_max, log_sum};
}

// Over the logits where none are given: `grad` holds them then.
void token_logprobs_backward_into(const Tensor& grad, std::optional<Tensor> grad_logprobs,
                                  std::optional<Tensor> grad_entropy, std::optional<Tensor> given_logits,
                                  const Tensor& token_ids, std::optional<Tensor> temperatures, const Tensor& entropy,
                                  const Tensor& row_max, const Tensor& log_sum, double temperature,
                                  std::optional<double> softcap, int64_t ignore_index, int64_t first_id) {
  const Tensor logits = given_logits.value_or(grad);
  check_rows(logits, token_ids, temperatures);
  check_like("grad", grad, logits.scalar_type(), logits);
  const ScalarType dtype = compute_dtype(logits);
  const auto g_logprobs = dense_rows("grad_logprobs", grad_logprobs, dtype, token_ids);
  const auto g_entropy = dense_rows("grad_entropy", grad_entropy, dtype, token_ids);
  if (g_entropy) check_like("entropy", entropy, dtype, token_ids);
  check_like("row_max", row_max, dtype, token_ids);
  check_like("log_sum", log_sum, dtype, token_ids);
  with_compute_type(row_max, [&](auto type) {
    using T = decltype(type);
    BackwardArgs<T> args;
    args.rows = token_rows<T>(logits, token_ids, temperatures, temperature, softcap, ignore_index);
    args.grad_logprobs = data<T>(g_logprobs);
    args.grad_entropy = data<T>(g_entropy);
    args.entropy = data<T>(entropy);
    args.row_max = data<T>(row_max);
    args.log_sum = data<T>(log_sum);
    args.grad_logits = grad.mutable_data_ptr();
    args.first_id = first_id;
    parallel(token_ids.numel(), 1, RLHF_TABLE(token_logprobs_table).backward, args);
  });
}

Tensor token_logprobs_backward(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy,
                               const Tensor& logits, const Tensor& token_ids, std::optional<Tensor> temperatures,
                               const Tensor& entropy, const Tensor& row_max, const Tensor& log_sum, double temperature,
                               std::optional<double> softcap, int64_t ignore_index) {
  check_arguments(logits, token_ids, temperatures, ignore_index);
  const Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  token_logprobs_backward_into(grad, grad_logprobs, grad_entropy, logits, token_ids, temperatures, entropy, row_max,
                               log_sum, temperature, softcap, ignore_index, 0);
  return grad;
}

}  // namespace
}  // namespace rlhf

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&rlhf::token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&rlhf::token_logprobs_backward));
  m.impl("token_logprobs_backward_into", TORCH_BOX(&rlhf::token_logprobs_backward_into));
}
