// The two token layouts as kernels see them, and how a launch covers them. No torch header, so that nvcc compiles it in
// a second.
#pragma once

#include <cstdint>

namespace rlhf::cuda {

constexpr int WARP = 32;
constexpr int BLOCK = 256;       // threads of every kernel
constexpr int MIN_BLOCKS = 2;    // resident on a multiprocessor; lets ptxas use 128 registers, and nothing spills
constexpr int MAX_BLOCKS = 512;  // kernels loop over what is left, so that per-block partial results stay few

struct Layout {
  int64_t tokens;             // elements of a per-token tensor
  int64_t rows;               // sequences
  int64_t length;             // of a padded sequence; the mean of packed ones
  const int32_t* cu_seqlens;  // (rows + 1,), or null where padded
  const bool* mask;           // (tokens,), or null where every token counts
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int grid_size(int64_t blocks) {
  return static_cast<int>(blocks < 1 ? 1 : blocks > MAX_BLOCKS ? MAX_BLOCKS : blocks);
}

// Blocks for a loop over all tokens, four a thread.
inline int token_grid(int64_t tokens) { return grid_size(ceil_div(tokens, 4 * BLOCK)); }

}  // namespace rlhf::cuda
