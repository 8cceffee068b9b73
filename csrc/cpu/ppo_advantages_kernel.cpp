#include "cpu/ppo_advantages_kernel.h"

#include "cpu/gae_scan.h"
#include "cpu/kl.h"
#include "cpu/pages.h"
#include "cpu/whiten_loops.h"

namespace rlhf::RLHF_ISA {
namespace {

// A sequence: where it starts, its length, and its mask.
struct Span {
  int64_t first, n;
  const bool* mask;

  template <class T>
  Span(const AdvantageArgs<T>& args, int64_t b)
      : first(args.sequences.begin(b)),
        n(args.sequences.end(b) - first),
        mask(args.mask ? args.mask + first : nullptr) {}
};

template <class T>
void shape_rewards(const AdvantageArgs<T>& args, int64_t b, const Span& span) {
  const T* logprobs = args.logprobs + span.first;
  const T* ref_logprobs = args.ref_logprobs + span.first;
  const T* scores = args.token_scores ? args.scores + span.first : nullptr;
  T* rewards = args.rewards + span.first;
  T* kl = args.kl + span.first;
  const Vec<T> coef = broadcast(static_cast<T>(args.kl_coef)), zero{};
  const Vec<T> clip = broadcast(static_cast<T>(args.score_clip));
  for (int64_t t = 0; t < span.n; t += kLanes<T>) {
    const int64_t left = span.n - t;
    const Mask<T> counted = load_mask<T>(span.mask ? span.mask + t : nullptr, left);
    const Vec<T> x = load(logprobs + t, left, T(0)) - load(ref_logprobs + t, left, T(0));
    const Vec<T> value = kl_value<T>(x, args.kl_estimator);
    const Vec<T> score = scores ? min(clip, max(-clip, load(scores + t, left, T(0)))) : zero;
    store(kl + t, counted ? value : zero, left);
    store(rewards + t, counted ? score - (args.kl_coef == 0 ? zero : coef * value) : zero, left);
  }
  if (scores) return;
  int64_t last = span.n - 1;
  while (span.mask && last >= 0 && !span.mask[last]) --last;
  if (last >= 0) rewards[last] += min(clip, max(-clip, broadcast(args.scores[b])))[0];
}

template <class T>
void recur(const AdvantageArgs<T>& args, int64_t b, const Span& span) {
  gae_scan(args.rewards + span.first, args.values + span.first, span.mask, span.n,
           {args.gamma, args.gamma * args.lam, false, 0}, args.advantages + span.first, args.returns + span.first);
  args.parts[b] = masked_moments(args.advantages + span.first, span.mask, span.n);
}

template <class T>
void first_sweep(const AdvantageArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t from = args.sequences.begin(begin), to = args.sequences.end(end - 1);
  PagesAhead pages[] = {
      {args.kl, from, to}, {args.rewards, from, to}, {args.advantages, from, to}, {args.returns, from, to}};
  for (int64_t b = begin; b < end; ++b) {
    const Span span(args, b);
    const int64_t last = span.first + span.n;
    pages[0].reach(args.kl + last);
    pages[1].reach(args.rewards + last);
    pages[2].reach(args.advantages + last);
    pages[3].reach(args.returns + last);
    shape_rewards(args, b, span);
    if (args.whiten_rewards) {
      args.parts[b] = masked_moments(args.rewards + span.first, span.mask, span.n);
    } else {
      recur(args, b, span);
    }
  }
}

template <class T>
void whiten_rewards(const AdvantageArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const Span span(args, b);
    T* rewards = args.rewards + span.first;
    whiten(rewards, span.mask, span.n, args.by, rewards);
    recur(args, b, span);
  }
}

template <class T>
void whiten_advantages(const AdvantageArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const Span span(args, b);
    T* advantages = args.advantages + span.first;
    whiten(advantages, span.mask, span.n, args.by, advantages);
  }
}

}  // namespace

const PPOAdvantagesTable ppo_advantages_table = {
    {first_sweep<float>, first_sweep<double>},
    {whiten_rewards<float>, whiten_rewards<double>},
    {whiten_advantages<float>, whiten_advantages<double>},
};

}  // namespace rlhf::RLHF_ISA
