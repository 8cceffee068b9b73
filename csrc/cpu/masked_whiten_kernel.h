#pragma once

#include "common/moments.h"
#include "cpu/dispatch.h"

namespace rlhf {

constexpr int64_t kWhitenPart = 4096;

template <class T>
struct WhitenArgs {
  const T* x;
  const bool* mask;  // null: all elements count
  int64_t n;
  Moments* parts;  // of each kWhitenPart elements; written by `moments`
  Whitening by;    // read by `apply`
  T* out;
};

// Ranges are of parts.
struct MaskedWhitenTable {
  Kernel<WhitenArgs> moments;
  Kernel<WhitenArgs> apply;
};
RLHF_DECLARE_TABLE(MaskedWhitenTable, masked_whiten_table)

}  // namespace rlhf
