// Fuzzes the row kernels (jax_sce/_native/rows.cc), at every level that this processor can run, against
// plain sums in long double, under the sanitizers that JAX_SCE_SANITIZE asks for (see the CMakeLists.txt
// there). Before that, the choice of a level for any processor, and the sharing out of rows to threads that
// start late or never, and without memory. To be run as
//   native_fuzz [rounds [seed]]
// A round has one case of each number of classes, with all else drawn at random. The same arguments give
// the same cases.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "for_rows.h"
#include "levels.h"
#include "rows.h"

// Of this thread: so many allocations succeed, and no more.
thread_local int64_t allocations_left = std::numeric_limits<int64_t>::max();

void* operator new(std::size_t size) {
  void* const p = allocations_left == 0 ? nullptr : std::malloc(size == 0 ? 1 : size);
  if (p == nullptr) throw std::bad_alloc();
  --allocations_left;
  return p;
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace jax_sce {

namespace {

using Real = long double;  // where that is a double, it is enough
constexpr Real kInf = std::numeric_limits<Real>::infinity();
constexpr Real kNaN = std::numeric_limits<Real>::quiet_NaN();
constexpr Real kU = 0x1p-24L;     // the unit roundoff of float
constexpr Real kStep = 0x1p-149L;  // of its subnormal numbers
constexpr Real kExact = 2, kTerms = 5;  // u, of an exponential by itself, and of a sum of 128
constexpr Real kLost = -87.3L;    // log(2^-126): exponentials of less may be 0

// -- chance -------------------------------------------------------------------------------------------

struct Random {
  std::mt19937 bits;

  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  Real uniform(Real low, Real high) { return low + (high - low) * bits() / 4294967296.0L; }
  Real normal() {  // nearly
    Real sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform(0, 1);
    return sum;
  }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[below(static_cast<int64_t>(from.size()))];
  }
};

// -- numbers ------------------------------------------------------------------------------------------

struct Format {
  const char* name;
  int size, digits, min_exponent, max_exponent;
};

const Format& format(Type type) {
  static const Format formats[] = {{"f32", 4, 24, -126, 127},
                                   {"bf16", 2, 8, -126, 127},
                                   {"f16", 2, 11, -14, 15},
                                   {"ids", 4, 0, 0, 0}};
  return formats[static_cast<int>(type)];
}

Real largest(Type type) {
  const Format& f = format(type);
  return std::ldexp(2 - std::ldexp(Real{1}, 1 - f.digits), f.max_exponent);
}

// From x to the next number of that type.
Real step(Type type, Real x) {
  const Format& f = format(type);
  const int exponent = x == 0 ? f.min_exponent : std::max(std::ilogb(x), f.min_exponent);
  return std::ldexp(Real{1}, exponent - f.digits + 1);
}

Real rounded(Type type, Real x) {  // to the nearest, ties to even
  if (!std::isfinite(x)) return x;
  const Real r = std::nearbyint(x / step(type, x)) * step(type, x);
  return std::abs(r) > largest(type) ? std::copysign(kInf, x) : std::copysign(r, x);
}

Real get(const void* data, Type type, int64_t i) {
  uint32_t bits;
  uint16_t half;
  if (type == Type::kF32) {
    std::memcpy(&bits, static_cast<const char*>(data) + 4 * i, 4);
  } else {
    std::memcpy(&half, static_cast<const char*>(data) + 2 * i, 2);
    bits = static_cast<uint32_t>(half) << 16;
  }
  if (type == Type::kF16) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const Real magnitude = exponent == 31  ? (fraction == 0 ? kInf : kNaN)
                           : exponent == 0 ? std::ldexp(Real(fraction), -24)
                                           : std::ldexp(Real(1024 + fraction), exponent - 25);
    return half >> 15 ? -magnitude : magnitude;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

void put(void* data, Type type, int64_t i, Real value) {
  const Real x = rounded(type, value);
  uint32_t bits;
  if (type != Type::kF16) {
    const float f = static_cast<float>(x);
    std::memcpy(&bits, &f, 4);
    if (std::isnan(x)) bits |= 0x7fffffff;  // to round this as other numbers are would carry all over
    if (type == Type::kF32) return void(std::memcpy(static_cast<char*>(data) + 4 * i, &bits, 4));
    bits >>= 16;
  } else if (!std::isfinite(x)) {
    bits = std::isnan(x) ? 0x7e00 : 0x7c00;
  } else {
    const Real magnitude = std::abs(x);
    const int exponent = magnitude < 0x1p-14L ? -14 : std::ilogb(magnitude);
    // The leading one of a normal number adds one to the exponent's field.
    bits = ((exponent + 14) << 10) + static_cast<uint32_t>(std::ldexp(magnitude, 10 - exponent));
  }
  if (type == Type::kF16 && std::signbit(x)) bits |= 0x8000;
  const uint16_t half = static_cast<uint16_t>(bits);
  std::memcpy(static_cast<char*>(data) + 2 * i, &half, 2);
}

// -- memory -------------------------------------------------------------------------------------------

// A block of the heap that ends where the data end, for the sanitizer to see any reach beyond. It starts
// with them, too, or one element earlier, so that they are not aligned.
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t count, int size, bool aligned)
      : front_(aligned ? 0 : size), bytes_(count * size), block_(new uint8_t[front_ + bytes_]) {
    std::memset(block_.get(), 0xff, front_);  // NaN
    std::memset(data(), kUnwritten, bytes_);
  }

  uint8_t* data() const { return block_.get() + front_; }
  float* floats() const { return reinterpret_cast<float*>(data()); }
  int64_t bytes() const { return bytes_; }
  void copy(const Buffer& from) { std::memcpy(data(), from.data(), bytes_); }
  bool front_is_intact() const {
    return std::all_of(block_.get(), data(), [](uint8_t x) { return x == 0xff; });
  }

  static constexpr uint8_t kUnwritten = 0xa5;

 private:
  int64_t front_ = 0, bytes_ = 0;
  std::unique_ptr<uint8_t[]> block_;
};

// -- cases --------------------------------------------------------------------------------------------

enum Kernel { kLabelStatistics, kLabelCotangent, kTargetStatistics, kTargetCotangent };
constexpr Kernel kKernels[] = {kLabelStatistics, kLabelCotangent, kTargetStatistics, kTargetCotangent};
const char* const kKernelNames[] = {"label_statistics", "label_cotangent", "target_statistics",
                                    "target_cotangent"};
const std::vector<const char*> kOutputs[] = {
    {"max", "tail", "at_label"}, {"cotangent"}, {"max", "tail", "mass", "moment"}, {"cotangent"}};

bool is_cotangent(Kernel kernel) { return kernel == kLabelCotangent || kernel == kTargetCotangent; }

struct Expected {
  Real value;
  Real unit = 0;   // the error is to be a few u of this: see `limit`
  Real slack = 0;  // and may be this, besides
  enum { kNumber, kZero, kNotFinite } kind = kNumber;
};

// In u of the unit: what _rows.py promises, there (6 + |z - max|) 4u of a cotangent.
Real limit(Kernel kernel) { return is_cotangent(kernel) ? 4 : 16; }

struct Case {
  int64_t num_rows, num_classes;
  Type type;
  bool aligned;
  Buffer logits, where, ids, labels, smoothing, share, class_weights;
  Buffer max, tail, mass, at_label, elsewhere, g_loss, g_log_normalizer;
  Logits z;
  Targets y;
  std::array<std::vector<std::vector<Expected>>, 4> expected;  // [kernel][output][row, or row and class]

  Buffer room(int64_t count, int size) const { return Buffer(count, size, aligned); }
  const uint8_t* mask(int64_t row) const {
    return z.where == nullptr ? nullptr : z.where + (z.where_is_shared ? 0 : row * num_classes);
  }
  Real logit(int64_t row, int64_t j) const {
    return mask(row) == nullptr || mask(row)[j] ? get(z.data, type, row * num_classes + j) : -kInf;
  }
  int64_t id(int64_t row) const {
    int32_t id;
    std::memcpy(&id, ids.data() + 4 * row, 4);
    return id;
  }
};

void draw_logits(Random& random, Case& c, int64_t row) {
  const int64_t v = c.num_classes;
  std::vector<Real> z(v);
  const Real scale = random.pick<Real>({0.01L, 1, 5, 20, 100}), top = largest(c.type);
  const auto anywhere = [&]() -> Real& { return z[random.below(v)]; };
  const auto scatter = [&](Real x, int64_t share) {
    for (int64_t j = 0; j < v; ++j)
      if (random.one_in(share)) z[j] = x;
    anywhere() = x;
  };
  for (Real& x : z) x = scale * random.normal();
  switch (v > 1 << 16 ? 14 : random.below(19)) {
    case 0:  // all in one vector or block are larger
      for (int64_t j = random.below(v), n = 1 + random.below(40); j < v && n > 0; ++j, --n) z[j] += 50;
      break;
    case 1:  // far from 0
      for (Real& x : z) x += random.pick<Real>({1e8L, -1e8L, 1e4L});
      break;
    case 2: {
      const Real offset = random.pick<Real>({1e30L, -1e30L});
      for (Real& x : z) x = offset * (1 + static_cast<Real>(random.below(5)) * kU);
      break;
    }
    case 3:  // ties
      for (Real& x : z) x = random.pick<Real>({0.L, -0.L, -1, -2});
      break;
    case 4:
      std::fill(z.begin(), z.end(), scale * random.normal());
      break;
    case 5:  // one far ahead, or two
      anywhere() = *std::max_element(z.begin(), z.end()) + random.uniform(20, 100);
      if (random.one_in(2)) anywhere() = *std::max_element(z.begin(), z.end());
      break;
    case 6:
      for (Real& x : z) x = random.one_in(8) ? scale : scale - random.uniform(60, 110);
      break;
    case 7:  // one is present
      std::fill(z.begin(), z.end(), -kInf);
      anywhere() = random.pick<Real>({0, 1, -top, top, scale});
      break;
    case 8:
      scatter(-kInf, random.pick({2, 4, 100}));
      break;
    case 9:
      std::fill(z.begin(), z.end(), -kInf);
      if (random.one_in(2)) anywhere() = kNaN;
      break;
    case 10:
      scatter(kInf, random.pick({2, 1000, 1000}));
      if (random.one_in(4)) anywhere() = kNaN;
      break;
    case 11:
      scatter(kNaN, random.pick({2, 1000, 1000}));
      break;
    case 12:
      for (Real& x : z) x *= 1e-40L;
      break;
    case 13:
      for (Real& x : z) x = random.pick<Real>({top, -top, top / 2, 0});
      break;
    case 14:  // the largest comes last, block by block
      for (int64_t j = 0; j < v; ++j) z[j] = scale * static_cast<Real>(j) / v;
      if (random.one_in(4)) std::reverse(z.begin(), z.end());
      break;
    case 15:
      for (Real& x : z) x = std::exp(20 * random.normal()) * random.pick<Real>({1, -1});
      break;
    case 16:  // the errors of equal terms have the same sign
      std::fill(z.begin(), z.end(), -random.uniform(0, 3));
      anywhere() = 0;
      anywhere() = random.uniform(0, 20);
      break;
    default:
      break;
  }
  for (int64_t j = 0; j < v; ++j) {
    const Real x = std::isfinite(z[j]) ? std::clamp(z[j], -top, top) : z[j];
    put(c.logits.data(), c.type, row * v + j, random.one_in(2) && std::isnan(x) ? -x : x);
  }
}

void draw_mask(Random& random, Case& c) {
  const int64_t v = c.num_classes;
  const bool shared = random.one_in(3);
  c.where = Buffer(shared ? v : c.num_rows * v, 1, c.aligned);
  for (int64_t begin = 0; begin < c.where.bytes(); begin += v) {
    const int64_t one = random.below(v), some = random.pick({2, 2, 10, 50}), kind = random.below(8);
    for (int64_t j = 0; j < v; ++j)
      c.where.data()[begin + j] = kind == 0   ? false
                                  : kind == 1 ? j == one
                                  : kind == 2 ? true
                                  : kind == 3 ? j > one
                                              : !random.one_in(some);
  }
  c.z.where = c.where.data();
  c.z.where_is_shared = shared;
}

void draw_ids(Random& random, Case& c) {
  constexpr int32_t most = std::numeric_limits<int32_t>::max(), least = -most - 1;
  const int32_t v = static_cast<int32_t>(c.num_classes);
  c.ids = c.room(c.num_rows, 4);
  for (int64_t row = 0; row < c.num_rows; ++row) {
    int32_t id = static_cast<int32_t>(random.below(v));
    if (random.one_in(2))  // the largest
      for (int32_t j = 0; j < v; ++j)
        if (c.logit(row, j) > c.logit(row, id)) id = j;
    if (random.one_in(10)) id = random.pick({-1, v, v + 1, -v, most, least});
    std::memcpy(c.ids.data() + 4 * row, &id, 4);
  }
}

void draw_targets(Random& random, Case& c) {
  const int64_t n = c.num_rows, v = c.num_classes;
  c.y.type = random.pick({Type::kF32, Type::kBF16, Type::kF16, Type::kIds, Type::kIds});
  const bool smooth = random.one_in(2);
  if (c.y.type != Type::kIds) {
    c.labels = c.room(n * v, format(c.y.type).size);
    for (int64_t row = 0; row < n; ++row) {
      const int64_t kind = random.below(6), one = random.below(v);
      for (int64_t j = 0; j < v; ++j) {
        Real y = random.uniform(0, 2) / v;
        if (kind == 0) y = j == one;
        if (kind == 1) y = c.logit(row, j) == c.logit(row, one);
        if (kind == 2 && !random.one_in(4)) y = 0;
        if (kind == 3 && !smooth) y *= random.pick({1, -1});
        if (random.one_in(20000)) y = random.pick<Real>({kNaN, -kNaN, kInf});
        put(c.labels.data(), c.y.type, row * v + j, y);
      }
    }
  }
  c.y.labels = c.y.type == Type::kIds ? c.ids.data() : c.labels.data();

  c.y.share_is_shared = random.one_in(2);
  c.smoothing = c.room(1, 4);
  c.share = c.room(c.y.share_is_shared ? 1 : n, 4);
  put(c.smoothing.data(), Type::kF32, 0,
      smooth ? random.pick<Real>({0.1L, 0.1L, 1, random.uniform(0, 1)}) : 0);
  for (int64_t i = 0; i < c.share.bytes() / 4; ++i)
    put(c.share.data(), Type::kF32, i, Real{1} / (1 + random.below(v)));
  c.y.smoothing = c.smoothing.floats();
  c.y.share = c.share.floats();

  c.y.class_weights = nullptr;
  if (random.one_in(3)) {
    c.class_weights = c.room(v, 4);
    for (int64_t j = 0; j < v; ++j)
      put(c.class_weights.data(), Type::kF32, j, random.one_in(8) ? 0 : random.uniform(0.01L, 3));
    c.y.class_weights = c.class_weights.floats();
  }
}

// The factors of a row's cotangent.
void draw_pair(Random& random, float* a, float* b) {
  const Real size = random.pick<Real>({1, 1, 1e-3L, 1e-30L, 1e30L});
  Real x = size * random.normal(), y = size * random.normal();
  const int64_t kind = random.below(12);
  if (kind <= 2) x = random.pick<Real>({0.L, -0.L});
  if (kind <= 1 || kind == 3 || kind >= 9) y = random.pick<Real>({0.L, -0.L});
  if (kind == 4) x = random.pick<Real>({kNaN, kInf, -kInf});
  if (kind == 5) y = random.pick<Real>({kNaN, kInf, -kInf});
  put(a, Type::kF32, 0, x);
  put(b, Type::kF32, 0, y);
}

// -- what is right ------------------------------------------------------------------------------------

struct Row {
  std::vector<Real> z, y, size;  // logits, targets, and the sum of the magnitudes that make a target
  Real max = -kInf, tail = 0, lost = 0, mass = 0;
  bool has_nan = false;

  bool is_special() const { return has_nan || std::isinf(max); }
};

Row read(const Case& c, int64_t row) {
  Row r;
  const int64_t v = c.num_classes;
  for (int64_t j = 0; j < v; ++j) {
    r.z.push_back(c.logit(row, j));
    r.has_nan |= std::isnan(r.z[j]);
    if (r.z[j] > r.max) r.max = r.z[j];
  }
  bool leader_is_met = false;
  for (Real z : r.z) {
    const bool leads = z == r.max && !leader_is_met;
    leader_is_met |= leads;
    const Real term = leads ? 0 : std::exp(z - r.max);
    r.tail += term;
    if (z - r.max < kLost) r.lost += term;
  }
  if (r.is_special()) r.tail = kNaN;

  const Real keep = 1 - Real(*c.y.smoothing);
  const Real uniform = Real(*c.y.smoothing) * c.y.share[c.y.share_is_shared ? 0 : row];
  for (int64_t j = 0; j < v; ++j) {
    const bool is_kept = c.mask(row) == nullptr || c.mask(row)[j];
    Real y = 0;
    if (c.y.type == Type::kIds)
      y = 0 <= c.id(row) && c.id(row) < v ? j == c.id(row) : kNaN;
    else if (is_kept)
      y = get(c.y.labels, c.y.type, row * v + j);
    const Real weight = c.y.class_weights == nullptr ? 1 : c.y.class_weights[j];
    r.y.push_back(weight * (keep * y + (is_kept ? uniform : 0)));
    r.size.push_back(weight * (keep * std::abs(y) + (is_kept ? uniform : 0)));
    r.mass += r.y[j];
  }
  return r;
}

void expect_statistics(Case& c, const Row& r, int64_t row) {
  Expected max = {r.max};
  if (r.has_nan) max.value = kNaN;
  if (r.max == kInf) max.kind = Expected::kNotFinite;
  const Expected tail = {r.tail, r.tail, r.lost};

  Expected at_label = {0};
  if (0 <= c.id(row) && c.id(row) < c.num_classes) at_label.value = r.z[c.id(row)];
  auto& of_label = c.expected[kLabelStatistics];
  of_label[0].push_back(max);
  of_label[1].push_back(tail);
  of_label[2].push_back(at_label);

  Expected mass = {r.mass}, moment = {0};
  bool is_infinite = false;
  for (int64_t j = 0; j < c.num_classes; ++j) {
    mass.unit += r.size[j];
    is_infinite |= std::isinf(r.y[j]);
    if (r.y[j] == 0) continue;
    const Real distance = r.z[j] - r.max;
    moment.value += r.y[j] * distance;
    moment.unit += r.size[j] * std::abs(distance);
    moment.slack += kStep * (1 + std::abs(distance));  // a product may be subnormal, and
    if (std::isfinite(distance) && -distance > largest(Type::kF32)) moment.slack = kInf;  // not a float
  }
  if (is_infinite) mass.kind = moment.kind = Expected::kNotFinite;
  if (std::isinf(moment.value)) moment.unit = moment.slack = 0;
  else if (moment.unit > largest(Type::kF32) / 2) moment.slack = kInf;
  if (r.is_special()) moment.slack = kInf;  // the tail says it all
  auto& of_target = c.expected[kTargetStatistics];
  of_target[0].push_back(max);
  of_target[1].push_back(tail);
  of_target[2].push_back(mass);
  of_target[3].push_back(moment);
}

// What the cotangents get of the statistics: as they are, or as if there were more classes elsewhere.
void give_statistics(Random& random, Case& c, const Row& r, int64_t row) {
  Real max = r.has_nan ? kNaN : r.max, tail = r.tail;
  if (!r.is_special() && random.one_in(4)) {
    put(c.max.data(), Type::kF32, row, std::min(max + random.uniform(0, 3), largest(Type::kF32)));
    max = c.max.floats()[row];
    tail = (1 + tail) * std::exp(r.max - max) + random.uniform(0, 2);
  }
  put(c.max.data(), Type::kF32, row, max);
  put(c.tail.data(), Type::kF32, row, tail);
  put(c.mass.data(), Type::kF32, row, r.mass);
}

void expect_label_cotangent(Case& c, const Row& r, int64_t row) {
  const Real max = c.max.floats()[row], at_label = c.at_label.floats()[row];
  const Real elsewhere = c.elsewhere.floats()[row];
  for (int64_t j = 0; j < c.num_classes; ++j) {
    const Real distance = r.z[j] - max, value = elsewhere * std::exp(distance);
    Expected e = {value};
    const bool is_masked = c.mask(row) != nullptr && !c.mask(row)[j];
    if (is_masked || (elsewhere == 0 && at_label == 0)) {
      e = {0, 0, 0, Expected::kZero};
    } else if (j == c.id(row)) {
      e = {rounded(c.type, at_label)};
    } else if (std::isinf(elsewhere)) {
      e.kind = Expected::kNotFinite;
    } else if (value != 0) {
      e.unit = std::abs(value) * (6 + std::abs(distance));
      e.slack = 2 * kStep + (distance < kLost ? std::abs(value) : 0);
    }
    c.expected[kLabelCotangent][0].push_back(e);
  }
}

void expect_target_cotangent(Case& c, const Row& r, int64_t row) {
  const Real max = c.max.floats()[row], tail = c.tail.floats()[row], mass = c.mass.floats()[row];
  const Real g_loss = c.g_loss.floats()[row], g_log_normalizer = c.g_log_normalizer.floats()[row];
  const bool is_one_hot =
      c.y.type == Type::kIds && *c.y.smoothing == 0 && c.y.class_weights == nullptr;
  for (int64_t j = 0; j < c.num_classes; ++j) {
    const Real distance = r.z[j] - max, y = r.y[j], o = std::exp(distance) / (1 + tail);
    // The parts whose errors grow with the distance, and those whose do not.
    Real difference = o * mass - y, moved = o * std::abs(mass), fixed = r.size[j];
    if (distance == 0) {  // nothing is to cancel
      difference = ((mass - y) - y * tail) / (1 + tail);
      fixed = is_one_hot ? std::abs(difference) : moved + fixed;
      moved = 0;
    }
    const Real far = 6 + (o == 0 ? 0 : std::abs(distance));
    Expected e = {g_loss * difference + g_log_normalizer * o};
    const bool is_masked = c.mask(row) != nullptr && !c.mask(row)[j];
    if (is_masked || (g_loss == 0 && g_log_normalizer == 0)) {
      e = {0, 0, 0, Expected::kZero};
    } else if (!std::isfinite(g_loss) || !std::isfinite(g_log_normalizer) || !std::isfinite(mass)) {
      e.kind = Expected::kNotFinite;
    } else {
      e.unit = std::abs(g_loss) * (moved * far + fixed * 6) + std::abs(g_log_normalizer) * o * far;
      e.slack = 4 * kStep;
      if (distance < kLost) e.slack += o * (std::abs(g_loss * mass) + std::abs(g_log_normalizer));
    }
    c.expected[kTargetCotangent][0].push_back(e);
  }
}

// With nothing that needs chance: all 0.
Case plain(Type type, int64_t num_rows, int64_t num_classes) {
  Case c{};
  c.num_rows = num_rows;
  c.num_classes = num_classes;
  c.type = type;
  c.aligned = true;
  c.logits = c.room(num_rows * num_classes, format(type).size);
  for (Buffer* x : {&c.ids, &c.smoothing, &c.share, &c.max, &c.tail, &c.mass, &c.at_label, &c.elsewhere,
                    &c.g_loss, &c.g_log_normalizer}) {
    *x = c.room(num_rows, 4);
    std::memset(x->data(), 0, x->bytes());
  }
  c.z = {c.logits.data(), type, num_classes, nullptr, false};
  c.y = {c.ids.data(), Type::kIds, c.smoothing.floats(), c.share.floats(), true, nullptr};
  for (Kernel kernel : kKernels) c.expected[kernel].resize(kOutputs[kernel].size());
  return c;
}

Case draw(Random& random, int64_t num_classes) {
  Case c{};
  do c.num_rows = random.pick({1, 2, 3, 31, 32, 33, 63, 64, 65, 70, 97, 130});
  while (c.num_rows > 1 && c.num_rows * num_classes > 40000);
  if (random.one_in(20)) c.num_rows = 0;
  c.num_classes = num_classes;
  c.type = random.pick({Type::kF32, Type::kBF16, Type::kF16});
  c.aligned = random.one_in(2);
  c.logits = c.room(c.num_rows * num_classes, format(c.type).size);
  c.z = {c.logits.data(), c.type, num_classes, nullptr, false};
  for (int64_t row = 0; row < c.num_rows; ++row) draw_logits(random, c, row);
  if (random.one_in(3)) draw_mask(random, c);
  draw_ids(random, c);
  draw_targets(random, c);
  for (Buffer* x :
       {&c.max, &c.tail, &c.mass, &c.at_label, &c.elsewhere, &c.g_loss, &c.g_log_normalizer})
    *x = c.room(c.num_rows, 4);
  for (Kernel kernel : kKernels) c.expected[kernel].resize(kOutputs[kernel].size());
  for (int64_t row = 0; row < c.num_rows; ++row) {
    const Row r = read(c, row);
    give_statistics(random, c, r, row);
    draw_pair(random, c.at_label.floats() + row, c.elsewhere.floats() + row);
    draw_pair(random, c.g_loss.floats() + row, c.g_log_normalizer.floats() + row);
    expect_statistics(c, r, row);
    expect_label_cotangent(c, r, row);
    expect_target_cotangent(c, r, row);
  }
  return c;
}

// -- runs ---------------------------------------------------------------------------------------------

using Outputs = std::vector<Buffer>;

Outputs outputs(const Case& c, Kernel kernel) {
  Outputs out;
  const bool of_logits = is_cotangent(kernel);
  for (size_t k = 0; k < kOutputs[kernel].size(); ++k)
    out.push_back(c.room(of_logits ? c.num_rows * c.num_classes : c.num_rows,
                         of_logits ? format(c.type).size : 4));
  return out;
}

void run(const Kernels& kernels, const Case& c, Kernel kernel, const Logits& z, const Outputs& out,
         int64_t begin, int64_t end) {
  const auto* ids = reinterpret_cast<const int32_t*>(c.ids.data());
  switch (kernel) {
    case kLabelStatistics:
      return kernels.label_statistics(z, ids, out[0].floats(), out[1].floats(), out[2].floats(), begin,
                                      end);
    case kLabelCotangent:
      return kernels.label_cotangent(z, ids, c.max.floats(), c.at_label.floats(), c.elsewhere.floats(),
                                     nullptr, out[0].data(), begin, end);
    case kTargetStatistics:
      return kernels.target_statistics(z, c.y, out[0].floats(), out[1].floats(), out[2].floats(),
                                       out[3].floats(), begin, end);
    case kTargetCotangent:
      return kernels.target_cotangent(z, c.y, c.max.floats(), c.tail.floats(), c.mass.floats(),
                                      c.g_loss.floats(), c.g_log_normalizer.floats(), out[0].data(),
                                      begin, end);
  }
}

struct Fuzzer {
  std::vector<const Kernels*> levels;
  uint32_t seed;
  Random random;
  int64_t num_cases = 0, num_rows = 0;
  Real worst[4][4] = {};  // [kernel][output], in u of the unit
  Real worst_exponential = 0, worst_terms = 0;

  [[noreturn]] void fail(const char* what, const Kernels& kernels, const Case& c, Kernel kernel) {
    std::printf("native_fuzz: %s\n  %s of level %s, case %lld of seed %u: N = %lld, V = %lld, ", what,
                kKernelNames[kernel], kernels.level, static_cast<long long>(num_cases), seed,
                static_cast<long long>(c.num_rows), static_cast<long long>(c.num_classes));
    std::printf("%s, labels %s, ", format(c.type).name, format(c.y.type).name);
    std::printf("where %s, smoothing %g, share %s, class weights %s, %s\n",
                c.z.where == nullptr ? "none" : c.z.where_is_shared ? "[V]" : "[N, V]", *c.y.smoothing,
                c.y.share_is_shared ? "[1]" : "[N]", c.y.class_weights == nullptr ? "none" : "[V]",
                c.aligned ? "aligned" : "not aligned");
    std::exit(1);
  }

  void compare(const Kernels& kernels, const Case& c, Kernel kernel, const Outputs& out) {
    const Type type = is_cotangent(kernel) ? c.type : Type::kF32;
    for (size_t k = 0; k < out.size(); ++k)
      for (size_t i = 0; i < c.expected[kernel][k].size(); ++i) {
        const Expected& e = c.expected[kernel][k][i];
        const Real got = get(out[k].data(), type, static_cast<int64_t>(i));
        const Real error = error_of(type, got, e);
        if (error > 0) worst[kernel][k] = std::max(worst[kernel][k], error);
        if (error <= limit(kernel)) continue;
        const int64_t width = is_cotangent(kernel) ? c.num_classes : 1;
        const int64_t row = static_cast<int64_t>(i) / width, j = static_cast<int64_t>(i) % width;
        std::printf("%s of row %lld", kOutputs[kernel][k], static_cast<long long>(row));
        if (width > 1 || is_cotangent(kernel))
          std::printf(", class %lld", static_cast<long long>(j));
        std::printf(", label %lld: got %.9Lg, want %.12Lg, by %.3Lg u of %.9Lg\n",
                    static_cast<long long>(c.id(row)), got, e.value, error, e.unit);
        const Row r = read(c, row);
        std::printf("  its max %.9Lg, tail %.9Lg, mass %.9Lg, logit %.9Lg, target %.9Lg\n", r.max,
                    r.tail, r.mass, r.z[j], r.y[j]);
        std::printf("  for a cotangent max %.9g, at_label %.9g, elsewhere %.9g, tail %.9g, mass %.9g, ",
                    c.max.floats()[row], c.at_label.floats()[row], c.elsewhere.floats()[row],
                    c.tail.floats()[row], c.mass.floats()[row]);
        std::printf("g_loss %.9g, g_log_normalizer %.9g\n", c.g_loss.floats()[row],
                    c.g_log_normalizer.floats()[row]);
        fail("not what it should be", kernels, c, kernel);
      }
  }

  // In u of the unit, besides the rounding of the output.
  static Real error_of(Type type, Real got, const Expected& e) {
    if (e.slack == kInf) return 0;
    if (e.kind == Expected::kZero) return got == 0 ? 0 : kInf;
    if (e.kind == Expected::kNotFinite) return std::isfinite(got) ? kInf : 0;
    if (std::isnan(e.value)) return std::isnan(got) ? 0 : kInf;
    if (got == e.value) return 0;
    if (std::isnan(got) || std::isinf(e.value)) return kInf;
    // An overflow is a rounding to the power of two that would come next.
    const Real top = std::ldexp(Real{1}, format(type).max_exponent + 1);
    const Real value = std::clamp(e.value, -top, top);
    const Real step_here = step(type, std::min(std::abs(value), largest(type)));
    const Real rounding = type == Type::kF32 ? 0 : step_here / 2;
    const Real error = std::abs(std::clamp(got, -top, top) - value) - rounding - e.slack;
    return error <= 0 ? 0 : error / e.unit / kU;
  }

  void same(const char* what, const Kernels& kernels, const Case& c, Kernel kernel, const Outputs& a,
            const Outputs& b) {
    for (size_t k = 0; k < a.size(); ++k)
      if (std::memcmp(a[k].data(), b[k].data(), a[k].bytes()) != 0) fail(what, kernels, c, kernel);
  }

  void check(const Kernels& kernels, const Case& c, Kernel kernel) {
    const int64_t n = c.num_rows;
    Buffer logits = c.room(n * c.num_classes, format(c.type).size);
    logits.copy(c.logits);
    const Outputs whole = outputs(c, kernel);
    run(kernels, c, kernel, c.z, whole, 0, n);
    if (std::memcmp(logits.data(), c.logits.data(), logits.bytes()) != 0)
      fail("the logits are not what they were", kernels, c, kernel);
    compare(kernels, c, kernel, whole);
    for (const Buffer& x : whole)
      if (!x.front_is_intact()) fail("wrote before the output", kernels, c, kernel);

    if (is_cotangent(kernel)) {
      Outputs in_place;
      in_place.push_back(std::move(logits));
      Logits z = c.z;
      z.data = in_place[0].data();
      run(kernels, c, kernel, z, in_place, 0, n);
      same("not the same in place", kernels, c, kernel, whole, in_place);
    }

    // A part leaves the other rows alone.
    std::vector<int64_t> begins;
    for (int64_t i = 0; i < n; i += kRowsAtOnce * (1 + random.below(2))) begins.push_back(i);
    if (n == 0) return;
    {
      const int64_t begin = begins[random.below(static_cast<int64_t>(begins.size()))];
      const int64_t end = begin + 1 + random.below(n - begin);
      const Outputs part = outputs(c, kernel);
      run(kernels, c, kernel, c.z, part, begin, end);
      for (size_t k = 0; k < part.size(); ++k) {
        const int64_t row = part[k].bytes() / n;
        std::vector<uint8_t> want(part[k].bytes(), Buffer::kUnwritten);
        std::memcpy(want.data() + begin * row, whole[k].data() + begin * row, (end - begin) * row);
        if (std::memcmp(want.data(), part[k].data(), want.size()) != 0)
          fail("not the same of a part of the rows", kernels, c, kernel);
      }
    }

    const int64_t parts = static_cast<int64_t>(begins.size());
    if (parts == 1) return;
    std::vector<int64_t> order(parts);
    for (int64_t i = 0; i < parts; ++i) order[i] = i;
    for (int64_t i = parts - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    const Outputs split = outputs(c, kernel);
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < parts;) {
        const int64_t part = order[i];
        run(kernels, c, kernel, c.z, split, begins[part], part + 1 < parts ? begins[part + 1] : n);
      }
    };
    std::vector<std::thread> threads;
    if (random.one_in(2))
      for (int i = 0; i < 3; ++i) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
    same("not the same in parts", kernels, c, kernel, whole, split);
  }

  void check(int64_t num_classes) {
    const Case c = draw(random, num_classes);
    ++num_cases;
    num_rows += c.num_rows;
    for (const Kernels* kernels : levels)
      for (Kernel kernel : kKernels) check(*kernels, c, kernel);
  }

  void check_at_all_levels(const Case& c, std::initializer_list<Kernel> which) {
    for (const Kernels* kernels : levels)
      for (Kernel kernel : which) check(*kernels, c, kernel);
  }

  // All numbers of 16 bits are read right; those halfway between two, and next to that, rounded right.
  void check_conversions(Type type) {
    constexpr int64_t n = 1 << 16;
    Case c = plain(type, 3 * n, 1);
    for (int64_t i = 0; i < c.num_rows; ++i) {
      const uint16_t bits = static_cast<uint16_t>(i % n);
      std::memcpy(c.logits.data() + 2 * i, &bits, 2);
      const Real x = get(c.logits.data(), type, i);
      const float halfway =
          static_cast<float>(std::isfinite(x) ? x + std::copysign(step(type, x) / 2, x) : x);
      c.at_label.floats()[i] = i < n       ? std::nextafter(halfway, 0.f)
                               : i < 2 * n ? halfway
                                           : std::nextafter(halfway, std::copysign(1e38f, halfway));
      expect_statistics(c, read(c, i), i);
      expect_label_cotangent(c, read(c, i), i);
    }
    check_at_all_levels(c, {kLabelStatistics, kLabelCotangent});
  }

  // The exponential by itself: as a factor of a cotangent, and as equal terms of a tail, a few to a sum.
  void check_exponentials() {
    for (int64_t num_classes : {40, 4001}) {
      Case factors = plain(Type::kF32, 200000 / num_classes, num_classes);
      std::memset(factors.ids.data(), 0xff, factors.ids.bytes());  // none is the label
      for (int64_t i = 0; i < factors.num_rows; ++i) factors.elsewhere.floats()[i] = 1;
      for (int64_t i = 0; i < factors.num_rows * num_classes; ++i) {
        put(factors.logits.data(), Type::kF32, i, -89 * std::pow(random.uniform(0, 1), Real{3}));
        const Real x = get(factors.logits.data(), Type::kF32, i), value = std::exp(x);
        const Real slack = x < kLost ? value : 0;
        factors.expected[kLabelCotangent][0].push_back({value, value * kExact / 4, slack});
      }
      check_at_all_levels(factors, {kLabelCotangent});
    }

    Case terms = plain(Type::kF32, 4000, 128);
    for (int64_t i = 0; i < terms.num_rows; ++i) {
      for (int64_t j = 0; j < terms.num_classes; ++j)
        put(terms.logits.data(), Type::kF32, i * terms.num_classes + j,
            j < 2 ? 0 : static_cast<Real>(-i) / terms.num_rows);
      expect_statistics(terms, read(terms, i), i);
      terms.expected[kLabelStatistics][1].back().unit *= kTerms / 16;
    }
    check_at_all_levels(terms, {kLabelStatistics});
    worst_exponential = worst[kLabelCotangent][0] * kExact / 4;
    worst_terms = worst[kLabelStatistics][1] * kTerms / 16;
    std::memset(worst, 0, sizeof worst);  // of the rest
  }

  // Long rows of which every block is a little larger than the last, so that what was summed before is
  // rescaled again and again.
  void check_ascents() {
    Case c = plain(Type::kF32, 12, 1 << 18);
    for (int64_t i = 0; i < c.num_rows; ++i) {
      for (int64_t j = 0; j < c.num_classes; ++j)
        put(c.logits.data(), Type::kF32, i * c.num_classes + j, 1e-7L * std::pow(1.7L, i) * j);
      expect_statistics(c, read(c, i), i);
    }
    check_at_all_levels(c, {kLabelStatistics});
  }

  void report() const {
    std::printf("native_fuzz: %lld rows in %lld cases, levels", static_cast<long long>(num_rows),
                static_cast<long long>(num_cases));
    for (const Kernels* kernels : levels) std::printf(" %s", kernels->level);
    const Real tail = std::max(worst[kLabelStatistics][1], worst[kTargetStatistics][1]);
    std::printf("; worst errors in 2^-24: exponential %.2Lf, sum of 128 equal ones %.2Lf, tail %.2Lf, ",
                worst_exponential, worst_terms, tail);
    std::printf("mass %.2Lf, moment %.2Lf, cotangents of labels ", worst[kTargetStatistics][2],
                worst[kTargetStatistics][3]);
    std::printf("%.2Lf (6 + |z - max|), of targets %.2Lf (6 + |z - max|)\n", worst[kLabelCotangent][0],
                worst[kTargetCotangent][0]);
  }
};

