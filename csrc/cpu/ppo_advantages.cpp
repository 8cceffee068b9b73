#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/ppo_advantages_kernel.h"

namespace rlhf {
namespace {

constexpr double kWhitenEps = 1e-8;

template <class T>
void run(AdvantageArgs<T>& args, int64_t tokens, bool whiten_advantages) {
  const auto& kernels = RLHF_TABLE(ppo_advantages_table);
  const int64_t count = args.sequences.count, grain = sequence_grain(args.sequences, tokens);
  std::vector<Moments> parts(count);
  args.parts = parts.data();
  parallel(count, grain, kernels.first_sweep, args);
  if (args.whiten_rewards) {
    args.by = whitening(merge(args.parts, count), false, false, kWhitenEps);
    parallel(count, grain, kernels.whiten_rewards, args);
  }
  if (whiten_advantages) {
    args.by = whitening(merge(args.parts, count), true, false, kWhitenEps);
    parallel(count, grain, kernels.whiten_advantages, args);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_advantages(const Tensor& logprobs, const Tensor& ref_logprobs,
                                                          const Tensor& values, const Tensor& scores,
                                                          std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                                          std::optional<Tensor> kl_coef_tensor, double kl_coef,
                                                          int64_t kl_estimator, double gamma, double lam,
                                                          std::optional<double> score_clip, bool whiten_rewards,
                                                          bool whiten_advantages) {
  check_leader("logprobs", logprobs);
  const ScalarType dtype = logprobs.scalar_type();
  const Sequences sequences = sequences_of("logprobs", logprobs, cu_seqlens);
  check_like("ref_logprobs", ref_logprobs, dtype, logprobs);
  check_like("values", values, dtype, logprobs);
  check_like("mask", mask, ScalarType::Bool, logprobs);
  const bool token_scores = !(scores.dim() == 1 && scores.numel() == sequences.count);
  if (token_scores) {
    check_like("scores", scores, dtype, logprobs);
  } else {
    check_dense("scores", scores, dtype, logprobs);
  }
  if (kl_coef_tensor) check_scalar("kl_coef_tensor", *kl_coef_tensor, logprobs);
  const auto like = [&] { return torch::stable::empty_like(logprobs); };
  const Tensor advantages = like(), returns = like(), rewards = like(), kl = like();
  with_compute_type(logprobs, [&](auto type) {
    using T = decltype(type);
    AdvantageArgs<T> args;
    args.sequences = sequences;
    args.logprobs = data<T>(logprobs);
    args.ref_logprobs = data<T>(ref_logprobs);
    args.values = data<T>(values);
    args.scores = data<T>(scores);
    args.token_scores = token_scores;
    args.mask = data<bool>(mask);
    args.kl_coef = kl_coef_tensor ? *data<T>(*kl_coef_tensor) : kl_coef;
    args.kl_estimator = kl_estimator;
    args.gamma = gamma;
    args.lam = lam;
    args.score_clip = score_clip.value_or(INFINITY);
    args.whiten_rewards = whiten_rewards;
    args.advantages = mutable_data<T>(advantages);
    args.returns = mutable_data<T>(returns);
    args.rewards = mutable_data<T>(rewards);
    args.kl = mutable_data<T>(kl);
    run(args, logprobs.numel(), whiten_advantages);
  });
  return {advantages, returns, rewards, kl};
}

}  // namespace
}  // namespace rlhf

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("ppo_advantages", TORCH_BOX(&rlhf::ppo_advantages)); }
