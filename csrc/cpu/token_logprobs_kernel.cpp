#include "cpu/token_logprobs_kernel.h"

#include <type_traits>

#include "common/vec_math.h"
#include "cpu/pages.h"

namespace rlhf::RLHF_ISA {
namespace {

// A block is read twice, for its maximum and for its sums: 16 KiB of float stay in the L1 cache. Its sums are taken in
// groups of 16 vectors, which keeps their rounding errors at those of torch's pairwise sums, and added up in double.
constexpr int64_t kBlock = 4096;
constexpr int64_t kGroup = 16;

// z = factor * x: x is the logit and factor 1 / temperature, or x is tanh(logit / softcap) and factor softcap /
// temperature. Differences are taken in x, before the product: an offset that all logits share cancels exactly there,
// and would cost z three digits at 1e4.
template <class T>
struct Scale {
  T softcap, temperature, factor;
};

template <bool kSoftcap, class T>
RLHF_INLINE Vec<T> point(Vec<T> logit, const Scale<T>& scale) {
  if constexpr (kSoftcap) return tanh(logit / broadcast(scale.softcap));
  return logit;
}

template <class T>
int64_t row_offset(const RowArgs<T>& rows, int64_t row) {
  int64_t offset = 0;
  for (int64_t d = rows.dims - 1; d >= 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset;
}

template <class T>
int64_t row_id(const RowArgs<T>& rows, int64_t row) {
  return rows.narrow_ids ? static_cast<const int32_t*>(rows.ids)[row] : static_cast<const int64_t*>(rows.ids)[row];
}

template <class T>
Scale<T> row_scale(const RowArgs<T>& rows, int64_t row) {
  const T temperature = rows.temperatures ? rows.temperatures[row] : static_cast<T>(rows.temperature);
  const T softcap = static_cast<T>(rows.softcap);
  return {softcap, temperature, (softcap > 0 ? softcap : T(1)) / temperature};
}

// Of the part of a row that has been read; NaN where it holds NaN or +inf.
template <class T>
struct RowSums {
  T max = -__builtin_inf();  // of x
  double weights = 0;        // sum of w = exp(d), d = factor * (x - max)
  double terms = 0;          // sum of w * d

  void raise_max(T higher, T factor) {
    if (!(higher > max)) return;
    const double step = (static_cast<double>(max) - higher) * factor;
    const double shrink = __builtin_exp(step);
    terms = weights > 0 ? shrink * (terms + step * weights) : terms;
    weights *= shrink;
    max = higher;
  }
};

template <bool kSoftcap, class S, class T>
void add_block(RowSums<T>& sums, const S* logits, int64_t n, const Scale<T>& scale) {
  constexpr int64_t kStep = kLanes<T>;
  const T kNothing = -__builtin_inf();
  alignas(64) T points[kSoftcap ? kBlock : 1];  // tanh is worth keeping, a conversion from half precision is not
  Vec<T> top = broadcast(kNothing);
  for (int64_t j = 0; j < n; j += kStep) {
    Vec<T> x = point<kSoftcap>(load(logits + j, n - j, kNothing), scale);
    if constexpr (kSoftcap) {
      if (n - j < kStep) x = keep(x, n - j, kNothing);  // a softcap makes -inf finite
      store(points + j, x);
    }
    top = max(x, top);
  }
  sums.raise_max(largest<T>(top), scale.factor);
  // Before the first finite logit every weight is 0, and NaN must still show.
  const Vec<T> max_x = broadcast(sums.max == kNothing ? T(0) : sums.max), factor = broadcast(scale.factor);
  Vec<T> weights{}, terms{};
  for (int64_t begin = 0; begin < n; begin += kGroup * kStep) {
    const int64_t end = begin + kGroup * kStep < n ? begin + kGroup * kStep : n;
    Vec<T> group_weights{}, group_terms{};
    for (int64_t j = begin; j < end; j += kStep) {
      __builtin_prefetch(logits + j + kBlock);
      Vec<T> x;
      if constexpr (kSoftcap) {
        x = load(static_cast<const T*>(points) + j);
      } else {
        x = load(logits + j, n - j, kNothing);
      }
      // At kExpLow the weight is exactly 0, so that a logit of -inf adds 0 to the terms and not NaN.
      const Vec<T> d = max(broadcast(kExpLow<T>), (x - max_x) * factor);
      const Vec<T> w = exp_in_range(d);
      group_weights += w;
      group_terms += w * d;
    }
    weights += group_weights;
    terms += group_terms;
  }
  sums.weights += sum<T>(weights);
  sums.terms += sum<T>(terms);
}

template <bool kSoftcap, class S, class T>
void forward_row(const ForwardArgs<T>& args, int64_t row) {
  const int64_t id = row_id(args.rows, row);
  if (id == args.rows.ignore_index) {
    args.logprobs[row] = args.row_max[row] = args.log_sum[row] = 0;
    if (args.entropy) args.entropy[row] = 0;
    return;
  }
  const S* logits = static_cast<const S*>(args.rows.logits) + row_offset(args.rows, row);
  const Scale<T> scale = row_scale(args.rows, row);
  RowSums<T> sums;
  for (int64_t begin = 0; begin < args.rows.vocab; begin += kBlock) {
    const int64_t left = args.rows.vocab - begin;
    add_block<kSoftcap>(sums, logits + begin, left < kBlock ? left : kBlock, scale);
  }
  const double log_sum = __builtin_log(sums.weights);
  const double chosen = point<kSoftcap>(load(logits + id, 1, T(0)), scale)[0];
  args.logprobs[row] = static_cast<T>((chosen - sums.max) * scale.factor - log_sum);
  if (args.entropy) args.entropy[row] = static_cast<T>(log_sum - sums.terms / sums.weights);
  // The backward is told the maximum of z, rounded, and a log-sum that makes up for the rounding.
  args.row_max[row] = sums.max * scale.factor;
  args.log_sum[row] = static_cast<T>(log_sum + __builtin_fma(sums.max, scale.factor, -args.row_max[row]));
}

template <class S>
void zero_row(S* grad, int64_t vocab) {
  for (int64_t j = 0; j < vocab; j += kLanes<Compute<S>>) store(grad + j, Vec<Compute<S>>{}, vocab - j);
}

// The gradient may be written over the logits: a row is read before it is written, element by element.
template <bool kSoftcap, class S, class T>
void backward_row(const BackwardArgs<T>& args, int64_t row) {
  const int64_t vocab = args.rows.vocab;
  const int64_t id = row_id(args.rows, row);
  S* grad = static_cast<S*>(args.grad_logits) + row * vocab;
  if (id == args.rows.ignore_index) return zero_row(grad, vocab);
  const S* logits = static_cast<const S*>(args.rows.logits) + row_offset(args.rows, row);
  const int64_t at = id - args.first_id;
  const bool here = at >= 0 && at < vocab;
  const Vec<T> logit = load(logits + (here ? at : 0), here ? 1 : 0, T(0));
  const Scale<T> scale = row_scale(args.rows, row);
  const T g_logprob = args.grad_logprobs ? args.grad_logprobs[row] : 0;
  const T g_entropy = args.grad_entropy ? args.grad_entropy[row] : 0;
  const Vec<T> entropy = broadcast(args.grad_entropy ? args.entropy[row] : T(0));
  const Vec<T> c_logprob = broadcast(-g_logprob / scale.temperature),
               c_entropy = broadcast(-g_entropy / scale.temperature);
  // logp = z - row_max - log_sum = factor * (x - near_max) - rest, with near_max about the maximum of x
  const T near_max = args.row_max[row] / scale.factor;
  const T rest = static_cast<T>(args.log_sum[row] - __builtin_fma(near_max, scale.factor, -args.row_max[row]));
  const auto logp_of = [&](Vec<T> x) { return (x - broadcast(near_max)) * broadcast(scale.factor) - broadcast(rest); };

  // Plain stores: the pages of a fresh gradient come zeroed through the cache. Stores past it took 1.2 times as long
  // (512 x 151936 float, one core of a Xeon with AVX-512).
  for (int64_t j = 0; j < vocab; j += kLanes<T>) {
    const Vec<T> x = point<kSoftcap>(load(logits + j, vocab - j, T(0)), scale);
    const Vec<T> logp = max(broadcast(kExpLow<T>), logp_of(x));
    Vec<T> g = exp_in_range(logp) * (c_logprob + c_entropy * (logp + entropy));
    if constexpr (kSoftcap) g *= T(1) - x * x;
    store(grad + j, g, vocab - j);
  }

  // A token that cannot be chosen: the loop gave it 0, or the NaN of its row.
  if (!here || logit[0] == -__builtin_inf()) return;
  const T x = point<kSoftcap>(logit, scale)[0];
  const double logp = (static_cast<double>(x) - near_max) * scale.factor - rest;
  double g = -g_logprob * __builtin_expm1(logp) - __builtin_exp(logp) * g_entropy * (logp + entropy[0]);
  if constexpr (kSoftcap) g *= 1 - static_cast<double>(x) * x;
  store(grad + at, broadcast(static_cast<T>(g / scale.temperature)), 1);
}

// Calls f(S(), softcap) with the logits' type and whether there is a softcap as compile-time constants.
template <class T, class F>
void specialised(const RowArgs<T>& rows, F&& f) {
  const auto with_storage = [&](auto storage) {
    if (rows.softcap > 0) {
      f(storage, std::true_type());
    } else {
      f(storage, std::false_type());
    }
  };
  if constexpr (std::is_same_v<T, double>) {
    with_storage(double());
  } else if (rows.type == LogitsType::kBFloat16) {
    with_storage(BFloat16());
  } else if (rows.type == LogitsType::kFloat16) {
    with_storage(Float16());
  } else {
    with_storage(float());
  }
}

template <class T>
void forward(const ForwardArgs<T>& args, int64_t begin, int64_t end) {
  specialised(args.rows, [&](auto storage, auto softcap) {
    for (int64_t row = begin; row < end; ++row) forward_row<softcap.value, decltype(storage)>(args, row);
  });
}

template <class T>
void backward(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
  specialised(args.rows, [&](auto storage, auto softcap) {
    using S = decltype(storage);
    S* grad = static_cast<S*>(args.grad_logits);
    const bool fresh = args.grad_logits != args.rows.logits;
    PagesAhead pages(grad, begin * args.rows.vocab, (fresh ? end : begin) * args.rows.vocab);
    for (int64_t row = begin; row < end; ++row) {
      if (fresh) pages.reach(grad + (row + 1) * args.rows.vocab);
      backward_row<softcap.value, S>(args, row);
    }
  });
}

}  // namespace

const TokenLogprobsTable token_logprobs_table = {{forward<float>, forward<double>},
                                                 {backward<float>, backward<double>}};

}  // namespace rlhf::RLHF_ISA
