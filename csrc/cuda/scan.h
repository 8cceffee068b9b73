// How a scan covers its sequences; chosen on the host from what it knows without a sync.
#pragma once

#include "cuda/layout.h"

namespace rlhf::cuda {

struct ScanPlan {
  bool warps;  // a warp a sequence, else a block
  int chunks;  // parts of a sequence, each with a block of its own; above 1 a launch before the scan stores their maps

  int64_t units(const Layout& layout) const { return layout.rows * chunks; }
  int grid(const Layout& layout) const { return grid_size(ceil_div(units(layout), warps ? BLOCK / WARP : 1)); }
};

// For the current device.
ScanPlan plan_scan(const Layout& layout);

}  // namespace rlhf::cuda
