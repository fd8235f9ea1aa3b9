// The kernels for each instruction set.

#ifndef JAX_SCE_LEVELS_H_
#define JAX_SCE_LEVELS_H_

#include <vector>

#include "rows.h"

namespace jax_sce {

extern const Kernels kernels_baseline;
#ifdef JAX_SCE_HAS_X86_64_V3
extern const Kernels kernels_x86_64_v3;
#endif
#ifdef JAX_SCE_HAS_X86_64_V4
extern const Kernels kernels_x86_64_v4;
#endif

// Those that were built and that this processor can run, the best last.
inline std::vector<const Kernels*> kernels_here() {
  std::vector<const Kernels*> found = {&kernels_baseline};
#ifdef JAX_SCE_HAS_X86_64_V3
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) {
    found.push_back(&kernels_x86_64_v3);
#ifdef JAX_SCE_HAS_X86_64_V4
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back(&kernels_x86_64_v4);
#endif
  }
#endif
  return found;
}

}  // namespace jax_sce

#endif  // JAX_SCE_LEVELS_H_
