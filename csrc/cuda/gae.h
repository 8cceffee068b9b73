#pragma once

#include "cuda/scan.h"

namespace rlhf::cuda {

template <typename T>
struct GaeArgs {
  const T* rewards;    // (tokens,)
  const T* values;     // (tokens,)
  const T* bootstrap;  // (rows,) or null
  T* advantages;       // (tokens,)
  T* returns;          // (tokens,)
  T* chunk_maps;       // (rows * chunks, 2) scratch, null with one chunk
  double gamma, lam;
  bool gap_zero;
};

template <typename T>
void gae(const Layout& layout, const ScanPlan& plan, const GaeArgs<T>& args, void* stream);

}  // namespace rlhf::cuda