// All up to 200; then around whole vectors and blocks, a prime or two, and long ones.
std::vector<int64_t> numbers_of_classes() {
  std::vector<int64_t> found;
  for (int64_t v = 1; v <= 200; ++v) found.push_back(v);
  for (int64_t v : {255, 256, 257, 511, 512, 513, 543, 544, 545, 997, 1000}) found.push_back(v);
  for (int64_t block : {1024, 2048, 3072, 4096})
    for (int64_t more : {-33, -32, -1, 0, 1, 31, 32, 33, 500}) found.push_back(block + more);
  for (int64_t v : {2003, 5000, 7919, 10001, 16385, 50257, 131072}) found.push_back(v);
  return found;
}

// -- around the kernels -------------------------------------------------------------------------------

void expect(bool holds, const char* what, const char* where = "") {
  if (holds) return;
  std::printf("native_fuzz: not so: %s %s\n", what, where);
  std::exit(1);
}

// Each feature of a level is asked for, none else, and the processor is read right.
void check_levels() {
  const struct {
    size_t level;  // as an index into all levels
    const char* name;
    uint32_t Features::* word;
    int place;
  } needed[] = {
      {1, "SSE3", &Features::ecx_1, 0},
      {1, "SSSE3", &Features::ecx_1, 9},
      {1, "FMA", &Features::ecx_1, 12},
      {1, "CMPXCHG16B", &Features::ecx_1, 13},
      {1, "SSE4.1", &Features::ecx_1, 19},
      {1, "SSE4.2", &Features::ecx_1, 20},
      {1, "MOVBE", &Features::ecx_1, 22},
      {1, "POPCNT", &Features::ecx_1, 23},
      {1, "OSXSAVE", &Features::ecx_1, 27},
      {1, "AVX", &Features::ecx_1, 28},
      {1, "F16C", &Features::ecx_1, 29},
      {1, "BMI1", &Features::ebx_7, 3},
      {1, "AVX2", &Features::ebx_7, 5},
      {1, "BMI2", &Features::ebx_7, 8},
      {1, "LAHF", &Features::ecx_80000001, 0},
      {1, "LZCNT", &Features::ecx_80000001, 5},
      {1, "XMM", &Features::xcr0, 1},
      {1, "YMM", &Features::xcr0, 2},
      {2, "AVX512F", &Features::ebx_7, 16},
      {2, "AVX512DQ", &Features::ebx_7, 17},
      {2, "AVX512CD", &Features::ebx_7, 28},
      {2, "AVX512BW", &Features::ebx_7, 30},
      {2, "AVX512VL", &Features::ebx_7, 31},
      {2, "masks", &Features::xcr0, 5},
      {2, "ZMM 0-15", &Features::xcr0, 6},
      {2, "ZMM 16-31", &Features::xcr0, 7},
  };
  const size_t built = kernels_for({~0u, ~0u, ~0u, ~0u}).size();
  Features all = {};
  for (const auto& x : needed) all.*x.word |= 1u << x.place;
  expect(kernels_for({}).size() == 1, "a processor without any has the baseline alone");
  expect(kernels_for(all).size() == built, "no more is asked for than the levels need");
  for (const auto& x : needed) {
    Features without = {~0u, ~0u, ~0u, ~0u};
    without.*x.word &= ~(1u << x.place);
    expect(kernels_for(without).size() == std::min(built, x.level), "a level needs", x.name);
  }
#ifdef JAX_SCE_HAS_X86_64_V3
  const Features here = features_here();
  const auto agree = [&here](bool has, uint32_t leaf_7) { return has == here.have({0, leaf_7, 0, 0}); };
  expect(agree(__builtin_cpu_supports("bmi2"), bits({8})), "the compiler, too, finds", "BMI2");
  expect(!__builtin_cpu_supports("avx2") || here.have({bits({27, 28}), bits({5}), 0, bits({1, 2})}),
         "the compiler, too, finds", "AVX2");
  expect(!__builtin_cpu_supports("avx512f") || here.have({0, bits({16}), 0, bits({5, 6, 7})}),
         "the compiler, too, finds", "AVX-512");
#endif
}

