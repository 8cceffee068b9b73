#pragma once

#include "cuda/scan.h"

namespace rlhf::cuda {

template <typename T>
struct AdvantageArgs {
  const T* logprobs;  // (tokens,), as all below unless it says otherwise
  const T* ref_logprobs;
  const T* values;
  const T* scores;          // (rows,) if per_sequence
  const T* kl_coef_tensor;  // (), or null
  T* advantages;
  T* returns;
  T* rewards;
  T* kl;
  T* chunk_maps;                           // (rows * chunks, 2) scratch, null with one chunk
  double* reward_moments;                  // (grid, 3) scratch, null without reward whitening
  double* advantage_moments;               // (grid, 3) scratch
  double kl_coef, gamma, lam, score_clip;  // score_clip: infinity for none
  int kl_estimator;                        // k1, abs, k2, k3
  bool per_sequence, whiten_rewards, whiten_advantages;
};

template <typename T>
void ppo_advantages(const Layout& layout, const ScanPlan& plan, const AdvantageArgs<T>& args, void* stream);

}  // namespace rlhf::cuda
