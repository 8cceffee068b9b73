// Checks of an op's arguments, for CPU and GPU launchers. The public Python functions check first and say more; these
// keep a direct call of torch.ops.rlhf_kernels.* from reading outside its tensors. A message names the argument, what
// was expected and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace rlhf {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void refuse(const char* name, const std::string& text) {
  throw std::runtime_error(std::string(name) + ": " + text);
}

// The caller's data is at fault, not the call: Python turns this prefix into ValueError.
[[noreturn]] inline void refuse_value(const char* name, const std::string& text) {
  throw std::runtime_error("invalid value: " + std::string(name) + ": " + text);
}

// "(2, 3)", "(5,)" or "()", as Python prints a tuple.
inline std::string tuple_text(IntHeaderOnlyArrayRef values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + (values.size() == 1 ? ",)" : ")");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

// Results of a half-precision op are float32.
inline ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_same_device(const char* name, const Tensor& x, const Tensor& like) {
  if (x.is_cpu() != like.is_cpu() || x.get_device_index() != like.get_device_index()) {
    refuse(name, "expected a tensor on the device of the other arguments");
  }
}

// A contiguous tensor of one dtype on the device of `like`.
inline void check_dense(const char* name, const Tensor& x, ScalarType dtype, const Tensor& like) {
  check_same_device(name, x, like);
  if (x.scalar_type() != dtype) {
    refuse(name, std::string("expected ") + torch::headeronly::toString(dtype) + ", got " +
                     torch::headeronly::toString(x.scalar_type()));
  }
  if (!x.is_contiguous()) refuse(name, "expected a contiguous tensor; call .contiguous()");
}

// A per-token tensor: contiguous, in the shape of `like`.
inline void check_like(const char* name, const Tensor& x, ScalarType dtype, const Tensor& like) {
  check_dense(name, x, dtype, like);
  if (!same_shape(x, like)) {
    refuse(name, "expected the shape " + tuple_text(like.sizes()) + ", got " + tuple_text(x.sizes()));
  }
}

inline void check_like(const char* name, const std::optional<Tensor>& x, ScalarType dtype, const Tensor& like) {
  if (x) check_like(name, *x, dtype, like);
}

// A per-token tensor that sets the layout and compute dtype of the others: contiguous float32 or float64.
inline void check_leader(const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    refuse(name, std::string("expected float32 or float64, got ") + torch::headeronly::toString(dtype));
  }
  check_dense(name, x, dtype, x);
}

// A 0-dim tensor, of the dtype of `like` where none is given.
inline void check_scalar(const char* name, const Tensor& x, ScalarType dtype, const Tensor& like) {
  check_dense(name, x, dtype, like);
  if (x.dim() != 0) refuse(name, "expected a 0-dim tensor, got " + tuple_text(x.sizes()));
}

inline void check_scalar(const char* name, const Tensor& x, const Tensor& like) {
  check_scalar(name, x, like.scalar_type(), like);
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& x) {
  return x ? data<T>(*x) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls f(float()) or f(double()).
template <class F>
void with_compute_type(const Tensor& x, F&& f) {
  if (x.scalar_type() == ScalarType::Double) {
    f(double());
  } else {
    f(float());
  }
}

}  // namespace rlhf
