#include "cpu/masked_whiten_kernel.h"

#include "cpu/pages.h"
#include "cpu/whiten_loops.h"

namespace rlhf::RLHF_ISA {
namespace {

template <class T>
struct Part {
  const T* x;
  const bool* mask;
  int64_t n;
  T* out;

  Part(const WhitenArgs<T>& args, int64_t index) {
    const int64_t first = index * kWhitenPart;
    x = args.x + first;
    mask = args.mask ? args.mask + first : nullptr;
    n = args.n - first < kWhitenPart ? args.n - first : kWhitenPart;
    out = args.out + first;
  }
};

template <class T>
void moments(const WhitenArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Part<T> part(args, i);
    args.parts[i] = masked_moments(part.x, part.mask, part.n);
  }
}

template <class T>
void apply(const WhitenArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t to = end * kWhitenPart < args.n ? end * kWhitenPart : args.n;
  PagesAhead pages(args.out, begin * kWhitenPart, to);
  for (int64_t i = begin; i < end; ++i) {
    const Part<T> part(args, i);
    pages.reach(part.out + part.n);
    whiten(part.x, part.mask, part.n, args.by, part.out);
  }
}

}  // namespace

const MaskedWhitenTable masked_whiten_table = {{moments<float>, moments<double>}, {apply<float>, apply<double>}};

}  // namespace rlhf::RLHF_ISA
