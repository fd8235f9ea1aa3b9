// The interface between the kernels (rows.cc, compiled once for each instruction set) and their callers.
//
// Mathematics and names are those of jax_sce/_rows.py: `max` is the largest logit of a row, and `tail` the sum
// of exp(logit - max) without the one of the maximum.

#ifndef JAX_SCE_ROWS_H_
#define JAX_SCE_ROWS_H_

#include <cstdint>

namespace jax_sce {

// Rows of few classes are read this many at a time. Larger parts begin at multiples of it.
constexpr int64_t kRowsAtOnce = 32;

enum class Type { kF32, kBF16, kF16, kIds };  // kIds: one class id a row, int32

struct Logits {  // [N, V]
  const void* data;
  Type type;
  int64_t num_classes;
  const uint8_t* where;  // which classes to keep: null for all, or [N, V], or
  bool where_is_shared;  // [V]
};

// w_c ((1 - e) y_c + e / V). A masked class has no e / V, and no y_c of a distribution.
struct Targets {
  const void* labels;  // [N, V], or [N] ids; an id outside [0, V) makes its row NaN
  Type type;
  const float* smoothing;  // e, one number
  const float* share;      // 1 / V of each row, or
  bool share_is_shared;    // of all rows
  const float* class_weights;  // [V], or null
};

// Each kernel works on the rows [begin, end). The result of a row does not depend on other rows.
struct Kernels {
  const char* level;  // the instruction set
  // The statistics, and the logit at the label: 0 if the label is not in [0, V).
  void (*label_statistics)(const Logits&, const int32_t* labels, float* max, float* tail,
                           float* at_label, int64_t begin, int64_t end);
  // (elsewhere + slope * (logit - max)) * exp(logit - max), and `at_label` at the label. `slope` may be
  // null, and `out` may be the logits. A row whose factors are 0 becomes 0, whatever it holds.
  void (*label_cotangent)(const Logits&, const int32_t* labels, const float* max,
                          const float* at_label, const float* elsewhere, const float* slope, void* out,
                          int64_t begin, int64_t end);
  // The statistics, the sum of the targets, and the sum of targets times (logit - max).
  void (*target_statistics)(const Logits&, const Targets&, float* max, float* tail, float* mass,
                            float* moment, int64_t begin, int64_t end);
  // g_loss (o mass - y) + g_log_normalizer o. `out` may be the logits. A row whose two cotangents are 0
  // becomes 0, whatever it holds.
  void (*target_cotangent)(const Logits&, const Targets&, const float* max, const float* tail,
                           const float* mass, const float* g_loss, const float* g_log_normalizer,
                           void* out, int64_t begin, int64_t end);
  // The sum of exp(logit - max) * (logit - max).
  void (*spread)(const Logits&, const float* max, float* out, int64_t begin, int64_t end);
  // For float32 logits without masks, the sums and the cotangent in _divergence.py.
  void (*divergence_sums)(const Logits&, const Logits& teacher, const float* max, const float* tail,
                          const float* teacher_max, const float* teacher_tail, const float* shift,
                          float* gaps, float* rest, int64_t begin, int64_t end);
  // `out` may be the logits. A row whose two factors are 0 becomes 0, whatever it holds.
  void (*divergence_cotangent)(const Logits&, const Logits& teacher, const float* max,
                               const float* tail, const float* teacher_max,
                               const float* teacher_tail, const float* shift, const float* g_loss,
                               const float* constant, float* out, int64_t begin, int64_t end);
};

}  // namespace jax_sce

#endif  // JAX_SCE_ROWS_H_
