// Which instruction set the CPU kernels run: the best one that this machine has, or the one that RLHF_KERNELS_CPU_ISA
// names.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace rlhf {

inline bool cpu_supports(const char* isa) {
  if (std::strcmp(isa, "baseline") == 0) return true;
#ifdef RLHF_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  if (std::strcmp(isa, "avx512") == 0) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

inline bool cpu_is_amd() {
#ifdef RLHF_X86
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// "baseline", "avx2" or "avx512". Throws std::runtime_error for a request that this machine cannot serve.
inline const char* cpu_isa() {
  static const char* const chosen = [] {
    const char* const choices[] = {"avx512", "avx2", "baseline"};
    const char* requested = std::getenv("RLHF_KERNELS_CPU_ISA");
    std::string supported;
    for (const char* isa : choices) {
      if (!cpu_supports(isa)) continue;
      if (requested == nullptr || *requested == '\0' || std::strcmp(requested, isa) == 0) return isa;
      supported += supported.empty() ? isa : std::string(", ") + isa;
    }
    throw std::runtime_error("RLHF_KERNELS_CPU_ISA: expected one of " + supported + " (what this CPU supports), got '" +
                             requested + "'");
  }();
  return chosen;
}

}  // namespace rlhf
