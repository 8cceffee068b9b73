#include "cuda/gae.h"

#include <tuple>

#include "cuda/host.h"

namespace rlhf::cuda {

std::tuple<Tensor, Tensor> gae_op(Tensor rewards, Tensor values, OptionalTensor mask, OptionalTensor cu_seqlens,
                                  OptionalTensor bootstrap_values, double gamma, double lam, bool gap_zero) {
  const Call call("rewards", rewards);
  const Layout layout = call.layout(mask, cu_seqlens);
  const Tensor advantages = call.like(), returns = call.like();
  const ScanPlan plan = plan_scan(layout);
  const Tensor maps = call.scratch(plan.chunks > 1 ? 2 * plan.units(layout) : 0);
  with_compute_type(rewards, [&](auto zero) {
    using T = decltype(zero);
    GaeArgs<T> args = {};
    args.rewards = call.tokens<T>("rewards", rewards);
    args.values = call.tokens<T>("values", values);
    args.bootstrap = call.vector<T>("bootstrap_values", bootstrap_values, layout.rows);
    args.advantages = mutable_data<T>(advantages);
    args.returns = mutable_data<T>(returns);
    args.chunk_maps = mutable_data<T>(maps);
    args.gamma = gamma;
    args.lam = lam;
    args.gap_zero = gap_zero;
    if (layout.tokens > 0) gae(layout, plan, args, call.stream());
  });
  return {advantages, returns};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, m) { m.impl("gae", TORCH_BOX(&gae_op)); }

}  // namespace rlhf::cuda
