// Stands in for csrc/cuda/launch.cuh, the one place with launch syntax.
#pragma once

#include <cuda_runtime.h>

#include "cuda/layout.h"

namespace rlhf::cuda {

template <typename... Parameters, typename... Arguments>
void launch(const char*, void (*kernel)(Parameters...), int blocks, void*, const Arguments&... arguments) {
  run_blocks(blocks, BLOCK, [&] { kernel(arguments...); });
}

}  // namespace rlhf::cuda
