#include "cpu/gae_kernel.h"

#include "cpu/gae_scan.h"
#include "cpu/pages.h"

namespace rlhf::RLHF_ISA {
namespace {

template <class T>
void gae(const GaeArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t from = args.sequences.begin(begin), to = args.sequences.end(end - 1);
  PagesAhead advantages(args.advantages, from, to), returns(args.returns, from, to);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = args.sequences.begin(b), last = args.sequences.end(b);
    advantages.reach(args.advantages + last);
    returns.reach(args.returns + last);
    const double bootstrap = args.bootstrap_values ? args.bootstrap_values[b] : 0;
    gae_scan(args.rewards + first, args.values + first, args.mask ? args.mask + first : nullptr, last - first,
             {args.gamma, args.gamma * args.lam, args.gap_zero, bootstrap}, args.advantages + first,
             args.returns + first);
  }
}

}  // namespace

const GaeTable gae_table = {gae<float>, gae<double>};

}  // namespace rlhf::RLHF_ISA
