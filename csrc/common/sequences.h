// Where the sequences of a batch stand in memory: row b of (B, T), or [bounds[b], bounds[b + 1]) of packed (N,).
#pragma once

#include <cstdint>

namespace rlhf {

struct Sequences {
  const int32_t* bounds;  // null: padded
  int64_t count;          // B
  int64_t length;         // T of the padded layout

  // Inlined always: code that is compiled per instruction set must not share an out-of-line copy.
  [[gnu::always_inline]] int64_t begin(int64_t b) const { return bounds ? bounds[b] : b * length; }
  [[gnu::always_inline]] int64_t end(int64_t b) const { return bounds ? bounds[b + 1] : (b + 1) * length; }
};

}  // namespace rlhf
