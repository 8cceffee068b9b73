#pragma once

#include "common/sequences.h"
#include "cpu/dispatch.h"

namespace rlhf {

template <class T>
struct GaeArgs {
  Sequences sequences;
  const T* rewards;
  const T* values;
  const bool* mask;           // null: all tokens count
  const T* bootstrap_values;  // (B), null: 0
  double gamma, lam;
  bool gap_zero;
  T* advantages;
  T* returns;
};

// Ranges are of sequences.
using GaeTable = Kernel<GaeArgs>;
RLHF_DECLARE_TABLE(GaeTable, gae_table)

}  // namespace rlhf
