// The clipped PPO loss, its gradients and its statistics in two launches. The gradients carry 1 / count, so a launch
// over the mask alone comes first; it also resets the ticket by which the last block of the main launch knows that it
// is the last and adds up what all blocks found.
#include "cuda/group.cuh"
#include "cuda/kl.cuh"
#include "cuda/launch.cuh"
#include "cuda/ppo_loss.h"
#include "cuda/quads.cuh"

namespace rlhf::cuda {
namespace {

// Counts tokens (`sequences` false) or sequences that have one, and the weight of a token of each sequence.
template <int GROUP, typename T>
__global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    count_kernel(Layout layout, bool sequences, int64_t* units, T* row_weights, int32_t* ticket) {
  int64_t mine = 0;
  constexpr int64_t GROUPS = BLOCK / GROUP;
  for (int64_t row = blockIdx.x * GROUPS + threadIdx.x / GROUP; row < layout.rows; row += gridDim.x * GROUPS) {
    const Range range = sequence(layout, row);
    int64_t counted = 0;
    for (int64_t first = (range.begin / QUAD + threadIdx.x % GROUP) * QUAD; first < range.end; first += QUAD * GROUP) {
      const Quad<bool> quad = load_counted(layout.mask, first, range);
      for (int i = 0; i < QUAD; ++i) counted += quad.at[i];
    }
    counted = group_reduce<GROUP>(counted, Add());
    if (threadIdx.x % GROUP != 0) continue;
    mine += sequences ? counted > 0 : counted;
    if (row_weights != nullptr) row_weights[row] = T(1) / T(counted < 1 ? 1 : counted);
  }
  mine = group_reduce<BLOCK>(mine, Add());
  if (threadIdx.x == 0) units[blockIdx.x] = mine;
  if (threadIdx.x == 0 && blockIdx.x == 0) *ticket = 0;
}

// Walks forward through the sequences; tokens that no sequence holds belong to the last one.
struct RowCursor {
  const Layout& layout;
  int64_t row = 0, end = 0;

  __device__ RowCursor(const Layout& layout, int64_t token) : layout(layout) {
    if (layout.cu_seqlens == nullptr) {
      row = token / layout.length;
    } else {
      for (int64_t high = layout.rows - 1; row < high;) {  // the first sequence that ends after the token
        const int64_t middle = (row + high) / 2;
        if (layout.cu_seqlens[middle + 1] > token)
          high = middle;
        else
          row = middle + 1;
      }
    }
    end = sequence(layout, row).end;
  }

