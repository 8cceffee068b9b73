// Logits among an op's arguments: their checks, and the rows that a kernel takes.
#pragma once

#include "common/checks.h"
#include "cpu/logit_rows.h"

namespace rlhf {

inline LogitsType logits_type(const char* name, const Tensor& logits) {
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
      refuse(name, "expected float32, float64, bfloat16 or float16");
  }
}

// (..., V) with the leading shape of `per_row` and a last stride of 1.
inline void check_logits(const char* name, const Tensor& logits, const char* other, const Tensor& per_row) {
  const int64_t dims = logits.dim() - 1;
  if (dims < 0 || dims != per_row.dim())
    refuse(name, std::string("expected one dimension more than ") + other + " has");
  for (int64_t d = 0; d < dims; ++d) {
    if (logits.size(d) != per_row.size(d))
      refuse(name, "expected the leading shape " + tuple_text(per_row.sizes()) + " of " + other + ", got " +
                       tuple_text(logits.sizes()));
  }
  if (logits.size(dims) > 1 && logits.stride(dims) != 1)
    refuse(name, "expected the last stride to be 1; call .contiguous()");
}

template <class T>
LogitRows<T> logit_rows(const char* name, const Tensor& logits, const std::optional<Tensor>& temperatures,
                        double temperature, const std::optional<double>& softcap) {
  LogitRows<T> rows;
  rows.logits = logits.const_data_ptr();
  rows.type = logits_type(name, logits);
  rows.dims = logits.dim() - 1;
  rows.vocab = logits.size(rows.dims);
  rows.sizes = logits.sizes().data();
  rows.strides = logits.strides().data();
  rows.temperatures = data<T>(temperatures);
  rows.temperature = temperature;
  rows.softcap = softcap.value_or(0);
  return rows;
}

// A saved or upstream per-row tensor, made contiguous: .sum() sends a gradient of stride 0.
inline std::optional<Tensor> dense_rows(const char* name, const std::optional<Tensor>& x, ScalarType dtype,
                                        const Tensor& like) {
  if (!x) return std::nullopt;
  const Tensor dense = torch::stable::contiguous(*x);
  check_like(name, dense, dtype, like);
  return dense;
}

}  // namespace rlhf
