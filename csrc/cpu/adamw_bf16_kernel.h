#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace rlhf {

// One step of splitmix64. Inlined always: code that is compiled per instruction set must not share an out-of-line copy.
[[gnu::always_inline]] inline uint64_t mix64(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

struct AdamWArgs {
  void* param;       // bfloat16
  const void* grad;  // bfloat16 or float
  void* exp_avg;     // bfloat16
  void* exp_avg_sq;  // bfloat16
  uint64_t key;      // of the seed and the step
  float grad_factor;
  float decay;  // 1 - lr * weight_decay
  float exp_avg_rate;
  float exp_avg_sq_kept, exp_avg_sq_rate;
  float step_size;   // lr / bias correction of exp_avg
  float root_scale;  // 1 / sqrt(bias correction of exp_avg_sq)
  float eps;
};

// Ranges are of elements; one function a dtype of the gradient.
struct AdamWTable {
  void (*bf16)(const AdamWArgs&, int64_t begin, int64_t end);
  void (*f32)(const AdamWArgs&, int64_t begin, int64_t end);
};
RLHF_DECLARE_TABLE(AdamWTable, adamw_bf16_table)

}  // namespace rlhf
