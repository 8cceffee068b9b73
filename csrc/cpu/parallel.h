// Runs a kernel's loops on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/isa.h"
#include "cpu/dispatch.h"

namespace rlhf {

// kernel(args, begin, end) over ranges that cover [0, n), each of at least `grain`.
template <template <class> class Args, class T>
void parallel(int64_t n, int64_t grain, const Kernel<Args>& kernel, const Args<T>& args) {
  const auto run = [&](int64_t begin, int64_t end) { kernel(args, begin, end); };
  torch::stable::parallel_for(0, n, grain, run);
}

}  // namespace rlhf
