#pragma once

#include "cuda/layout.h"

namespace rlhf::cuda {

constexpr int STATS = 13;              // PPO_FIELDS of stats.py
constexpr int64_t COUNT_SLICE = 4096;  // tokens counted by a block where sequences do not matter

enum Reduction { TOKEN_MEAN, SEQ_TOKEN_SUM, SEQ_TOKEN_MEAN, SUM };

template <typename T>
struct LossArgs {
  const T *logprobs, *old_logprobs, *advantages;  // (tokens,)
  const T *values, *old_values, *returns;         // (tokens,) or null; old_values also null without a value clip
  const T *entropy, *ref_logprobs, *is_weights, *denominator;                 // (tokens,) or null; denominator ()
  T ratio_low, ratio_high, dual_clip, value_clip, kl_clamp, log_ratio_clamp;  // infinity for none
  T value_coef, entropy_coef, kl_coef;
  int kl_estimator, reduction;
  T* loss;                               // ()
  double* stats;                         // (STATS,)
  T *d_logprobs, *d_values, *d_entropy;  // (tokens,), null where not asked for
  T* row_weights;                        // (rows,) scratch for SEQ_TOKEN_MEAN: 1 / counted tokens of the sequence
  int64_t* units;                        // (MAX_BLOCKS,) scratch: what each block of the first launch counted
  int32_t* ticket;                       // () scratch
  double* partial;                       // (token_grid(tokens), STATS) scratch
};

template <typename T>
void ppo_loss(const Layout& layout, const LossArgs<T>& args, void* stream);

}  // namespace rlhf::cuda
