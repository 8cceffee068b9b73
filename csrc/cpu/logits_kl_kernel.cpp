#include "cpu/logits_kl_kernel.h"

#include "cpu/pages.h"
#include "cpu/softmax_row.h"

namespace rlhf::RLHF_ISA {
namespace {

// w * x, where 0 * inf is 0.
template <class T>
RLHF_INLINE Vec<T> weighted(Vec<T> w, Vec<T> x) {
  return w == T(0) ? w : w * x;
}

// w * (exp(-x) - 1 + x) for w = v exp(x): v - w + w x. Never negative, and to the last digits where v is near w, by the
// Taylor series there. Summed over two distributions it is their divergence, whatever the rounding of their
// normalisers.
template <class T>
RLHF_INLINE Vec<T> divergence_term(Vec<T> w, Vec<T> v, Vec<T> x) {
  Vec<T> series = broadcast(T(1));
  for (int k = 13; k > 2; --k) series = T(1) - series * x * (T(1) / k);
  return abs<T>(x) < T(0.35) ? w * (T(0.5) * x * x) * series : (v - w) + weighted<T>(w, x);
}

template <class T>
RLHF_INLINE Vec<T> exp_below(Vec<T> logp) {
  return exp_in_range(max(broadcast(kExpLow<T>), min(broadcast(T(0)), logp)));
}

// log p - log q from the difference of the logits, exact where they are close; -inf in both is no difference.
template <class T>
RLHF_INLINE Vec<T> log_ratio(Vec<T> x, Vec<T> y, T factor, T shift) {
  return (x == y ? Vec<T>{} : x - y) * broadcast(factor) - broadcast(shift);
}

// d kl / dz but for a multiple of p that makes their sum 0.
template <class T>
RLHF_INLINE Vec<T> slope(bool forward_kl, Vec<T> p, Vec<T> q, Vec<T> x) {
  if (forward_kl) return abs<T>(x) < T(1) ? -p * exp_pair(-x).expm1 : p - q;
  return weighted<T>(p, x);
}

template <class T>
bool is_masked(const KlRows<T>& rows, int64_t row) {
  return rows.mask && !rows.mask[row];
}

template <bool kSoftcap, class S, class T>
void forward_row(const KlForwardArgs<T>& args, int64_t row) {
  const KlRows<T>& rows = args.rows;
  if (is_masked(rows, row)) {
    args.kl[row] = 0;
    for (int k = 0; k < kSaved; ++k) args.saved[k * rows.count + row] = 0;
    return;
  }
  const S* logits = static_cast<const S*>(rows.policy.logits) + row_offset(rows.policy, row);
  const S* others = static_cast<const S*>(rows.reference.logits) + row_offset(rows.reference, row);
  const int64_t vocab = rows.policy.vocab;
  const Scale<T> scale = row_scale(rows.policy, row);
  const RowSums<T> policy = row_sums<kSoftcap>(logits, vocab, scale);
  const RowSums<T> reference = row_sums<kSoftcap>(others, vocab, scale);
  const Normaliser<T> found_p = normaliser(policy, scale), found_q = normaliser(reference, scale);
  const LogProb<T> logp_of(found_p, scale), logq_of(found_q, scale);
  const T shift = static_cast<T>((static_cast<double>(policy.max) - reference.max) * scale.factor +
                                 __builtin_log(policy.weights / reference.weights));
  DoubleSum total, moment, weight;
  for (int64_t j = 0; j < vocab; j += kLanes<T>) {
    const Vec<T> point_p = point<kSoftcap>(load(logits + j, vocab - j, T(0)), scale);
    const Vec<T> point_q = point<kSoftcap>(load(others + j, vocab - j, T(0)), scale);
    const Vec<T> x = log_ratio<T>(point_p, point_q, scale.factor, shift);
    Vec<T> p = exp_below<T>(logp_of(point_p)), q = exp_below<T>(logq_of(point_q));
    if (vocab - j < kLanes<T>) {
      p = keep(p, vocab - j, T(0));
      q = keep(q, vocab - j, T(0));
    }
    total += rows.forward_kl ? divergence_term<T>(q, p, -x) : divergence_term<T>(p, q, x);
    moment += slope<T>(rows.forward_kl, p, q, x);
    weight += p;
  }
  args.kl[row] = static_cast<T>(total.total());
  const T mean = static_cast<T>(moment.total() / weight.total());
  const T saved[kSaved] = {found_p.row_max, found_p.log_sum, found_q.row_max, found_q.log_sum, shift, mean};
  for (int k = 0; k < kSaved; ++k) args.saved[k * rows.count + row] = saved[k];
}

// The gradient may be written over the policy's logits: a row is read before it is written, element by element.
template <bool kSoftcap, class S, class T>
void backward_row(const KlBackwardArgs<T>& args, int64_t row) {
  const KlRows<T>& rows = args.rows;
  const int64_t vocab = rows.policy.vocab;
  S* grad = static_cast<S*>(args.grad_logits) + row * vocab;
  if (is_masked(rows, row)) return zero_row(grad, vocab);
  const S* logits = static_cast<const S*>(rows.policy.logits) + row_offset(rows.policy, row);
  const S* others = static_cast<const S*>(rows.reference.logits) + row_offset(rows.reference, row);
  const Scale<T> scale = row_scale(rows.policy, row);
  const auto saved = [&](int k) { return args.saved[k * rows.count + row]; };
  const LogProb<T> logp_of(Normaliser<T>{saved(0), saved(1)}, scale), logq_of(Normaliser<T>{saved(2), saved(3)}, scale);
  const T shift = saved(4);
  const Vec<T> upstream = broadcast(args.grad_kl[row] / scale.temperature), mean = broadcast(saved(5));
  for (int64_t j = 0; j < vocab; j += kLanes<T>) {
    const Vec<T> point_p = point<kSoftcap>(load(logits + j, vocab - j, T(0)), scale);
    const Vec<T> point_q = point<kSoftcap>(load(others + j, vocab - j, T(0)), scale);
    const Vec<T> x = log_ratio<T>(point_p, point_q, scale.factor, shift);
    const Vec<T> p = exp_below<T>(logp_of(point_p));
    const Vec<T> q = rows.forward_kl ? exp_below<T>(logq_of(point_q)) : p;
    Vec<T> g = slope<T>(rows.forward_kl, p, q, x) - p * mean;
    g *= upstream;
    if constexpr (kSoftcap) g *= T(1) - point_p * point_p;
    store(grad + j, g, vocab - j);
  }
}

template <class T>
void forward(const KlForwardArgs<T>& args, int64_t begin, int64_t end) {
  specialised(args.rows.policy, [&](auto storage, auto softcap) {
    for (int64_t row = begin; row < end; ++row) forward_row<softcap.value, decltype(storage)>(args, row);
  });
}

template <class T>
void backward(const KlBackwardArgs<T>& args, int64_t begin, int64_t end) {
  specialised(args.rows.policy, [&](auto storage, auto softcap) {
    using S = decltype(storage);
    S* grad = static_cast<S*>(args.grad_logits);
    const int64_t vocab = args.rows.policy.vocab;
    const bool fresh = args.grad_logits != args.rows.policy.logits;
    PagesAhead pages(grad, begin * vocab, (fresh ? end : begin) * vocab);
    for (int64_t row = begin; row < end; ++row) {
      if (fresh) pages.reach(grad + (row + 1) * vocab);
      backward_row<softcap.value, S>(args, row);
    }
  });
}

}  // namespace

const LogitsKlTable logits_kl_table = {{forward<float>, forward<double>}, {backward<float>, backward<double>}};

}  // namespace rlhf::RLHF_ISA
