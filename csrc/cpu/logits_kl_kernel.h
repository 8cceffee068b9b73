// Row loops of logits_kl.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/logit_rows.h"

namespace rlhf {

// What both passes know of the rows; `saved` is (kSaved, rows): row_max and log_sum of the policy, of the reference,
// the difference of their log-sum-exps, and the multiple of p that makes the gradient sum to 0.
constexpr int kSaved = 6;

template <class T>
struct KlRows {
  LogitRows<T> policy, reference;  // of one type
  const bool* mask;                // (rows), or null: every row counts
  int64_t count;
  bool forward_kl;
};

template <class T>
struct KlForwardArgs {
  KlRows<T> rows;
  T* kl;  // (rows)
  T* saved;
};

template <class T>
struct KlBackwardArgs {
  KlRows<T> rows;
  const T* grad_kl;  // (rows)
  const T* saved;
  void* grad_logits;  // (rows, vocab), of the logits' type; may be the policy's logits
};

struct LogitsKlTable {
  Kernel<KlForwardArgs> forward;
  Kernel<KlBackwardArgs> backward;
};
RLHF_DECLARE_TABLE(LogitsKlTable, logits_kl_table)

}  // namespace rlhf
