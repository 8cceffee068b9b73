// The token layout of an op's arguments, checked.
#pragma once

#include <vector>

#include "common/checks.h"
#include "common/sequences.h"

namespace rlhf {

// Padded (B, T), or packed (N,) with cu_seqlens (B+1,) int32 that rise from 0 to N.
inline Sequences sequences_of(const char* name, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens) {
    if (tokens.dim() != 2)
      refuse(name, "expected (B, T), got " + tuple_text(tokens.sizes()) + "; packed (N,) tokens need cu_seqlens");
    return {nullptr, tokens.size(0), tokens.size(1)};
  }
  if (tokens.dim() != 1)
    refuse(name, "expected packed (N,) because cu_seqlens is given, got " + tuple_text(tokens.sizes()));
  if (cu_seqlens->dim() != 1 || cu_seqlens->numel() < 1)
    refuse("cu_seqlens", "expected (B+1,), got " + tuple_text(cu_seqlens->sizes()));
  check_dense("cu_seqlens", *cu_seqlens, ScalarType::Int, tokens);
  const int32_t* bounds = data<int32_t>(*cu_seqlens);
  const int64_t count = cu_seqlens->numel() - 1;
  bool rises = bounds[0] == 0 && bounds[count] == tokens.numel();
  for (int64_t b = 0; b < count; ++b) rises = rises && bounds[b] <= bounds[b + 1];
  if (!rises) {
    std::string got;
    for (int64_t b = 0; b <= count && b < 8; ++b) got += (b ? ", " : "") + std::to_string(bounds[b]);
    refuse_value("cu_seqlens", "expected bounds that rise from 0 to " + std::to_string(tokens.numel()) +
                                   ", the number of tokens, got [" + got + "]");
  }
  return {bounds, count, 0};
}

// One number a sequence, (B,), of the compute dtype of `tokens`.
inline void check_per_sequence(const char* name, const Tensor& x, const Sequences& sequences, const Tensor& tokens) {
  check_dense(name, x, tokens.scalar_type(), tokens);
  if (x.dim() != 1 || x.numel() != sequences.count)
    refuse(name, "expected (" + std::to_string(sequences.count) + ",), got " + tuple_text(x.sizes()));
}

// Sequences that make a task for one thread: about 4096 tokens, below which waking a thread costs more than it saves.
inline int64_t sequence_grain(const Sequences& sequences, int64_t tokens) {
  const int64_t average = sequences.count ? tokens / sequences.count : 0;
  return 1 + 4096 / (1 + average);
}

}  // namespace rlhf