// Threads that start at once, or when all is done.
struct Pool {
  bool starts;
  std::vector<std::function<void()>> tasks;
  std::vector<std::thread> threads;

  int64_t num_threads() const { return 4; }
  template <class Task>
  void Schedule(Task task) {
    if (starts)
      threads.emplace_back(task);
    else
      tasks.push_back(task);
  }
  ~Pool() {
    for (auto& task : tasks) task();
    for (auto& thread : threads) thread.join();
  }
};

// When the call ends, each row was taken once, however many threads came, and if the memory ended anywhere.
void check_for_rows() {
  const auto here = std::this_thread::get_id();
  for (bool starts : {false, true})
    for (int64_t n : {0, 1, 8, 9, 100})
      for (int64_t allowed : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 99}) {
        std::vector<std::atomic<int>> taken(n);
        const auto once = [&] {
          return std::all_of(taken.begin(), taken.end(), [](const auto& x) { return x == 1; });
        };
        {
          Pool pool{starts, {}, {}};
          allocations_left = allowed;
          for_rows(pool, n, kPart / 8, [&](int64_t begin, int64_t end) {
            if (std::this_thread::get_id() != here)
              std::this_thread::sleep_for(std::chrono::microseconds(200));
            for (int64_t i = begin; i < end; ++i) ++taken[i];
          });
          allocations_left = std::numeric_limits<int64_t>::max();
          expect(once(), "each row was taken once");
        }
        expect(once(), "a thread that comes late takes none");
      }
}

}  // namespace
}  // namespace jax_sce

int main(int argc, char** argv) {
  using namespace jax_sce;
  const long rounds = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 5;
  const auto seed = static_cast<uint32_t>(argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 0);
  check_levels();
  check_for_rows();
  Fuzzer fuzzer{kernels_for(features_here()), seed, {std::mt19937(seed)}};
  for (Type type : {Type::kBF16, Type::kF16}) fuzzer.check_conversions(type);
  fuzzer.check_exponentials();
  fuzzer.check_ascents();
  for (long round = 0; round < rounds; ++round)
    for (int64_t v : numbers_of_classes()) fuzzer.check(v);
  fuzzer.report();
}
