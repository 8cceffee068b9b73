#include "cpu/token_logprobs_kernel.h"

#include "cpu/pages.h"
#include "cpu/softmax_row.h"

namespace rlhf::RLHF_ISA {
namespace {

template <class T>
int64_t row_id(const TokenRows<T>& rows, int64_t row) {
  return rows.narrow_ids ? static_cast<const int32_t*>(rows.ids)[row] : static_cast<const int64_t*>(rows.ids)[row];
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
  const RowSums<T> sums = row_sums<kSoftcap>(logits, args.rows.vocab, scale);
  const double log_sum = __builtin_log(sums.weights);
  const double chosen = point<kSoftcap>(load(logits + id, 1, T(0)), scale)[0];
  args.logprobs[row] = static_cast<T>((chosen - sums.max) * scale.factor - log_sum);
  if (args.entropy) args.entropy[row] = static_cast<T>(log_sum - sums.terms / sums.weights);
  const Normaliser<T> found = normaliser(sums, scale);
  args.row_max[row] = found.row_max;
  args.log_sum[row] = found.log_sum;
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
  const LogProb<T> logp_of(Normaliser<T>{args.row_max[row], args.log_sum[row]}, scale);

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
  const double logp = (static_cast<double>(x) - logp_of.near_max) * scale.factor - logp_of.rest;
  double g = -g_logprob * __builtin_expm1(logp) - __builtin_exp(logp) * g_entropy * (logp + entropy[0]);
  if constexpr (kSoftcap) g *= 1 - static_cast<double>(x) * x;
  store(grad + at, broadcast(static_cast<T>(g / scale.temperature)), 1);
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
