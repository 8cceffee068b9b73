// Rows of logits in memory, and how they are shaped: logits / temperature, or softcap * tanh(logits / softcap) /
// temperature. Rows are counted over the flattened leading dimensions.
#pragma once

#include <cstdint>

namespace rlhf {

enum class LogitsType { kFloat, kDouble, kBFloat16, kFloat16 };

template <class T>
struct LogitRows {
  const void* logits;
  LogitsType type;
  int64_t vocab;
  int64_t dims;  // leading dimensions
  const int64_t* sizes;
  const int64_t* strides;  // in elements
  const T* temperatures;   // (rows), or null: `temperature`
  double temperature;
  double softcap;  // 0: none
};

}  // namespace rlhf
