// Row loops of token_logprobs.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/logit_rows.h"

namespace rlhf {

template <class T>
struct TokenRows : LogitRows<T> {
  const void* ids;  // (rows) int64, or int32 if narrow_ids; each in [0, vocab) or ignore_index
  bool narrow_ids;
  int64_t ignore_index;
};

template <class T>
struct ForwardArgs {
  TokenRows<T> rows;
  T* logprobs;  // all (rows)
  T* entropy;   // null: not wanted
  T* row_max;
  T* log_sum;
};

template <class T>
struct BackwardArgs {
  TokenRows<T> rows;
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
