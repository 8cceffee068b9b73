// What the stable-ABI wrappers share: arguments checked and taken as pointers, scratch, and the device and stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>

#include "common/checks.h"
#include "cuda/layout.h"

namespace rlhf::cuda {

using OptionalTensor = std::optional<Tensor>;

// One call of an op. `leader` sets device, layout and compute dtype of the per-token tensors; its device is current
// while this lives, and kernels go to the stream that torch has current there.
class Call {
 public:
  Call(const char* name, const Tensor& leader) : leader_(leader), guard_(leader.get_device_index()) {
    check_leader(name, leader);
    if (aoti_torch_get_current_cuda_stream(leader.get_device_index(), &stream_) != AOTI_TORCH_SUCCESS) {
      refuse(name, "torch gives no current CUDA stream for its device");
    }
  }

  void* stream() const { return stream_; }

  template <class T>
  const T* tokens(const char* name, const OptionalTensor& x) const {
    check_like(name, x, leader_.scalar_type(), leader_);
    return data<T>(x);
  }

  // `numel` elements that are not one a token.
  template <class T>
  const T* vector(const char* name, const OptionalTensor& x, int64_t numel) const {
    if (!x) return nullptr;
    check_dense(name, *x, leader_.scalar_type(), leader_);
    if (x->numel() != numel)
      refuse(name, "expected " + std::to_string(numel) + " elements, got " + std::to_string(x->numel()));
    return data<T>(x);
  }

  const bool* mask(const OptionalTensor& mask) const {
    check_like("mask", mask, ScalarType::Bool, leader_);
    return data<bool>(mask);
  }

  Layout layout(const OptionalTensor& mask_, const OptionalTensor& cu_seqlens) const {
    const int64_t tokens = leader_.numel();
    if (!cu_seqlens) {
      if (leader_.dim() != 2) refuse("cu_seqlens", "expected bounds, because the first argument is not (B, T)");
      return {tokens, leader_.size(0), leader_.size(1), nullptr, mask(mask_)};
    }
    check_dense("cu_seqlens", *cu_seqlens, ScalarType::Int, leader_);
    const int64_t rows = cu_seqlens->numel() - 1;
    if (rows < (tokens > 0 ? 1 : 0)) {
      refuse_value("cu_seqlens", "expected bounds that rise from 0 to " + std::to_string(tokens) +
                                     ", the number of tokens, got " + std::to_string(rows + 1) + " of them");
    }
    return {tokens, rows, ceil_div(tokens, rows < 1 ? 1 : rows), data<int32_t>(cu_seqlens), mask(mask_)};
  }

  Tensor like() const { return torch::stable::empty_like(leader_); }

  Tensor scratch(int64_t numel, ScalarType dtype) const { return torch::stable::new_empty(leader_, {numel}, dtype); }

  // In the compute dtype.
  Tensor scratch(int64_t numel) const { return scratch(numel, leader_.scalar_type()); }

 private:
  const Tensor& leader_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline double or_infinity(const std::optional<double>& x) {
  return x.value_or(std::numeric_limits<double>::infinity());
}

}  // namespace rlhf::cuda
