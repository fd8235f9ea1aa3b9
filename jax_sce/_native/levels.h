// The kernels for each instruction set, and which of them this processor can run.

#ifndef JAX_SCE_LEVELS_H_
#define JAX_SCE_LEVELS_H_

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "rows.h"

#ifdef JAX_SCE_HAS_X86_64_V3
#include <cpuid.h>
#endif

namespace jax_sce {

extern const Kernels kernels_baseline;
#ifdef JAX_SCE_HAS_X86_64_V3
extern const Kernels kernels_x86_64_v3;
#endif
#ifdef JAX_SCE_HAS_X86_64_V4
extern const Kernels kernels_x86_64_v4;
#endif

// The features of an x86-64 processor: bits of CPUID, by leaf and register, and of XCR0, which says which
// registers the operating system saves for each thread.
struct Features {
  uint32_t ecx_1, ebx_7, ecx_80000001, xcr0;

  bool have(const Features& needed) const {
    return (needed.ecx_1 & ~ecx_1) == 0 && (needed.ebx_7 & ~ebx_7) == 0 &&
           (needed.ecx_80000001 & ~ecx_80000001) == 0 && (needed.xcr0 & ~xcr0) == 0;
  }
};

constexpr uint32_t bits(std::initializer_list<int> places) {
  uint32_t all = 0;
  for (int place : places) all |= 1u << place;
  return all;
}

// Everything that the x86-64 psABI lets a compiler use at these levels. `__builtin_cpu_supports` of older
// compilers knows only a part of it.
constexpr Features kX86_64_V3 = {
    // SSE3, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, OSXSAVE, AVX, F16C
    bits({0, 9, 12, 13, 19, 20, 22, 23, 27, 28, 29}),
    bits({3, 5, 8}),  // BMI1, AVX2, BMI2
    bits({0, 5}),     // LAHF, LZCNT
    bits({1, 2}),     // XMM, YMM
};
constexpr Features kX86_64_V4 = {  // in addition to those of v3
    0,
    bits({16, 17, 28, 30, 31}),  // AVX-512 F, DQ, CD, BW, VL
    0,
    bits({5, 6, 7}),  // the masks, ZMM 0-15, ZMM 16-31
};

inline Features features_here() {
  Features found = {};
#ifdef JAX_SCE_HAS_X86_64_V3
  uint32_t eax, ebx, ecx, edx;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) found.ecx_1 = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) found.ebx_7 = ebx;
  if (__get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx)) found.ecx_80000001 = ecx;
  if (found.ecx_1 & bits({27})) __asm__("xgetbv" : "=a"(found.xcr0), "=d"(edx) : "c"(0));
#endif
  return found;
}

// The kernels that were built and that a processor with these features can run, the best last.
inline std::vector<const Kernels*> kernels_for([[maybe_unused]] const Features& features) {
  std::vector<const Kernels*> found = {&kernels_baseline};
#ifdef JAX_SCE_HAS_X86_64_V3
  if (features.have(kX86_64_V3)) {
    found.push_back(&kernels_x86_64_v3);
#ifdef JAX_SCE_HAS_X86_64_V4
    if (features.have(kX86_64_V4)) found.push_back(&kernels_x86_64_v4);
#endif
  }
#endif
  return found;
}

}  // namespace jax_sce

#endif  // JAX_SCE_LEVELS_H_
