// How a wrapper runs a kernel: the table of this process's instruction set, on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string_view>

#include "common/isa.h"
#include "cpu/dispatch.h"

namespace rlhf {

template <class Table>
const Table& table_of(const Table& baseline, const Table& avx2, const Table& avx512) {
  const std::string_view isa = cpu_isa();
  return isa == "avx512" ? avx512 : isa == "avx2" ? avx2 : baseline;
}

// kernel(args, begin, end) over ranges that cover [0, n), each of at least `grain`.
template <template <class> class Args, class T>
void parallel(int64_t n, int64_t grain, const Kernel<Args>& kernel, const Args<T>& args) {
  const auto run = [&](int64_t begin, int64_t end) { kernel(args, begin, end); };
  torch::stable::parallel_for(0, n, grain, run);
}

// The same for a kernel that has one compute type.
template <class Args>
void parallel(int64_t n, int64_t grain, void (*kernel)(const Args&, int64_t begin, int64_t end), const Args& args) {
  const auto run = [&](int64_t begin, int64_t end) { kernel(args, begin, end); };
  torch::stable::parallel_for(0, n, grain, run);
}

}  // namespace rlhf

#ifdef RLHF_X86
#define RLHF_TABLE(name) ::rlhf::table_of(baseline::name, avx2::name, avx512::name)
#else
#define RLHF_TABLE(name) ::rlhf::table_of(baseline::name, baseline::name, baseline::name)
#endif
