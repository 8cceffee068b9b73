// How a kernel reaches its loops: <op>_kernel.cpp is compiled once per instruction set and defines a table of functions
// in a namespace of that name; the wrapper picks one table per process and calls it through torch's threads.
#pragma once

#include <cstdint>

namespace rlhf {

// The loops of one kernel over [begin, end), for both compute types.
template <template <class> class Args>
struct Kernel {
  void (*f32)(const Args<float>&, int64_t begin, int64_t end);
  void (*f64)(const Args<double>&, int64_t begin, int64_t end);

  void operator()(const Args<float>& args, int64_t begin, int64_t end) const { f32(args, begin, end); }
  void operator()(const Args<double>& args, int64_t begin, int64_t end) const { f64(args, begin, end); }
};

}  // namespace rlhf

// Declares the table `name` of each instruction set, inside namespace rlhf.
#define RLHF_DECLARE_TABLE(Type, name) \
  namespace baseline {                 \
  extern const Type name;              \
  }                                    \
  namespace avx2 {                     \
  extern const Type name;              \
  }                                    \
  namespace avx512 {                   \
  extern const Type name;              \
  }
