// The one place where kernels are launched: asynchronous, on the caller's stream, an error of the launch becomes an
// exception.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/layout.h"

namespace rlhf::cuda {

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int blocks, void* stream, const Arguments&... arguments) {
  kernel<<<blocks, BLOCK, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": the CUDA launch failed: " + cudaGetErrorString(error));
}

}  // namespace rlhf::cuda
