#include "cuda/ppo_loss.h"

#include <tuple>

#include "cuda/host.h"

namespace rlhf::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss_op(
    Tensor logprobs, Tensor old_logprobs, Tensor advantages, OptionalTensor mask, OptionalTensor cu_seqlens,
    OptionalTensor values, OptionalTensor old_values, OptionalTensor returns, OptionalTensor entropy,
    OptionalTensor ref_logprobs, OptionalTensor is_weights, OptionalTensor denominator, double clip_low,
    double clip_high, std::optional<double> dual_clip, std::optional<double> value_clip, double value_coef,
    double entropy_coef, double kl_coef, int64_t kl_estimator, std::optional<double> kl_clamp,
    std::optional<double> log_ratio_clamp, int64_t reduction, bool grad_logprobs, bool grad_values, bool grad_entropy) {
  const Call call("logprobs", logprobs);
  const Layout layout = call.layout(mask, cu_seqlens);
  const auto gradient = [&](bool wanted) { return wanted ? call.like() : call.scratch(0); };
  const Tensor d_logprobs = gradient(grad_logprobs), d_values = gradient(grad_values),
               d_entropy = gradient(grad_entropy);
  const Tensor loss = torch::stable::new_empty(logprobs, {}), stats = call.scratch(STATS, ScalarType::Double);
  const Tensor row_weights = call.scratch(reduction == SEQ_TOKEN_MEAN ? layout.rows : 0);
  const Tensor units = call.scratch(MAX_BLOCKS, ScalarType::Long), ticket = call.scratch(1, ScalarType::Int);
  const Tensor partial = call.scratch(int64_t(token_grid(layout.tokens)) * STATS, ScalarType::Double);
  with_compute_type(logprobs, [&](auto zero) {
    using T = decltype(zero);
    LossArgs<T> args = {};
    args.logprobs = call.tokens<T>("logprobs", logprobs);
    args.old_logprobs = call.tokens<T>("old_logprobs", old_logprobs);
    args.advantages = call.tokens<T>("advantages", advantages);
    args.values = call.tokens<T>("values", values);
    args.old_values = call.tokens<T>("old_values", old_values);
    args.returns = call.tokens<T>("returns", returns);
    args.entropy = call.tokens<T>("entropy", entropy);
    args.ref_logprobs = call.tokens<T>("ref_logprobs", ref_logprobs);
    args.is_weights = call.tokens<T>("is_weights", is_weights);
    args.denominator = call.vector<T>("denominator", denominator, 1);
    args.ratio_low = T(1 - clip_low);
    args.ratio_high = T(1 + clip_high);
    args.dual_clip = T(or_infinity(dual_clip));
    args.value_clip = T(or_infinity(value_clip));
    args.kl_clamp = T(or_infinity(kl_clamp));
    args.log_ratio_clamp = T(or_infinity(log_ratio_clamp));
    args.value_coef = T(value_coef);
    args.entropy_coef = T(entropy_coef);
    args.kl_coef = T(kl_coef);
    args.kl_estimator = static_cast<int>(kl_estimator);
    args.reduction = static_cast<int>(reduction);
    args.loss = mutable_data<T>(loss);
    args.stats = mutable_data<double>(stats);
    args.d_logprobs = grad_logprobs ? mutable_data<T>(d_logprobs) : nullptr;
    args.d_values = grad_values ? mutable_data<T>(d_values) : nullptr;
    args.d_entropy = grad_entropy ? mutable_data<T>(d_entropy) : nullptr;
    args.row_weights = reduction == SEQ_TOKEN_MEAN ? mutable_data<T>(row_weights) : nullptr;
    args.units = mutable_data<int64_t>(units);
    args.ticket = mutable_data<int32_t>(ticket);
    args.partial = mutable_data<double>(partial);
    ppo_loss(layout, args, call.stream());
  });
  return {loss, stats, d_logprobs, d_values, d_entropy};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, m) { m.impl("ppo_loss", TORCH_BOX(&ppo_loss_op)); }

}  // namespace rlhf::cuda
