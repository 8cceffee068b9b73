#include <cuda_runtime.h>

#include "cuda/scan.h"

namespace rlhf::cuda {

// Short sequences, or enough of them to give every multiprocessor its warps: a warp each, no block barrier. Otherwise a
// block each; where that leaves multiprocessors idle and sequences have 8 tiles or more: chunks of 2 tiles or more.
// The thresholds are reasoned, not measured.
ScanPlan plan_scan(const Layout& layout) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (layout.length <= 256 || layout.rows >= 32 * processors) return {true, 1};
  const int64_t tiles = ceil_div(layout.length, 4 * BLOCK), free = 2 * processors / layout.rows;
  if (tiles < 8 || free < 2) return {false, 1};
  return {false, static_cast<int>(free < tiles / 2 ? free : tiles / 2)};
}

}  // namespace rlhf::cuda
