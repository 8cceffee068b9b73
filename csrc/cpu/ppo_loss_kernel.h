#pragma once

#include <cstdint>

#include "common/sequences.h"
#include "cpu/dispatch.h"

namespace rlhf {

// Sums over the counted tokens of one part.
enum LossSum {
  kPolicyLoss,
  kValueLoss,
  kEntropy,
  kKL,
  kApproxKL,
  kApproxKLK3,
  kClipped,
  kDualClipped,
  kValueClipped,
  kRatio,
  kLossSums,
};

struct LossPart {
  double tokens = 0;
  double sums[kLossSums] = {};
  double largest_ratio = 0;
};

template <class T>
struct LossArgs {
  // What one part covers: a sequence where the reduction looks at sequences, else kLossPart tokens.
  Sequences parts;
  int64_t tokens;  // of all parts
  const T* logprobs;
  const T* old_logprobs;
  const T* advantages;
  const bool* mask;  // null: all tokens count
  const T* values;   // null: no value term, as for the others below
  const T* old_values;
  const T* returns;
  const T* entropy;
  const T* ref_logprobs;
  const T* is_weights;
  double clip_low, clip_high;
  double dual_clip, value_clip, kl_clamp, log_ratio_clamp;  // infinity: none
  double value_coef, entropy_coef, kl_coef;
  int64_t kl_estimator;
  bool token_mean_of_sequence;  // a token weighs 1 / counted tokens of its part
  double scale;                 // of the gradients
  LossPart* results;            // (parts); `count` fills tokens, `loss` the rest
  T* d_logprobs;                // null: not wanted, as the others
  T* d_values;
  T* d_entropy;
};

constexpr int64_t kLossPart = 4096;

// Ranges are of parts.
struct PPOLossTable {
  Kernel<LossArgs> count;
  Kernel<LossArgs> loss;
};
RLHF_DECLARE_TABLE(PPOLossTable, ppo_loss_table)

}  // namespace rlhf
