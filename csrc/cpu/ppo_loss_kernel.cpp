#include "cpu/ppo_loss_kernel.h"

#include "cpu/kl.h"
#include "cpu/pages.h"

namespace rlhf::RLHF_ISA {
namespace {

struct Span {
  int64_t first, last;

  template <class T>
  Span(const LossArgs<T>& args, int64_t part) : first(args.parts.begin(part)), last(args.parts.end(part)) {
    if (last > args.tokens) last = args.tokens;
  }
};

// Constants of the loss, and what a vector of tokens adds to.
template <class T>
struct Loss {
  const LossArgs<T>& args;
  Vec<T> weight;                   // of a counted token's gradient
  DoubleSum sums[kLossSums] = {};  // terms of either sign, of which little may be left
  Vec<T> largest_ratio{};

  RLHF_INLINE static Vec<T> zero() { return Vec<T>{}; }
  RLHF_INLINE static Vec<T> ones_where(Mask<T> condition) { return condition ? broadcast(T(1)) : zero(); }
  RLHF_INLINE static Vec<T> number(double x) { return broadcast(static_cast<T>(x)); }

  // What stands under the mask may be NaN: it is replaced before the arithmetic, not multiplied by 0 after it.
  RLHF_INLINE static Vec<T> counted_of(const T* p, int64_t t, int64_t n, Mask<T> counted) {
    return counted ? load(p + t, n, T(0)) : zero();
  }

  RLHF_INLINE Vec<T> policy(int64_t t, int64_t n, Mask<T> counted) {
    const Vec<T> advantages = counted_of(args.advantages, t, n, counted), bound = number(args.log_ratio_clamp);
    Vec<T> d = counted_of(args.logprobs, t, n, counted) - counted_of(args.old_logprobs, t, n, counted);
    const Mask<T> stopped = abs<T>(d) > bound;
    d = min(bound, max(-bound, d));
    const ExpPair<T> e = exp_pair(d);
    const Vec<T> ratio = e.exp;
    const Vec<T> within = min(number(1 + args.clip_high), max(number(1 - args.clip_low), ratio));
    const Vec<T> unclipped = -advantages * ratio, clipped = -advantages * within;
    const Mask<T> is_clipped = clipped > unclipped;
    Vec<T> loss = max(clipped, unclipped);
    const Vec<T> ceiling = -advantages * number(args.dual_clip);
    const Mask<T> is_dual = (advantages < zero()) & (loss > ceiling);
    loss = is_dual ? ceiling : loss;
    Vec<T> gradient = stopped | is_clipped | is_dual ? zero() : unclipped;
    if (args.is_weights) {
      const Vec<T> importance = counted_of(args.is_weights, t, n, counted);
      loss *= importance;
      gradient *= importance;
    }
    sums[kPolicyLoss] += loss;
    sums[kApproxKL] += T(0.5) * d * d;
    sums[kApproxKLK3] += e.expm1 - d;
    sums[kClipped] += ones_where(is_clipped);
    sums[kDualClipped] += ones_where(is_dual);
    sums[kRatio] += counted ? ratio : zero();
    largest_ratio = max(counted ? ratio : zero(), largest_ratio);
    return gradient;
  }

  RLHF_INLINE Vec<T> kl(int64_t t, int64_t n, Mask<T> counted) {
    const Vec<T> bound = number(args.kl_clamp);
    Vec<T> x = counted_of(args.logprobs, t, n, counted) - counted_of(args.ref_logprobs, t, n, counted);
    const Mask<T> stopped = abs<T>(x) > bound;
    x = min(bound, max(-bound, x));
    sums[kKL] += kl_value<T>(x, args.kl_estimator);
    // 0 and not 0 times what may be inf: the term may be there for its statistic alone.
    if (args.kl_coef == 0) return zero();
    return stopped ? zero() : number(args.kl_coef) * kl_gradient<T>(x, args.kl_estimator);
  }

  RLHF_INLINE Vec<T> value(int64_t t, int64_t n, Mask<T> counted) {
    const Vec<T> values = counted_of(args.values, t, n, counted), returns = counted_of(args.returns, t, n, counted);
    const Vec<T> error = values - returns, squared = error * error;
    Vec<T> clipped_squared = squared;
    if (args.old_values) {
      const Vec<T> old_values = counted_of(args.old_values, t, n, counted), clip = number(args.value_clip);
      const Vec<T> clipped_error =
          max(old_values - clip, min(old_values + clip, values)) - returns + (old_values - old_values);
      clipped_squared = clipped_error * clipped_error;
    }
    const Mask<T> is_clipped = clipped_squared > squared;
    sums[kValueLoss] += T(0.5) * max(squared, clipped_squared);
    sums[kValueClipped] += ones_where(is_clipped);
    return is_clipped ? zero() : error;
  }

  RLHF_INLINE void add(int64_t t, int64_t n) {
    const Mask<T> counted = load_mask<T>(args.mask ? args.mask + t : nullptr, n);
    const Vec<T> w = counted ? weight : zero();
    Vec<T> d_logprobs = policy(t, n, counted);
    if (args.ref_logprobs) d_logprobs += kl(t, n, counted);
    if (args.d_logprobs) store(args.d_logprobs + t, d_logprobs * w, n);
    const Vec<T> d_values = args.values ? value(t, n, counted) : zero();
    if (args.d_values)
      store(args.d_values + t, args.value_coef == 0 ? zero() : number(args.value_coef) * d_values * w, n);
    if (args.entropy) sums[kEntropy] += counted_of(args.entropy, t, n, counted);
    if (args.d_entropy) store(args.d_entropy + t, number(-args.entropy_coef) * w, n);
  }
};

template <class T>
void count(const LossArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    const Span span(args, part);
    int64_t tokens = span.last - span.first;
    if (args.mask) {
      tokens = 0;
      for (int64_t t = span.first; t < span.last; ++t) tokens += args.mask[t];
    }
    args.results[part].tokens = static_cast<double>(tokens);
  }
}

template <class T>
void loss(const LossArgs<T>& args, int64_t begin, int64_t end) {
  T* const gradients[] = {args.d_logprobs, args.d_values, args.d_entropy};
  const int64_t from = Span(args, begin).first, to = Span(args, end - 1).last;
  PagesAhead pages[] = {{gradients[0], from, to}, {gradients[1], from, to}, {gradients[2], from, to}};
  for (int64_t part = begin; part < end; ++part) {
    const Span span(args, part);
    for (int i = 0; i < 3; ++i) {
      if (gradients[i]) pages[i].reach(gradients[i] + span.last);
    }
    LossPart& result = args.results[part];
    const double tokens = args.token_mean_of_sequence && result.tokens > 0 ? result.tokens : 1;
    Loss<T> state{args, broadcast(static_cast<T>(args.scale / tokens))};
    for (int64_t t = span.first; t < span.last; t += kLanes<T>) state.add(t, span.last - t);
    for (int k = 0; k < kLossSums; ++k) result.sums[k] = state.sums[k].total();
    for (int k = kPolicyLoss; k <= kKL; ++k) result.sums[k] /= tokens;
    result.largest_ratio = largest<T>(state.largest_ratio);
  }
}

}  // namespace

const PPOLossTable ppo_loss_table = {{count<float>, count<double>}, {loss<float>, loss<double>}};

}  // namespace rlhf::RLHF_ISA
