// A row of logits, shaped and reduced: what the row loops of token_logprobs and logits_kl share.
#pragma once

#include <type_traits>

#include "common/vec_math.h"
#include "cpu/logit_rows.h"

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
int64_t row_offset(const LogitRows<T>& rows, int64_t row) {
  int64_t offset = 0;
  for (int64_t d = rows.dims - 1; d >= 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset;
}

template <class T>
Scale<T> row_scale(const LogitRows<T>& rows, int64_t row) {
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
RowSums<T> row_sums(const S* logits, int64_t vocab, const Scale<T>& scale) {
  RowSums<T> sums;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t left = vocab - begin;
    add_block<kSoftcap>(sums, logits + begin, left < kBlock ? left : kBlock, scale);
  }
  return sums;
}

// What a backward needs of a row: the maximum of z, rounded, and a log-sum that makes up for the rounding.
template <class T>
struct Normaliser {
  T row_max, log_sum;
};

template <class T>
Normaliser<T> normaliser(const RowSums<T>& sums, const Scale<T>& scale) {
  const T row_max = sums.max * scale.factor;
  return {row_max, static_cast<T>(__builtin_log(sums.weights) + __builtin_fma(sums.max, scale.factor, -row_max))};
}

// logp = z - row_max - log_sum = factor * (x - near_max) - rest, with near_max about the maximum of x.
template <class T>
struct LogProb {
  T near_max, rest, factor;

  LogProb(const Normaliser<T>& found, const Scale<T>& scale)
      : near_max(found.row_max / scale.factor), factor(scale.factor) {
    rest = static_cast<T>(found.log_sum - __builtin_fma(near_max, factor, -found.row_max));
  }
  RLHF_INLINE Vec<T> operator()(Vec<T> x) const {
    return (x - broadcast(near_max)) * broadcast(factor) - broadcast(rest);
  }
};

template <class S>
void zero_row(S* row, int64_t vocab) {
  for (int64_t j = 0; j < vocab; j += kLanes<Compute<S>>) store(row + j, Vec<Compute<S>>{}, vocab - j);
}

// Calls f(S(), softcap) with the logits' type and whether there is a softcap as compile-time constants.
template <class T, class F>
void specialised(const LogitRows<T>& rows, F&& f) {
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

}  // namespace
}  // namespace rlhf::RLHF_ISA
