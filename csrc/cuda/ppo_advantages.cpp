#include "cuda/ppo_advantages.h"

#include <tuple>

#include "cuda/host.h"
#include "cuda/masked_whiten.h"

namespace rlhf::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_advantages_op(Tensor logprobs, Tensor ref_logprobs, Tensor values,
                                                             Tensor scores, OptionalTensor mask,
                                                             OptionalTensor cu_seqlens, OptionalTensor kl_coef_tensor,
                                                             double kl_coef, int64_t kl_estimator, double gamma,
                                                             double lam, std::optional<double> score_clip,
                                                             bool whiten_rewards, bool whiten_advantages) {
  const Call call("logprobs", logprobs);
  const Layout layout = call.layout(mask, cu_seqlens);
  const Tensor advantages = call.like(), returns = call.like(), rewards = call.like(), kl = call.like();
  const ScanPlan plan = plan_scan(layout);
  const bool per_sequence = scores.dim() == 1 && scores.numel() == layout.rows;
  const int64_t moments = MOMENTS * plan.grid(layout);
  const Tensor reward_moments = call.scratch(whiten_rewards ? moments : 0, ScalarType::Double);
  const Tensor advantage_moments = call.scratch(moments, ScalarType::Double);
  const Tensor maps = call.scratch(plan.chunks > 1 ? 2 * plan.units(layout) : 0);
  with_compute_type(logprobs, [&](auto zero) {
    using T = decltype(zero);
    AdvantageArgs<T> args = {};
    args.logprobs = call.tokens<T>("logprobs", logprobs);
    args.ref_logprobs = call.tokens<T>("ref_logprobs", ref_logprobs);
    args.values = call.tokens<T>("values", values);
    args.scores = per_sequence ? call.vector<T>("scores", scores, layout.rows) : call.tokens<T>("scores", scores);
    args.kl_coef_tensor = call.vector<T>("kl_coef_tensor", kl_coef_tensor, 1);
    args.advantages = mutable_data<T>(advantages);
    args.returns = mutable_data<T>(returns);
    args.rewards = mutable_data<T>(rewards);
    args.kl = mutable_data<T>(kl);
    args.chunk_maps = mutable_data<T>(maps);
    args.reward_moments = mutable_data<double>(reward_moments);
    args.advantage_moments = mutable_data<double>(advantage_moments);
    args.kl_coef = kl_coef;
    args.gamma = gamma;
    args.lam = lam;
    args.score_clip = or_infinity(score_clip);
    args.kl_estimator = static_cast<int>(kl_estimator);
    args.per_sequence = per_sequence;
    args.whiten_rewards = whiten_rewards;
    args.whiten_advantages = whiten_advantages;
    if (layout.tokens > 0) ppo_advantages(layout, plan, args, call.stream());
  });
  return {advantages, returns, rewards, kl};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, m) { m.impl("ppo_advantages", TORCH_BOX(&ppo_advantages_op)); }

}  // namespace rlhf::cuda