  __device__ int64_t at(int64_t token) {
    while (token >= end && row < layout.rows - 1) end = sequence(layout, ++row).end;
    return row;
  }
};

struct Sums {
  double at[STATS];
};

enum Field {
  POLICY,
  VALUE,
  ENTROPY,
  KL,
  UNITS,
  TOKENS,
  APPROX_KL,
  APPROX_KL_K3,
  CLIPPED,
  DUAL_CLIPPED,
  VALUE_CLIPPED,
  RATIO,
  RATIO_MAX
};

__device__ inline double larger(double a, double b) { return a > b || a != a ? a : b; }  // NaN wins

struct AddSums {
  __device__ Sums operator()(Sums a, const Sums& b) const {
    for (int i = 0; i < RATIO_MAX; ++i) a.at[i] += b.at[i];
    a.at[RATIO_MAX] = larger(a.at[RATIO_MAX], b.at[RATIO_MAX]);
    return a;
  }
};

template <typename T>
struct Token {
  T logprob, old_logprob, advantage, value, old_value, target, entropy, ref_logprob, is_weight;
  T weight;  // in the reduction
};

template <typename T>
struct Gradients {
  T logprob, value;
};

// One counted token: adds to the sums, returns the gradients before weight and scale.
template <typename T>
__device__ Gradients<T> token_loss(const LossArgs<T>& o, const Token<T>& x, Sums& sums) {
  const T raw = x.logprob - x.old_logprob, d = clamp_to(raw, -o.log_ratio_clamp, o.log_ratio_clamp);
  const bool ratio_passes = !(raw > o.log_ratio_clamp || raw < -o.log_ratio_clamp);
  const T ratio = exp(d), unclipped = -x.advantage * ratio;
  const T clipped = -x.advantage * clamp_to(ratio, o.ratio_low, o.ratio_high);
  const bool is_clipped = clipped > unclipped;
  T policy = is_clipped ? clipped : unclipped;
  const bool is_dual = x.advantage < 0 && policy > -x.advantage * o.dual_clip;
  if (is_dual) policy = -x.advantage * o.dual_clip;
  Gradients<T> out = {is_clipped || is_dual || !ratio_passes ? T(0) : unclipped * x.is_weight, T(0)};
  sums.at[POLICY] += double(policy * x.is_weight * x.weight);
  sums.at[TOKENS] += 1;
  sums.at[APPROX_KL] += T(0.5) * d * d;
  sums.at[APPROX_KL_K3] += expm1(d) - d;
  sums.at[CLIPPED] += is_clipped;
  sums.at[DUAL_CLIPPED] += is_dual;
  sums.at[RATIO] += ratio;
  sums.at[RATIO_MAX] = larger(ratio, sums.at[RATIO_MAX]);
  if (o.values != nullptr) {
    const T error = x.value - x.target;
    const T clipped_error = clamp_to(x.value, x.old_value - o.value_clip, x.old_value + o.value_clip) - x.target;
    const bool is_value_clipped = clipped_error * clipped_error > error * error;
    const T square = is_value_clipped ? clipped_error * clipped_error : error * error;
    out.value = is_value_clipped || o.value_coef == 0 ? T(0) : o.value_coef * error;
    sums.at[VALUE] += double(T(0.5) * square * x.weight);
    sums.at[VALUE_CLIPPED] += is_value_clipped;
  }
  if (o.ref_logprobs != nullptr) {
    const T raw_kl = x.logprob - x.ref_logprob, y = clamp_to(raw_kl, -o.kl_clamp, o.kl_clamp);
    const bool kl_passes = !(raw_kl > o.kl_clamp || raw_kl < -o.kl_clamp);
    sums.at[KL] += double(kl_value(y, o.kl_estimator) * x.weight);
    if (kl_passes && o.kl_coef != 0) out.logprob += o.kl_coef * kl_gradient(y, o.kl_estimator);
  }
  sums.at[ENTROPY] += double(x.entropy * x.weight);
  return out;
}

// The sums of all blocks in the order of their threads; the same in every run.
template <typename T>
__device__ void finish(const LossArgs<T>& x, int64_t units, double scale) {
  Sums sums = {};
  for (int block = threadIdx.x; block < static_cast<int>(gridDim.x); block += BLOCK) {
    Sums other;
    for (int i = 0; i < STATS; ++i) other.at[i] = __ldcg(x.partial + block * STATS + i);
    sums = AddSums()(sums, other);
  }
  sums = group_reduce<BLOCK>(sums, AddSums());
  if (threadIdx.x != 0) return;
  sums.at[UNITS] = x.reduction == SUM ? 0 : double(units);
  for (int i = 0; i < STATS; ++i) x.stats[i] = sums.at[i];
  // A term that is there for its statistic alone may be inf or NaN: times a coefficient of 0 that would still be NaN.
  const auto term = [&](double coef, int i) { return coef == 0 ? 0 : coef * sums.at[i]; };
  const double numerator =
      sums.at[POLICY] + term(x.value_coef, VALUE) + term(-x.entropy_coef, ENTROPY) + term(x.kl_coef, KL);
  *x.loss = T(numerator * scale);
}

template <typename T>
__global__ void __launch_bounds__(BLOCK, sizeof(T) == 4 ? MIN_BLOCKS : 1)
    loss_kernel(Layout layout, LossArgs<T> x, int n_units) {
  int64_t units = 0;
  for (int i = threadIdx.x; i < n_units; i += BLOCK) units += x.units[i];
  units = group_reduce<BLOCK>(units, Add());
  const double count = x.reduction == SUM || units < 1 ? 1 : double(units);
  const double divisor = x.denominator == nullptr ? count : double(*x.denominator);
  const double scale = divisor == 0 ? 0 : 1 / divisor;
  const Range all = {0, layout.tokens};
  Sums sums = {};
  for (int64_t first = (blockIdx.x * int64_t(BLOCK) + threadIdx.x) * QUAD; first < layout.tokens;
       first += gridDim.x * int64_t(BLOCK) * QUAD) {
    const Quad<bool> counted = load_counted(layout.mask, first, all);
    const Quad<T> logprobs = load(x.logprobs, first, all), old_logprobs = load(x.old_logprobs, first, all);
    const Quad<T> advantages = load(x.advantages, first, all), values = load_or_zero(x.values, first, all);
    const Quad<T> old_values = load_or_zero(x.old_values, first, all), returns = load_or_zero(x.returns, first, all);
    const Quad<T> entropy = load_or_zero(x.entropy, first, all), ref = load_or_zero(x.ref_logprobs, first, all);
    const Quad<T> is_weights = load_or_zero(x.is_weights, first, all);
    Quad<T> weights = {T(1), T(1), T(1), T(1)};
    if (x.reduction == SEQ_TOKEN_MEAN) {
      RowCursor cursor(layout, first);
      for (int i = 0; i < QUAD; ++i) weights.at[i] = x.row_weights[cursor.at(first + i)];
    }
    Quad<T> d_logprobs = {}, d_values = {}, d_entropy = {};
#pragma unroll
    for (int i = 0; i < QUAD; ++i) {
      if (!counted.at[i]) continue;
      const T is_weight = x.is_weights == nullptr ? T(1) : is_weights.at[i], weight = weights.at[i];
      const Token<T> token = {logprobs.at[i], old_logprobs.at[i], advantages.at[i], values.at[i], old_values.at[i],
                              returns.at[i],  entropy.at[i],      ref.at[i],        is_weight,    weight};
      const Gradients<T> gradients = token_loss(x, token, sums);
      d_logprobs.at[i] = gradients.logprob * weight * T(scale);
      d_values.at[i] = gradients.value * weight * T(scale);
      d_entropy.at[i] = -x.entropy_coef * weight * T(scale);
    }
    if (x.d_logprobs != nullptr) store(x.d_logprobs, first, all, d_logprobs);
    if (x.d_values != nullptr) store(x.d_values, first, all, d_values);
    if (x.d_entropy != nullptr) store(x.d_entropy, first, all, d_entropy);
  }
  sums = group_reduce<BLOCK>(sums, AddSums());
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STATS; ++i) x.partial[blockIdx.x * STATS + i] = sums.at[i];
    __threadfence();  // the sums are visible before the ticket that announces them
    is_last = atomicAdd(x.ticket, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  finish(x, units, scale);
}

}  // namespace

template <typename T>
void ppo_loss(const Layout& layout, const LossArgs<T>& args, void* stream) {
  const bool sequences = args.reduction == SEQ_TOKEN_SUM || args.reduction == SEQ_TOKEN_MEAN;
  const Layout slices = {layout.tokens, ceil_div(layout.tokens, COUNT_SLICE), COUNT_SLICE, nullptr, layout.mask};
  const Layout rows = sequences ? layout : slices;
  const bool warps = rows.length <= 256;
  const int blocks = grid_size(ceil_div(rows.rows, warps ? BLOCK / WARP : 1));
  launch("ppo_loss", warps ? count_kernel<WARP, T> : count_kernel<BLOCK, T>, blocks, stream, rows, sequences,
         args.units, args.row_weights, args.ticket);
  launch("ppo_loss", loss_kernel<T>, token_grid(layout.tokens), stream, layout, args, blocks);
}

template void ppo_loss(const Layout&, const LossArgs<float>&, void*);
template void ppo_loss(const Layout&, const LossArgs<double>&, void*);

}  // namespace rlhf::cuda
