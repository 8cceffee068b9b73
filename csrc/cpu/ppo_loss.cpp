#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/ppo_loss_kernel.h"

namespace rlhf {
namespace {

// As REDUCTIONS in rlhf_kernels/ops/ppo_loss.py.
enum Reduction { kTokenMean, kSeqMeanTokenSum, kSeqMeanTokenMean, kSum };

// PPO_FIELDS of rlhf_kernels/stats.py: the four reduced sums, units, tokens, the other sums, the largest ratio.
constexpr int64_t kStats = 13;

struct Totals {
  LossPart sum;
  double units = 0;  // what the reduction divides by
};

void add(Totals& totals, const LossPart& part) {
  for (int k = 0; k < kLossSums; ++k) totals.sum.sums[k] += part.sums[k];
  totals.sum.largest_ratio = std::fmax(totals.sum.largest_ratio, part.largest_ratio);
}

void write_stats(const Totals& totals, double* stats) {
  for (int k = kPolicyLoss; k <= kKL; ++k) *stats++ = totals.sum.sums[k];
  *stats++ = totals.units;
  *stats++ = totals.sum.tokens;
  for (int k = kApproxKL; k < kLossSums; ++k) *stats++ = totals.sum.sums[k];
  const double ratios = totals.sum.sums[kRatio];
  *stats = std::isnan(ratios) ? ratios : totals.sum.largest_ratio;  // a maximum passes over NaN
}

// Fills the gradients and returns the loss.
template <class T>
double run(LossArgs<T>& args, Reduction reduction, const T* denominator, Totals& totals) {
  const auto& kernels = RLHF_TABLE(ppo_loss_table);
  const int64_t count = args.parts.count, grain = sequence_grain(args.parts, args.tokens);
  std::vector<LossPart> parts(count);
  args.results = parts.data();
  parallel(count, grain, kernels.count, args);
  double sequences = 0;
  for (const LossPart& part : parts) {
    totals.sum.tokens += part.tokens;
    sequences += part.tokens > 0;
  }
  totals.units = reduction == kTokenMean ? totals.sum.tokens : reduction == kSum ? 0 : sequences;
  const double divisor = denominator ? *denominator : std::fmax(totals.units, 1);
  args.scale = divisor == 0 ? 0 : 1 / divisor;
  parallel(count, grain, kernels.loss, args);
  for (const LossPart& part : parts) add(totals, part);
  const double* sums = totals.sum.sums;
  // A term that is there for its statistic alone may be inf or NaN: times a coefficient of 0 that would still be NaN.
  const auto term = [&](double coef, int i) { return coef == 0 ? 0 : coef * sums[i]; };
  return args.scale * (sums[kPolicyLoss] + term(args.value_coef, kValueLoss) + term(-args.entropy_coef, kEntropy) +
                       term(args.kl_coef, kKL));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> values, std::optional<Tensor> old_values,
    std::optional<Tensor> returns, std::optional<Tensor> entropy, std::optional<Tensor> ref_logprobs,
    std::optional<Tensor> is_weights, std::optional<Tensor> denominator, double clip_low, double clip_high,
    std::optional<double> dual_clip, std::optional<double> value_clip, double value_coef, double entropy_coef,
    double kl_coef, int64_t kl_estimator, std::optional<double> kl_clamp, std::optional<double> log_ratio_clamp,
    int64_t reduction, bool grad_logprobs, bool grad_values, bool grad_entropy) {
  check_leader("logprobs", logprobs);
  const ScalarType dtype = logprobs.scalar_type();
  const Sequences sequences = sequences_of("logprobs", logprobs, cu_seqlens);
  check_like("old_logprobs", old_logprobs, dtype, logprobs);
  check_like("advantages", advantages, dtype, logprobs);
  check_like("mask", mask, ScalarType::Bool, logprobs);
  check_like("values", values, dtype, logprobs);
  check_like("old_values", old_values, dtype, logprobs);
  check_like("returns", returns, dtype, logprobs);
  check_like("entropy", entropy, dtype, logprobs);
  check_like("ref_logprobs", ref_logprobs, dtype, logprobs);
  check_like("is_weights", is_weights, dtype, logprobs);
  if (denominator) check_scalar("denominator", *denominator, logprobs);
  if (values && !returns) refuse("returns", "expected a tensor because values is given");
  if (values && value_clip && !old_values)
    refuse("old_values", "expected a tensor because values and value_clip are given");
  const auto gradient = [&](bool wanted) {
    return wanted ? torch::stable::empty_like(logprobs) : torch::stable::new_empty(logprobs, {0});
  };
  const Tensor d_logprobs = gradient(grad_logprobs), d_values = gradient(grad_values),
               d_entropy = gradient(grad_entropy);
  const Tensor loss = torch::stable::new_empty(logprobs, {});
  const Tensor stats = torch::stable::new_empty(logprobs, {kStats}, ScalarType::Double);
  with_compute_type(logprobs, [&](auto type) {
    using T = decltype(type);
    LossArgs<T> args;
    const bool by_sequence = reduction == kSeqMeanTokenSum || reduction == kSeqMeanTokenMean;
    args.tokens = logprobs.numel();
    args.parts = by_sequence ? sequences : Sequences{nullptr, (args.tokens + kLossPart - 1) / kLossPart, kLossPart};
    args.logprobs = data<T>(logprobs);
    args.old_logprobs = data<T>(old_logprobs);
    args.advantages = data<T>(advantages);
    args.mask = data<bool>(mask);
    args.values = data<T>(values);
    args.old_values = value_clip ? data<T>(old_values) : nullptr;
    args.returns = data<T>(returns);
    args.entropy = data<T>(entropy);
    args.ref_logprobs = data<T>(ref_logprobs);
    args.is_weights = data<T>(is_weights);
    args.clip_low = clip_low;
    args.clip_high = clip_high;
    args.dual_clip = dual_clip.value_or(INFINITY);
    args.value_clip = value_clip.value_or(INFINITY);
    args.kl_clamp = kl_clamp.value_or(INFINITY);
    args.log_ratio_clamp = log_ratio_clamp.value_or(INFINITY);
    args.value_coef = value_coef;
    args.entropy_coef = entropy_coef;
    args.kl_coef = kl_coef;
    args.kl_estimator = kl_estimator;
    args.token_mean_of_sequence = reduction == kSeqMeanTokenMean;
    args.d_logprobs = grad_logprobs ? mutable_data<T>(d_logprobs) : nullptr;
    args.d_values = grad_values ? mutable_data<T>(d_values) : nullptr;
    args.d_entropy = grad_entropy ? mutable_data<T>(d_entropy) : nullptr;
    Totals totals;
    *mutable_data<T>(loss) = static_cast<T>(run(args, static_cast<Reduction>(reduction), data<T>(denominator), totals));
    write_stats(totals, mutable_data<double>(stats));
  });
  return {loss, stats, d_logprobs, d_values, d_entropy};
}

}  // namespace
}  // namespace rlhf

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("ppo_loss", TORCH_BOX(&rlhf::ppo_loss)); }
