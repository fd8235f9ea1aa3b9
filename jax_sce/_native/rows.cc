// The row kernels, for one instruction set: JAX_SCE_LEVEL names it.
//
// A row is read in blocks that stay in the first-level cache. A block is summed relative to the second
// largest logit so far. Only a block with a larger logit (such as the first) is searched for it before that.
// All arithmetic is in float, in vectors of the processor's width; a block that does not fill its last vector
// is padded with absent classes (-inf). README.md has more.
//
// Accuracy, with u = 2^-24 (see _rows.py for the bounds that follow): exponentials are within 2u to 4u
// (`exp_of`), or lost below 2^-126. A block is summed in 32 partial sums of at most 16 terms, and blocks are
// added in double; few classes are summed in 4 partial sums of at most 28. Distances in a tail are relative to
// the second largest logit: where a distance is long, and its rounding large, the term is negligible.

#include "rows.h"

#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define JAX_SCE_PASTE_(a, b) a##b
#define JAX_SCE_PASTE(a, b) JAX_SCE_PASTE_(a, b)
#define JAX_SCE_NAME_(a) #a
#define JAX_SCE_NAME(a) JAX_SCE_NAME_(a)
#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // for lambdas: their captures can stay in registers

namespace jax_sce {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.92596299e-8f;  // log2(e) is their sum

// -- vectors ------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kStep = 32;  // floats per step, in independent vectors
constexpr int kVectors = kStep / kLanes;
constexpr int kBlock = 512;  // floats; a multiple of kStep
constexpr int kFirst = 8 * kBlock;  // the first block of a row, which also stays in the cache

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

template <class Vector>
INLINE Vector load(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class Vector>
INLINE void store(void* p, Vector v) {
  std::memcpy(p, &v, sizeof v);
}

INLINE F all(float x) { return x - F{}; }

// b if either is NaN. The x86 instructions do this, but compilers do not recognize it.
#if defined(__AVX512F__)
INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F smaller(F a, F b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
INLINE F larger(F a, F b) { return _mm256_max_ps(a, b); }
INLINE F smaller(F a, F b) { return _mm256_min_ps(a, b); }
#elif defined(__SSE2__)
INLINE F larger(F a, F b) { return _mm_max_ps(a, b); }
INLINE F smaller(F a, F b) { return _mm_min_ps(a, b); }
#else
INLINE F larger(F a, F b) { return a > b ? a : b; }
INLINE F smaller(F a, F b) { return a < b ? a : b; }
#endif

// The lanes of x, combined in pairs.
template <class Combine>
INLINE auto reduce(F x, Combine combine) {
  float lanes[kLanes];
  store(lanes, x);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] = combine(lanes[i], lanes[i + n]);
  return lanes[0];
}

// -- the exponential ----------------------------------------------------------------------------------

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFused = true;  // a product is not rounded before it is added
#else
constexpr bool kFused = false;
#endif

enum class Need { kTerm, kExact };

// e^(x + error / log2(e)) for x <= 0: 1 at 0, 0 from -88 down and at -inf, NaN for NaN. Split x log2(e) into
// the nearest integer n and the rest r, |r| <= 1/2. 2^n is made from its bits. 2^r is a minimax polynomial that
// is 1 at 0; its coefficients were rounded one by one, each time fitting the others again.
//
// As a term of a sum whose largest term is 1, it is within (3 + |x| / 4) u, u = 2^-24: 1.6u from the
// polynomial, the roundings, and the rounding of log2(e). Otherwise it is within 2u.
template <Need need>
INLINE F exp_of(F x, F error = F{}) {
  const F c = larger(all(-88.f), x);    // there n is -127, whose bits make 0
  const F t = c * kLog2E + 12583039.f;  // 1.5 * 2^23 + 127: rounds to n + 127 in the last bits
  const F n = t - 12583039.f;
  F r, p;
  if (kFused) {
    r = c * kLog2E - n;
    if (need == Need::kExact) r += c * kLog2ERest + error;
  } else {  // the first has so few digits that its product is exact; they add up to log(2)
    r = (c - n * 0.693359375f + n * 2.12194440e-4f) * kLog2E + error;
  }
  if (need == Need::kExact) {
    p = all(1.53288027e-4f);
    p = p * r + 1.33909751e-3f;
    p = p * r + 9.6185002e-3f;
    p = p * r + 5.55035956e-2f;
    p = p * r + 2.40226477e-1f;
    p = p * r + 6.93147182e-1f;
  } else {
    p = all(1.32691499e-3f);
    p = p * r + 9.67130996e-3f;
    p = p * r + 5.55071197e-2f;
    p = p * r + 2.40222469e-1f;
    p = p * r + 6.93147004e-1f;
  }
  p = p * r + 1.f;
  return p * (F)((U)t << 23);
}

// e^(a - b) for a <= b, whatever the distance, within 3u. `a` may be -inf.
INLINE F exp_difference(F a, F b) {
  const F difference = a - b, shift = difference - a;
  const F error = (a - (difference - shift)) - (b + shift);  // exact: Knuth's two-sum
  return exp_of<Need::kExact>(difference, difference > -88.f ? error * kLog2E : F{});
}

// -- numbers of any type ------------------------------------------------------------------------------

// Two vectors are read and written at a time. For bfloat16 one holds the even places and the other the odd
// ones: such a pair is split and joined by shifts and masks alone.
struct Pair {
  F a, b;
};

// float16 to float: the fields moved to their places. Subnormal numbers are normalized by a subtraction.
INLINE F from_half(U h) {
  const U body = (h & 0x7fffu) << 13, exponent = body & (0x1fu << 23);
  const U bits = body + (112u << 23);
  const F subnormal = (F)(bits + (1u << 23)) - 6.103515625e-5f;  // 2^-14
  const F number = exponent == (0x1fu << 23) ? (F)(bits + (112u << 23)) : (F)bits;
  const F magnitude = exponent == 0u ? subnormal : number;
  return (F)((U)magnitude | (h & 0x8000u) << 16);
}

INLINE U to_half(F x) {  // to the nearest, ties to even
  const U bits = (U)x, sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const F aligned = (F)magnitude + 0.5f;  // the last bit of the sum is worth 2^-24, as a subnormal's
  const U subnormal = (U)aligned - 0x3f000000u;
  U half = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  const U infinite = x == x ? U{} + 0x7c00u : U{} + 0x7e00u;
  half = magnitude >= 0x47800000u ? infinite : half;  // 2^16
  return half | sign >> 16;
}

// The upper half of each, ties to even. A NaN with its last bits set might overflow to another number. Numbers
// that were 16 bits wide have none, and `quiet` handles all others.
INLINE U round_to_bfloat16(F x) {
  const U bits = (U)x;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

INLINE float quiet(float x) { return x == x ? x : kNaN; }
INLINE F quiet(F x) { return x == x ? x : all(kNaN); }

template <Type type>
INLINE Pair widen(const void* data, int64_t j) {
  if (type == Type::kF32) {
    const float* x = static_cast<const float*>(data) + j;
    return {load<F>(x), load<F>(x + kLanes)};
  }
  const uint16_t* x = static_cast<const uint16_t*>(data) + j;
  if (type == Type::kBF16) {
    const U both = load<U>(x);
    return {(F)(both << 16), (F)(both & 0xffff0000u)};
  }
  return {from_half(__builtin_convertvector(load<H>(x), U)),
          from_half(__builtin_convertvector(load<H>(x + kLanes), U))};
}

template <Type type>
INLINE void narrow(void* data, int64_t j, Pair v) {
  if (type == Type::kF32) {
    float* x = static_cast<float*>(data) + j;
    store(x, v.a);
    store(x + kLanes, v.b);
    return;
  }
  uint16_t* x = static_cast<uint16_t*>(data) + j;
  if (type == Type::kBF16) {
    store(x, round_to_bfloat16(v.a) >> 16 | (round_to_bfloat16(v.b) & 0xffff0000u));
  } else {
    store(x, __builtin_convertvector(to_half(v.a), H));
    store(x + kLanes, __builtin_convertvector(to_half(v.b), H));
  }
}

template <Type kType>
struct Of {
  static constexpr Type type = kType;
};

// body(Of<type>): the same code for each type of numbers.
template <class Body>
INLINE auto visit(Type type, Body body) {
  switch (type) {
    case Type::kBF16: return body(Of<Type::kBF16>{});
    case Type::kF16: return body(Of<Type::kF16>{});
    default: return body(Of<Type::kF32>{});
  }
}

// The same for logits and targets: both of one type, or both float.
template <class Body>
INLINE void visit_both(Type a, Type b, Body body) {
  if (a == b)
    visit(a, [&](auto of) INLINED { body(of, of); });
  else
    body(Of<Type::kF32>{}, Of<Type::kF32>{});
}

INLINE const void* at(const void* data, Type type, int64_t j) {
  return static_cast<const char*>(data) + j * (type == Type::kF32 ? 4 : 2);
}
INLINE void* at(void* data, Type type, int64_t j) {
  return const_cast<void*>(at(static_cast<const void*>(data), type, j));
}

INLINE int64_t padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// One number.
float widen(const void* data, Type type) {
  if (type == Type::kF32) return *static_cast<const float*>(data);
  const uint32_t bits = *static_cast<const uint16_t*>(data);
  return type == Type::kBF16 ? ((F)(U{} + (bits << 16)))[0] : from_half(U{} + bits)[0];
}

void narrow(void* data, Type type, float x) {
  if (type == Type::kF32)
    *static_cast<float*>(data) = x;
  else
    *static_cast<uint16_t*>(data) = static_cast<uint16_t>(
        type == Type::kBF16 ? round_to_bfloat16(all(quiet(x)))[0] >> 16 : to_half(all(x))[0]);
}

// n numbers as floats in their order, padded, and back.
void read(const void* data, Type type, int64_t n, float padding, float* out) {
  int64_t j = 0;
  if (type == Type::kF32) {
    std::memcpy(out, data, n * sizeof(float));
    j = n;
  }
  const uint16_t* x = static_cast<const uint16_t*>(data);
  for (; j + kLanes <= n; j += kLanes) {
    const U bits = __builtin_convertvector(load<H>(x + j), U);
    store(out + j, type == Type::kBF16 ? (F)(bits << 16) : from_half(bits));
  }
  for (; j < n; ++j) out[j] = widen(x + j, type);
  for (; j < padded(n); ++j) out[j] = padding;
}

void write(void* data, Type type, int64_t n, const float* x) {
  if (type == Type::kF32) {
    std::memcpy(data, x, n * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(data);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const F v = load<F>(x + j);
    const U bits = type == Type::kBF16 ? round_to_bfloat16(quiet(v)) >> 16 : to_half(v);
    store(out + j, __builtin_convertvector(bits, H));
  }
  for (; j < n; ++j) narrow(out + j, type, x[j]);
}

void write_zeros(void* data, Type type, int64_t n) {
  std::memset(data, 0, n * (type == Type::kF32 ? 4 : 2));
}

// -- blocks of a row ----------------------------------------------------------------------------------

// Calls with [start, start + n) for a whole row; the first block has length `first`. The last whole vectors
// are one block, so that they can be read in place. The rest is another block.
template <class Body>
INLINE void for_blocks(int64_t num_classes, int64_t first, Body body) {
  for (int64_t start = 0; start < num_classes;) {
    const int64_t most = start == 0 ? first : kBlock;
    int64_t n = num_classes - start;
    if (n > most) n = most;
    if (n > kStep) n -= n % kStep;
    body(start, n);
    start += n;
  }
}

// Numbers that can be read in whole vectors: in place, or in a buffer, as floats.
struct Block {
  const void* data;
  Type type;

  Block from(int64_t j) const { return {at(data, type, j), type}; }
};

const uint8_t* mask_of(const Logits& z, int64_t row, int64_t start) {
  if (z.where == nullptr) return nullptr;
  return z.where + (z.where_is_shared ? 0 : row * z.num_classes) + start;
}

// `value` in place of masked classes.
void fill_masked(const uint8_t* where, int64_t n, float value, float* x) {
  if (where == nullptr) return;
  for (int64_t j = 0; j < n; ++j) x[j] = where[j] ? x[j] : value;
}

// Logits; -inf where a class is masked.
Block read_logits(const Logits& z, int64_t row, int64_t start, int64_t n, float* buffer) {
  const void* data = at(z.data, z.type, row * z.num_classes + start);
  const uint8_t* where = mask_of(z, row, start);
  if (where == nullptr && n % kStep == 0) return {data, z.type};
  read(data, z.type, n, -kInf, buffer);
  fill_masked(where, n, -kInf, buffer);
  return {buffer, Type::kF32};
}

float read_logit(const Logits& z, int64_t row, int64_t j) {
  float buffer[kStep];
  return static_cast<const float*>(read_logits(z, row, j, 1, buffer).data)[0];
}

// Are the targets just the labels?
bool are_labels(const Logits& z, const Targets& y) {
  return y.type != Type::kIds && z.where == nullptr && *y.smoothing == 0 && y.class_weights == nullptr;
}

// Targets, padded with 0 (or NaN, if the row is).
Block read_targets(const Logits& z, const Targets& y, int64_t row, int64_t start, int64_t n,
                   float* buffer) {
  const uint8_t* where = mask_of(z, row, start);
  const float e = *y.smoothing;
  if (y.type == Type::kIds) {
    const int64_t id = static_cast<const int32_t*>(y.labels)[row];
    const bool is_class = 0 <= id && id < z.num_classes;
    for (int64_t j = 0; j < padded(n); ++j) buffer[j] = is_class ? 0.f : kNaN;
    if (is_class && start <= id && id < start + n) buffer[id - start] = 1;
  } else {
    const void* data = at(y.labels, y.type, row * z.num_classes + start);
    if (are_labels(z, y) && n % kStep == 0) return {data, y.type};
    read(data, y.type, n, 0, buffer);
    fill_masked(where, n, 0, buffer);  // an id keeps its mass: it costs +inf
  }
  if (e != 0) {
    const float uniform = e * y.share[y.share_is_shared ? 0 : row];
    for (int64_t j = 0; j < n; ++j)
      buffer[j] = (1 - e) * buffer[j] + (where == nullptr || where[j] ? uniform : 0.f);
  }
  if (y.class_weights != nullptr)
    for (int64_t j = 0; j < n; ++j) buffer[j] *= y.class_weights[start + j];
  return {buffer, Type::kF32};
}

// Both as floats, if they are not of one type.
void make_alike(int64_t n, Block* x, float* x_buffer, Block* t, float* t_buffer) {
  if (x->type == t->type) return;
  const auto to_float = [n](Block* block, float* buffer) {
    if (block->type == Type::kF32) return;
    read(block->data, block->type, n, 0, buffer);
    *block = {buffer, Type::kF32};
  };
  to_float(x, x_buffer);
  to_float(t, t_buffer);
}

// body(j, k, pair) for each pair of vectors of a block, k of kVectors. Prefetches `ahead`.
template <Type type, class Body>
INLINE void for_pairs(const void* data, int64_t n, int64_t ahead, Body body) {
  for (int64_t j = 0; j < n; j += kStep) {
    const char* next = static_cast<const char*>(at(data, type, j + ahead));
    __builtin_prefetch(next);
    if (type == Type::kF32) __builtin_prefetch(next + 64);
    for (int k = 0; k < kVectors; k += 2)
      body(j + k * kLanes, k, widen<type>(data, j + k * kLanes));
  }
}

// -- sums over a row ----------------------------------------------------------------------------------

INLINE float larger(float a, float b) { return a > b ? a : b; }
INLINE float smaller(float a, float b) { return a < b ? a : b; }

struct TopTwo {
  float max, second;
};

INLINE TopTwo join(TopTwo a, TopTwo b) {
  return {larger(a.max, b.max), larger(smaller(a.max, b.max), larger(a.second, b.second))};
}

TopTwo top_two(Block x, int64_t n) {
  F m[kVectors], s[kVectors];
  for (int k = 0; k < kVectors; ++k) m[k] = s[k] = all(-kInf);
  visit(x.type, [&](auto of) INLINED {
    for_pairs<of.type>(x.data, n, kBlock, [&](int64_t, int k, Pair v) INLINED {
      s[k] = larger(smaller(v.a, m[k]), s[k]);
      m[k] = larger(v.a, m[k]);
      s[k + 1] = larger(smaller(v.b, m[k + 1]), s[k + 1]);
      m[k + 1] = larger(v.b, m[k + 1]);
    });
  });
  for (int k = 1; k < kVectors; ++k) {
    s[0] = larger(smaller(m[0], m[k]), larger(s[0], s[k]));
    m[0] = larger(m[0], m[k]);
  }
  float maxima[kLanes], seconds[kLanes];
  store(maxima, m[0]);
  store(seconds, s[0]);
  TopTwo top = {maxima[0], seconds[0]};
  for (int i = 1; i < kLanes; ++i) top = join(top, {maxima[i], seconds[i]});
  return top;
}

INLINE float total(F* sums) {
  for (int n = kVectors / 2; n > 0; n /= 2)
    for (int k = 0; k < n; ++k) sums[k] += sums[k + n];
  return reduce(sums[0], [](float a, float b) { return a + b; });
}

// The sum of e^min(x - reference, 0).
float sum_up_to(float reference, Block x, int64_t n, int64_t ahead) {
  F sums[kVectors] = {};
  visit(x.type, [&](auto of) INLINED {
    for_pairs<of.type>(x.data, n, ahead, [&](int64_t, int k, Pair v) INLINED {
      sums[k] += exp_of<Need::kTerm>(smaller(all(0), v.a - reference));
      sums[k + 1] += exp_of<Need::kTerm>(smaller(all(0), v.b - reference));
    });
  });
  return total(sums);
}

// The sum of e^(x - reference), if no x is larger than the reference.
bool sum_below(float reference, Block x, int64_t n, float* sum) {
  F sums[kVectors] = {}, m[2] = {all(reference), all(reference)};
  visit(x.type, [&](auto of) INLINED {
    for_pairs<of.type>(x.data, n, kBlock, [&](int64_t, int k, Pair v) INLINED {
      m[0] = larger(v.a, m[0]);
      m[1] = larger(v.b, m[1]);
      sums[k] += exp_of<Need::kTerm>(v.a - reference);
      sums[k + 1] += exp_of<Need::kTerm>(v.b - reference);
    });
  });
  *sum = total(sums);
  return reduce(larger(m[0], m[1]), [](float a, float b) { return larger(a, b); }) == reference;
}

// Called once per row, and again for each block with a logit larger than all before. If logits rise from block
// to block, many such factors are multiplied, so they are in double.
double exp_difference(float a, float b) { return __builtin_exp(double(a) - b); }

// The sum of the exponentials of a row so far: of all but the largest, relative to the second largest.
struct Sum {
  TopTwo top = {-kInf, -kInf};
  double others = 0;

  void add(Block x, int64_t n) {
    float sum;
    if (top.second > -kInf && sum_below(top.second, x, n, &sum)) {
      others += sum;
      return;
    }
    const TopTwo here = top_two(x, n), now = join(top, here);
    if (top.second > -kInf) others *= exp_difference(top.second, now.second);
    const bool leads = here.max > top.max;
    // The previous leader is now one of the others.
    if (leads && top.max > -kInf) others += exp_difference(top.max, now.second);
    top = now;
    // If the leader is in this block, it lies above the reference and counts as one in the sum.
    for_blocks(n, kBlock, [&](int64_t start, int64_t part) {
      others += sum_up_to(larger(top.second, kLowest), x.from(start), part, n);
    });
    others -= leads;
  }

  void finish(float* max, float* tail) const {
    *max = others == others ? top.max : kNaN;
    *tail = float(top.second > -kInf ? others * exp_difference(top.second, top.max) : others);
    if (!(top.max > -kInf && top.max < kInf)) *tail = kNaN;
  }
};

// -- few classes --------------------------------------------------------------------------------------
// Rows that fill few vectors are read kRowsAtOnce at a time. To sum over the classes, each lane has one row.

constexpr int kFew = 112;  // classes; with more, one row at a time is as fast
constexpr int kFewLogits = (kFew + 1) * kStep;  // of kStep rows, and padding after the last
static_assert(kRowsAtOnce == kStep);

bool has_few(const Logits& z) { return z.num_classes <= kFew; }

// body(i, rows) for the rows [i, i + rows), up to kRowsAtOnce.
template <class Body>
INLINE void for_rows_at_once(int64_t begin, int64_t end, Body body) {
  for (int64_t i = begin; i < end; i += kStep) body(i, end - i < kStep ? end - i : kStep);
}

// The same for rows one after the other.
void fill_masked(const Logits& z, int64_t i, int64_t rows, float value, float* x) {
  const int64_t v = z.num_classes, n = rows * v;
  uint8_t repeated[kFewLogits];
  const uint8_t* where = mask_of(z, i, 0);
  if (where != nullptr && z.where_is_shared) {
    for (int64_t j = 0; j < n; j += v) std::memcpy(repeated + j, where, v);
    where = repeated;
  }
  fill_masked(where, n, value, x);
}

// One row after the other, as floats: the logits, -inf where a class is masked, and the targets.
void read_rows(const Logits& z, int64_t i, int64_t rows, float* out) {
  const int64_t n = rows * z.num_classes;
  read(at(z.data, z.type, i * z.num_classes), z.type, n, 0, out);
  fill_masked(z, i, rows, -kInf, out);
  store(out + padded(n), F{});  // the last row, too, is read in whole vectors
}

void read_rows(const Logits& z, const Targets& y, int64_t i, int64_t rows, float* out) {
  const int64_t v = z.num_classes, n = rows * v;
  if (are_labels(z, y))
    read(at(y.labels, y.type, i * v), y.type, n, 0, out);
  else
    for (int64_t r = 0; r < rows; ++r)  // the next row overwrites its padding
      read_targets(z, y, i + r, 0, v, out + r * v);
  store(out + padded(n), F{});
}

// Rows as columns, [V, kRowsAtOnce].
void transpose(const float* row, int64_t r, int64_t v, float* columns) {
  for (int64_t j = 0; j < v; ++j) columns[j * kStep + r] = row[j];
}

F add_up(const F* sums) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

// For columns, with three absent classes (-inf) after the last.
void statistics_of_columns(const float* columns, int64_t v, int64_t rows, float* max, float* tail) {
  float maxima[kStep], tails[kStep];
  for (int k = 0; k < kStep; k += kLanes) {
    F m = all(-kInf), second = all(-kInf);
    for (int64_t j = 0; j < v; ++j) {
      const F x = load<F>(columns + j * kStep + k);
      second = larger(smaller(x, m), second);
      m = larger(x, m);
    }
    const F reference = larger(all(kLowest), second);
    F sums[4] = {};
    for (int64_t j = 0; j < v; j += 4)
      for (int l = 0; l < 4; ++l)
        sums[l] += exp_of<Need::kTerm>(
            smaller(all(0), load<F>(columns + (j + l) * kStep + k) - reference));
    const F others = add_up(sums) - 1.f;
    const F t = others == 0 ? F{} : others * exp_difference(second, m);
    store(maxima + k, others == others ? m : all(kNaN));
    store(tails + k, m - m == 0 ? t : all(kNaN));
  }
  std::memcpy(max, maxima, rows * sizeof(float));
  std::memcpy(tail, tails, rows * sizeof(float));
}

void label_statistics_of_few(const Logits& z, const int32_t* labels, float* max, float* tail,
                             float* at_label, int64_t begin, int64_t end) {
  const int64_t v = z.num_classes;
  float logits[kFewLogits], columns[(kFew + 3) * kStep];
  for (int64_t j = 0; j < (v + 3) * kStep; ++j) columns[j] = -kInf;
  for_rows_at_once(begin, end, [&](int64_t i, int64_t rows) {
    read_rows(z, i, rows, logits);
    for (int64_t r = 0; r < rows; ++r) {
      const float* const row = logits + r * v;
      transpose(row, r, v, columns);
      const int64_t label = labels[i + r];
      at_label[i + r] = 0 <= label && label < v ? row[label] : 0;
    }
    statistics_of_columns(columns, v, rows, max + i, tail + i);
  });
}

void target_statistics_of_few(const Logits& z, const Targets& y, float* max, float* tail,
                              float* mass, float* moment, int64_t begin, int64_t end) {
  const int64_t v = z.num_classes;
  float flat[kFewLogits], columns[(kFew + 3) * kStep], targets[(kFew + 3) * kStep] = {};
  for (int64_t j = 0; j < (v + 3) * kStep; ++j) columns[j] = -kInf;
  for_rows_at_once(begin, end, [&](int64_t i, int64_t rows) {
    read_rows(z, i, rows, flat);
    for (int64_t r = 0; r < rows; ++r) transpose(flat + r * v, r, v, columns);
    read_rows(z, y, i, rows, flat);
    for (int64_t r = 0; r < rows; ++r) transpose(flat + r * v, r, v, targets);
    statistics_of_columns(columns, v, rows, max + i, tail + i);
    float all_masses[kStep], all_moments[kStep];
    for (int k = 0; k < kStep; k += kLanes) {
      F highest = all(kLowest), mass_so_far = {}, moment_so_far = {};
      for (int64_t j = 0; j < v; ++j) highest = larger(load<F>(columns + j * kStep + k), highest);
      for (int64_t start = 0; start < v; start += 16) {  // few at a time, so that roundings do not add up
        F masses[4] = {}, moments[4] = {};
        for (int64_t j = start; j < v && j < start + 16; j += 4)
          for (int l = 0; l < 4; ++l) {
            const F x = load<F>(columns + (j + l) * kStep + k);
            const F target = load<F>(targets + (j + l) * kStep + k);
            masses[l] += target;
            // A class that is absent (-inf) and has no mass adds nothing.
            moments[l] += target == 0 ? F{} : target * (x - highest);
          }
        mass_so_far += add_up(masses);
        moment_so_far += add_up(moments);
      }
      store(all_masses + k, mass_so_far);
      store(all_moments + k, moment_so_far);
    }
    std::memcpy(mass + i, all_masses, rows * sizeof(float));
    std::memcpy(moment + i, all_moments, rows * sizeof(float));
  });
}

// make(i, rows, logits, out) gives the cotangents of the rows [i, i + rows) in whole vectors.
template <class Make>
INLINE void cotangent_of_few(const Logits& z, void* out, int64_t begin, int64_t end, Make make) {
  const int64_t v = z.num_classes;
  float logits[kFewLogits], made[kFewLogits];
  for_rows_at_once(begin, end, [&](int64_t i, int64_t rows) {
    read_rows(z, i, rows, logits);
    make(i, rows, logits, made);
    fill_masked(z, i, rows, 0, made);
    write(at(out, z.type, i * v), z.type, rows * v, made);
  });
}

void label_cotangent_of_few(const Logits& z, const int32_t* labels, const float* max,
                            const float* at_label, const float* elsewhere, void* out, int64_t begin,
                            int64_t end) {
  const int64_t v = z.num_classes;
  float maxima[kFewLogits], factors[kFewLogits];
  cotangent_of_few(z, out, begin, end, [&](int64_t i, int64_t rows, const float* x, float* g) {
    for (int64_t r = 0; r < rows; ++r)  // the next row overwrites its padding
      for (int64_t j = 0; j < v; j += kLanes) {
        store(maxima + r * v + j, all(max[i + r]));
        store(factors + r * v + j, all(elsewhere[i + r]));
      }
    for (int64_t j = 0; j < rows * v; j += kLanes)
      store(g + j, exp_of<Need::kExact>(load<F>(x + j) - load<F>(maxima + j)) * load<F>(factors + j));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t label = labels[i + r];
      if (elsewhere[i + r] == 0 && at_label[i + r] == 0)
        std::memset(g + r * v, 0, v * sizeof(float));
      else if (0 <= label && label < v)
        g[r * v + label] = at_label[i + r];
    }
  });
}

// The numbers of one row in the cotangent of its targets.
struct TargetFactors {
  float highest, rest, mass, g, uniform, share;

  TargetFactors(float max, float tail, float mass, float g_loss, float g_log_normalizer)
      : highest(quiet(max)), rest(quiet(tail)), mass(quiet(mass)), g(quiet(g_loss)),
        uniform(quiet(g_log_normalizer) / (1 + rest)), share(1 / (1 + rest)) {}

  INLINE F of(F x, F target) const {
    const F distance = x - highest, e = exp_of<Need::kExact>(distance);
    // At the largest logit nothing may cancel. Multiply by the cotangent last: it may be infinite.
    const F at_max = ((mass - target) - target * rest) * share;
    const F below = e * (mass * share) - target;
    return (distance == 0 ? at_max : below) * g + e * uniform;
  }
};

void target_cotangent_of_few(const Logits& z, const Targets& y, const float* max, const float* tail,
                             const float* mass, const float* g_loss, const float* g_log_normalizer,
                             void* out, int64_t begin, int64_t end) {
  const int64_t v = z.num_classes;
  float targets[kFewLogits];
  cotangent_of_few(z, out, begin, end, [&](int64_t i, int64_t rows, const float* x, float* g) {
    read_rows(z, y, i, rows, targets);
    // The next row overwrites the padding of the one before.
    for (const float* t = targets; rows > 0; --rows, ++i, x += v, t += v, g += v) {
      if (g_loss[i] == 0 && g_log_normalizer[i] == 0) {
        std::memset(g, 0, v * sizeof(float));
        continue;
      }
      const TargetFactors factors(max[i], tail[i], mass[i], g_loss[i], g_log_normalizer[i]);
      for (int64_t j = 0; j < v; j += kLanes) store(g + j, factors.of(load<F>(x + j), load<F>(t + j)));
    }
  });
}

// -- the kernels --------------------------------------------------------------------------------------

void label_statistics(const Logits& z, const int32_t* labels, float* max, float* tail,
                      float* at_label, int64_t begin, int64_t end) {
  if (has_few(z)) return label_statistics_of_few(z, labels, max, tail, at_label, begin, end);
  float buffer[kFirst];
  for (int64_t i = begin; i < end; ++i) {
    Sum sum;
    for_blocks(z.num_classes, kFirst, [&](int64_t start, int64_t n) {
      sum.add(read_logits(z, i, start, n, buffer), n);
    });
    sum.finish(max + i, tail + i);
    const int64_t label = labels[i];
    at_label[i] = 0 <= label && label < z.num_classes ? read_logit(z, i, label) : 0;
  }
}

// Where to compute the cotangent of a block: in place, or in a buffer, which is then masked and copied.
void finish(const Logits& z, int64_t row, int64_t start, int64_t n, float* buffer, void* out) {
  fill_masked(mask_of(z, row, start), n, 0, buffer);
  write(out, z.type, n, buffer);
}

// If an exponential is 0, the distance is still finite, so that their product is 0.
INLINE F not_infinite(F distance) { return larger(all(-128.f), distance); }

void spread(const Logits& z, const float* max, float* out, int64_t begin, int64_t end) {
  float buffer[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const F highest = all(quiet(max[i]));
    double so_far = 0;
    for_blocks(z.num_classes, kBlock, [&](int64_t start, int64_t n) {
      const Block x = read_logits(z, i, start, n, buffer);
      F sums[kVectors] = {};
      visit(x.type, [&](auto of) INLINED {
        for_pairs<of.type>(x.data, n, kBlock, [&](int64_t, int k, Pair v) INLINED {
          sums[k] += exp_difference(v.a, highest) * not_infinite(v.a - highest);
          sums[k + 1] += exp_difference(v.b, highest) * not_infinite(v.b - highest);
        });
      });
      so_far += total(sums);
    });
    out[i] = float(so_far);
  }
}

void label_cotangent(const Logits& z, const int32_t* labels, const float* max,
                     const float* at_label, const float* elsewhere, const float* slope, void* out,
                     int64_t begin, int64_t end) {
  if (has_few(z) && slope == nullptr)
    return label_cotangent_of_few(z, labels, max, at_label, elsewhere, out, begin, end);
  float buffer[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    void* const row = at(out, z.type, i * z.num_classes);
    if (elsewhere[i] == 0 && at_label[i] == 0 && (slope == nullptr || slope[i] == 0)) {
      write_zeros(row, z.type, z.num_classes);
      continue;
    }
    const int64_t label = labels[i];
    const float highest = quiet(max[i]), factor = quiet(elsewhere[i]);
    const float steepness = slope == nullptr ? 0 : quiet(slope[i]);
    for_blocks(z.num_classes, kBlock, [&](int64_t start, int64_t n) {
      const Block x = read_logits(z, i, start, n, buffer);
      void* const here = at(row, z.type, start);
      void* const g = x.data == buffer ? buffer : here;
      const auto make = [&](auto of, auto value) INLINED {
        for_pairs<of.type>(x.data, n, kBlock, [&](int64_t j, int, Pair v) INLINED {
          narrow<of.type>(g, j, {value(v.a - highest), value(v.b - highest)});
        });
      };
      visit(x.type, [&](auto of) INLINED {
        if (slope == nullptr)
          make(of, [&](F d) INLINED { return exp_of<Need::kExact>(d) * factor; });
        else
          make(of, [&](F d) INLINED {
            return exp_of<Need::kExact>(d) * (factor + steepness * not_infinite(d));
          });
      });
      if (start <= label && label < start + n) narrow(at(g, x.type, label - start), x.type, at_label[i]);
      if (g == buffer) finish(z, i, start, n, buffer, here);
    });
  }
}

void target_statistics(const Logits& z, const Targets& y, float* max, float* tail, float* mass,
                       float* moment, int64_t begin, int64_t end) {
  if (has_few(z)) return target_statistics_of_few(z, y, max, tail, mass, moment, begin, end);
  float logits[kFirst], targets[kFirst];
  for (int64_t i = begin; i < end; ++i) {
    Sum sum;
    double mass_so_far = 0, moment_so_far = 0;  // about the largest logit so far
    for_blocks(z.num_classes, kFirst, [&](int64_t start, int64_t n) {
      const float before = larger(sum.top.max, kLowest);
      Block x = read_logits(z, i, start, n, logits), t = read_targets(z, y, i, start, n, targets);
      make_alike(n, &x, logits, &t, targets);
      sum.add(x, n);
      const float highest = larger(sum.top.max, kLowest);
      if (mass_so_far != 0 && highest > before)
        moment_so_far += mass_so_far * (double(before) - highest);
      for_blocks(n, kBlock, [&](int64_t start, int64_t n) {
        F masses[kVectors] = {}, moments[kVectors] = {};
        visit_both(x.type, t.type, [&](auto of, auto of_targets) INLINED {
          for_pairs<of.type>(x.from(start).data, n, kBlock, [&](int64_t j, int k, Pair v) INLINED {
            const Pair target = widen<of_targets.type>(t.from(start).data, j);
            masses[k] += target.a;
            masses[k + 1] += target.b;
            // A class that is absent (-inf) and has no mass adds nothing.
            moments[k] += target.a == 0 ? F{} : target.a * (v.a - highest);
            moments[k + 1] += target.b == 0 ? F{} : target.b * (v.b - highest);
          });
        });
        mass_so_far += total(masses);
        moment_so_far += total(moments);
      });
    });
    sum.finish(max + i, tail + i);
    mass[i] = float(mass_so_far);
    moment[i] = float(moment_so_far);
  }
}

void target_cotangent(const Logits& z, const Targets& y, const float* max, const float* tail,
                      const float* mass, const float* g_loss, const float* g_log_normalizer,
                      void* out, int64_t begin, int64_t end) {
  if (has_few(z))
    return target_cotangent_of_few(z, y, max, tail, mass, g_loss, g_log_normalizer, out, begin, end);
  float logits[kBlock], targets[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    void* const row = at(out, z.type, i * z.num_classes);
    if (g_loss[i] == 0 && g_log_normalizer[i] == 0) {
      write_zeros(row, z.type, z.num_classes);
      continue;
    }
    const TargetFactors factors(max[i], tail[i], mass[i], g_loss[i], g_log_normalizer[i]);
    for_blocks(z.num_classes, kBlock, [&](int64_t start, int64_t n) {
      Block x = read_logits(z, i, start, n, logits), t = read_targets(z, y, i, start, n, targets);
      make_alike(n, &x, logits, &t, targets);
      void* const here = at(row, z.type, start);
      void* const cotangent = x.data == logits ? logits : here;
      visit_both(x.type, t.type, [&](auto of, auto of_targets) INLINED {
        for_pairs<of.type>(x.data, n, kBlock, [&](int64_t j, int, Pair v) INLINED {
          const Pair target = widen<of_targets.type>(t.data, j);
          narrow<of.type>(cotangent, j, {factors.of(v.a, target.a), factors.of(v.b, target.b)});
        });
      });
      if (cotangent == logits) finish(z, i, start, n, logits, here);
    });
  }
}

// The numbers of one row in its divergence from a teacher's: see _divergence.py.
struct Divergence {
  float highest, share, teacher_highest, teacher_share, maxima, lost, shift;

  Divergence(float max, float tail, float teacher_max, float teacher_tail, float shift)
      : highest(quiet(max)), share(1 / (1 + quiet(tail))), teacher_highest(quiet(teacher_max)),
        teacher_share(1 / (1 + quiet(teacher_tail))), maxima(teacher_highest - highest),
        lost(float(double(teacher_highest) - highest - maxima)), shift(quiet(shift)) {}

  struct Parts {
    F gap, less, o;
  };

  INLINE Parts of(F z, F of_teacher) const {
    const F o = exp_difference(z, all(highest)) * share;
    const F t = exp_difference(of_teacher, all(teacher_highest)) * teacher_share;
    const F apart = of_teacher - z, moved = apart - of_teacher;
    const F error = (of_teacher - (apart - moved)) - (z + moved);  // exact: Knuth's two-sum
    const F r = (apart - maxima) + ((apart - apart == 0 ? error : F{}) - lost) - shift;
    const auto is_near = (t != 0) & (r < 1.5f) & (r > -1.5f);
    const F x = is_near ? r : F{}, t_r = t * (t == 0 ? F{} : r);
    F series = {};  // e^-x - 1 + x, over x^2
    double factorial = 6227020800;  // 13!
    for (int n = 13; n > 1; factorial /= n--) series = series * -x + float(1 / factorial);
    const F near = t * series * x * x;
    const F less = is_near ? near - t_r : o - t;
    return {is_near ? near : less + t_r, less, o};
  }
};

void divergence_sums(const Logits& z, const Logits& teacher, const float* max, const float* tail,
                     const float* teacher_max, const float* teacher_tail, const float* shift,
                     float* gaps, float* rest, int64_t begin, int64_t end) {
  float logits[kBlock], of_teacher[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const Divergence row(max[i], tail[i], teacher_max[i], teacher_tail[i], shift[i]);
    double gaps_so_far = 0, rest_so_far = 0;
    for_blocks(z.num_classes, kBlock, [&](int64_t start, int64_t n) {
      const void* const x = read_logits(z, i, start, n, logits).data;
      const void* const t = read_logits(teacher, i, start, n, of_teacher).data;
      F gap[kVectors] = {}, less[kVectors] = {};
      for_pairs<Type::kF32>(x, n, kBlock, [&](int64_t j, int k, Pair v) INLINED {
        const Pair of = widen<Type::kF32>(t, j);
        const auto a = row.of(v.a, of.a), b = row.of(v.b, of.b);
        gap[k] += a.gap;
        gap[k + 1] += b.gap;
        less[k] += a.less;
        less[k + 1] += b.less;
      });
      gaps_so_far += total(gap);
      rest_so_far += total(less);
    });
    gaps[i] = float(gaps_so_far);
    rest[i] = float(rest_so_far);
  }
}

void divergence_cotangent(const Logits& z, const Logits& teacher, const float* max,
                          const float* tail, const float* teacher_max, const float* teacher_tail,
                          const float* shift, const float* g_loss, const float* constant, float* out,
                          int64_t begin, int64_t end) {
  float logits[kBlock], of_teacher[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    float* const to = out + i * z.num_classes;
    if (g_loss[i] == 0 && constant[i] == 0) {
      write_zeros(to, z.type, z.num_classes);
      continue;
    }
    const Divergence row(max[i], tail[i], teacher_max[i], teacher_tail[i], shift[i]);
    const float g = quiet(g_loss[i]), of_softmax = quiet(constant[i]);
    for_blocks(z.num_classes, kBlock, [&](int64_t start, int64_t n) {
      const void* const x = read_logits(z, i, start, n, logits).data;
      const void* const t = read_logits(teacher, i, start, n, of_teacher).data;
      float* const here = x == logits ? logits : to + start;
      for_pairs<Type::kF32>(x, n, kBlock, [&](int64_t j, int, Pair v) INLINED {
        const Pair of = widen<Type::kF32>(t, j);
        const auto a = row.of(v.a, of.a), b = row.of(v.b, of.b);
        narrow<Type::kF32>(here, j, {a.less * g + a.o * of_softmax, b.less * g + b.o * of_softmax});
      });
      if (here == logits) write(to + start, z.type, n, logits);
    });
  }
}

}  // namespace

extern const Kernels JAX_SCE_PASTE(kernels_, JAX_SCE_LEVEL);
const Kernels JAX_SCE_PASTE(kernels_, JAX_SCE_LEVEL) = {
    JAX_SCE_NAME(JAX_SCE_LEVEL),
    label_statistics,
    label_cotangent,
    target_statistics,
    target_cotangent,
    spread,
    divergence_sums,
    divergence_cotangent,
};

}  // namespace jax_sce
