#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/parallel.h"
#include "cpu/token_logprobs_kernel.h"

namespace rlhf {
namespace {

LogitsType logits_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return LogitsType::kFloat;
    case ScalarType::Double:
      return LogitsType::kDouble;
    case ScalarType::BFloat16:
      return LogitsType::kBFloat16;
    case ScalarType::Half:
      return LogitsType::kFloat16;
    default:
      refuse("logits", "expected float32, float64, bfloat16 or float16");
  }
}

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
  const int64_t dims = logits.dim() - 1;
  if (dims < 0 || dims != token_ids.dim()) refuse("logits", "expected one dimension more than token_ids");
  for (int64_t d = 0; d < dims; ++d) {
    if (logits.size(d) != token_ids.size(d))
      refuse("logits", "expected the leading shape " + tuple_text(token_ids.sizes()) + " of token_ids, got " +
                           tuple_text(logits.sizes()));
  }
  if (logits.size(dims) > 1 && logits.stride(dims) != 1)
    refuse("logits", "expected the last stride to be 1; call .contiguous()");
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
RowArgs<T> row_args(const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& temperatures,
                    double temperature, const std::optional<double>& softcap, int64_t ignore_index) {
  RowArgs<T> rows;
  rows.logits = logits.const_data_ptr();
  rows.type = logits_type(logits);
  rows.dims = token_ids.dim();
  rows.vocab = logits.size(rows.dims);
  rows.sizes = logits.sizes().data();
  rows.strides = logits.strides().data();
  rows.ids = token_ids.const_data_ptr();
  rows.narrow_ids = token_ids.scalar_type() == ScalarType::Int;
  rows.ignore_index = ignore_index;
  rows.temperatures = data<T>(temperatures);
  rows.temperature = temperature;
  rows.softcap = softcap.value_or(0);
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
    args.rows = row_args<T>(logits, token_ids, temperatures, temperature, softcap, ignore_index);
    args.logprobs = mutable_data<T>(logprobs);
    args.entropy = return_entropy ? mutable_data<T>(entropy) : nullptr;
    args.row_max = mutable_data<T>(row_max);
    args.log_sum = mutable_data<T>(log_sum);
    parallel(token_ids.numel(), 1, RLHF_TABLE(token_logprobs_table).forward, args);
  });
  return {logprobs, entropy, row_max, log_sum};
}

// A saved or upstream per-row tensor, made contiguous: .sum() sends a gradient of stride 0.
std::optional<Tensor> dense_rows(const char* name, const std::optional<Tensor>& x, ScalarType dtype,
                                 const Tensor& token_ids) {
  if (!x) return std::nullopt;
  const Tensor dense = torch::stable::contiguous(*x);
  check_like(name, dense, dtype, token_ids);
  return dense;
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
    args.rows = row_args<T>(logits, token_ids, temperatures, temperature, softcap, ignore_index);
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
