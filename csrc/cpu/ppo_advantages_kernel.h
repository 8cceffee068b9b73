#pragma once

#include "common/moments.h"
#include "common/sequences.h"
#include "cpu/dispatch.h"

namespace rlhf {

template <class T>
struct AdvantageArgs {
  Sequences sequences;
  const T* logprobs;
  const T* ref_logprobs;
  const T* values;
  const T* scores;  // (B), or a score a token
  bool token_scores;
  const bool* mask;  // null: all tokens count
  double kl_coef;
  int64_t kl_estimator;
  double gamma, lam;
  double score_clip;  // infinity: none
  bool whiten_rewards;
  Moments* parts;  // of each sequence: of what is to be whitened next
  Whitening by;    // what `whiten_*` applies
  T* advantages;
  T* returns;
  T* rewards;
  T* kl;
};

// Ranges are of sequences.
struct PPOAdvantagesTable {
  Kernel<AdvantageArgs> first_sweep;     // KL and rewards; the advantages too, unless the rewards are to be whitened
  Kernel<AdvantageArgs> whiten_rewards;  // and the advantages from them
  Kernel<AdvantageArgs> whiten_advantages;
};
RLHF_DECLARE_TABLE(PPOAdvantagesTable, ppo_advantages_table)

}  // namespace rlhf
