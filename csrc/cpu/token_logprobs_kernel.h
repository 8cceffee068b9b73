// Row loops of token_logprobs. Rows are counted over the flattened leading dimensions.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace rlhf {

enum class LogitsType { kFloat, kDouble, kBFloat16, kFloat16 };

template <class T>
struct RowArgs {
  const void* logits;
  LogitsType type;
  int64_t vocab;
  int64_t dims;  // leading dimensions
  const int64_t* sizes;
  const int64_t* strides;  // in elements
  const void* ids;         // (rows) int64, or int32 if narrow_ids; each in [0, vocab) or ignore_index
  bool narrow_ids;
  int64_t ignore_index;
  const T* temperatures;  // (rows), or null: `temperature`
  double temperature;
  double softcap;  // 0: none
};

template <class T>
struct ForwardArgs {
  RowArgs<T> rows;
  T* logprobs;  // all (rows)
  T* entropy;   // null: not wanted
  T* row_max;
  T* log_sum;
};

template <class T>
struct BackwardArgs {
  RowArgs<T> rows;
  const T* grad_logprobs;  // (rows) or null, as grad_entropy
  const T* grad_entropy;
  const T* entropy;
  const T* row_max;
  const T* log_sum;
  void* grad_logits;  // (rows, vocab), of the logits' type; may be the logits
  int64_t first_id;   // the token of the first column
};

struct TokenLogprobsTable {
  Kernel<ForwardArgs> forward;
  Kernel<BackwardArgs> backward;
};
RLHF_DECLARE_TABLE(TokenLogprobsTable, token_logprobs_table)

}  // namespace rlhf
