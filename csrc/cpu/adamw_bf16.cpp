#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/checks.h"
#include "cpu/adamw_bf16_kernel.h"
#include "cpu/parallel.h"

namespace rlhf {
namespace {

constexpr int64_t kAdamWGrain = 32768;  // about 10 us

void adamw_bf16(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                const Tensor& step, std::optional<Tensor> found_inf, std::optional<Tensor> grad_scale, int64_t seed,
                double lr, double beta1, double beta2, double eps, double weight_decay) {
  const bool half = grad.scalar_type() == ScalarType::BFloat16;
  check_dense("param", param, ScalarType::BFloat16, param);
  check_like("grad", grad, half ? ScalarType::BFloat16 : ScalarType::Float, param);
  check_like("exp_avg", exp_avg, ScalarType::BFloat16, param);
  check_like("exp_avg_sq", exp_avg_sq, ScalarType::BFloat16, param);
  check_scalar("step", step, ScalarType::Float, param);
  if (found_inf) check_scalar("found_inf", *found_inf, ScalarType::Float, param);
  if (grad_scale) check_scalar("grad_scale", *grad_scale, ScalarType::Float, param);
  if (found_inf && *data<float>(found_inf) != 0) return;
  const double count = *data<float>(step);
  if (!(count >= 1)) {
    refuse_value("step",
                 "expected a count of at least 1, this step included, got " + std::to_string(count) + "; add 1 before");
  }
  AdamWArgs args;
  args.param = param.mutable_data_ptr();
  args.grad = grad.const_data_ptr();
  args.exp_avg = exp_avg.mutable_data_ptr();
  args.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
  args.key = mix64(mix64(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(count));
  args.grad_factor = grad_scale ? 1 / *data<float>(grad_scale) : 1;
  args.decay = static_cast<float>(1 - lr * weight_decay);
  args.exp_avg_rate = static_cast<float>(1 - beta1);
  args.exp_avg_sq_kept = static_cast<float>(beta2);
  args.exp_avg_sq_rate = static_cast<float>(1 - beta2);
  args.step_size = static_cast<float>(lr / (1 - std::pow(beta1, count)));
  args.root_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, count)));
  args.eps = static_cast<float>(eps);
  const auto& kernels = RLHF_TABLE(adamw_bf16_table);
  parallel(param.numel(), kAdamWGrain, half ? kernels.bf16 : kernels.f32, args);
}

}  // namespace
}  // namespace rlhf

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("adamw_bf16_", TORCH_BOX(&rlhf::adamw_bf16)); }
