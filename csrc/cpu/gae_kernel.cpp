#include "cpu/gae_kernel.h"

#include "cpu/gae_scan.h"

namespace rlhf::RLHF_ISA {
namespace {

template <class T>
void gae(const GaeArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = args.sequences.begin(b), n = args.sequences.end(b) - first;
    const double bootstrap = args.bootstrap_values ? args.bootstrap_values[b] : 0;
    gae_scan(args.rewards + first, args.values + first, args.mask ? args.mask + first : nullptr, n, bootstrap,
             {args.gamma, args.lam, args.gap_zero}, args.advantages + first, args.returns + first);
  }
}

}  // namespace

const GaeTable gae_table = {gae<float>, gae<double>};

}  // namespace rlhf::RLHF_ISA
