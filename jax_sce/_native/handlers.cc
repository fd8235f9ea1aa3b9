// The entry points for XLA's FFI: check the arguments and distribute the rows over XLA's threads.

#include <atomic>
#include <cstring>
#include <optional>

#include "for_rows.h"
#include "levels.h"
#include "rows.h"
#include "xla/ffi/api/ffi.h"

// The FFI binds a handler's arguments by their types. It must be told that this one is a context.
template <>
struct xla::ffi::CtxBinding<xla::ffi::ThreadPool> {
  using Ctx = ThreadPool;
};

namespace jax_sce {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::Error;
using ffi::Result;
using ffi::ThreadPool;

namespace {

// -- which kernels ------------------------------------------------------------------------------------

std::atomic<const Kernels*> current{nullptr};

const Kernels& kernels() {
  const Kernels* chosen = current.load(std::memory_order_relaxed);
  return chosen == nullptr ? kernels_baseline : *chosen;
}

// -- arguments ----------------------------------------------------------------------------------------

template <ffi::DataType type>
using In = ffi::Buffer<type>;
template <ffi::DataType type>
using Out = ffi::ResultBuffer<type>;
constexpr auto F32 = ffi::DataType::F32, S32 = ffi::DataType::S32, PRED = ffi::DataType::PRED;

std::optional<Type> type_of(const AnyBuffer& x) {
  switch (x.element_type()) {
    case ffi::DataType::F32: return Type::kF32;
    case ffi::DataType::BF16: return Type::kBF16;
    case ffi::DataType::F16: return Type::kF16;
    case ffi::DataType::S32: return Type::kIds;
    default: return std::nullopt;
  }
}

struct Problem {
  int64_t num_rows, num_classes;
  Logits logits;
};

Error read_problem(const AnyBuffer& logits, const In<PRED>& where, Problem* problem) {
  const auto dimensions = logits.dimensions();
  const auto type = type_of(logits);
  if (dimensions.size() < 1 || dimensions.back() < 1 || !type || *type == Type::kIds)
    return Error::InvalidArgument("logits must be floats of rank 1 or more with a class or more");
  const int64_t num_classes = dimensions.back();
  const int64_t num_rows = static_cast<int64_t>(logits.element_count()) / num_classes;
  const bool shared = where.dimensions().size() == 1;
  const int64_t kept = static_cast<int64_t>(where.element_count());
  if (kept != 0 && kept != (shared ? num_classes : num_rows * num_classes))
    return Error::InvalidArgument("where must be empty, [V], or of the shape of the logits");
  const auto* mask = reinterpret_cast<const uint8_t*>(where.untyped_data());
  *problem = {num_rows, num_classes,
              {logits.untyped_data(), *type, num_classes, kept == 0 ? nullptr : mask, shared}};
  return Error::Success();
}

Error read_targets(const Problem& problem, const AnyBuffer& labels, const In<F32>& smoothing,
                   const In<F32>& share, const In<F32>& class_weights, Targets* targets) {
  const auto type = type_of(labels);
  const auto count = [](const auto& x) { return static_cast<int64_t>(x.element_count()); };
  const int64_t n = problem.num_rows, v = problem.num_classes;
  if (!type || count(labels) != (*type == Type::kIds ? n : n * v))
    return Error::InvalidArgument("labels must be ids or floats, one a row or one a logit");
  if (count(smoothing) != 1 || (count(share) != 1 && count(share) != n))
    return Error::InvalidArgument("smoothing must be one number, and share one or one a row");
  if (count(class_weights) != 0 && count(class_weights) != v)
    return Error::InvalidArgument("class_weights must be empty or [V]");
  *targets = {labels.untyped_data(), *type, smoothing.typed_data(), share.typed_data(),
              share.dimensions().size() == 1 && count(share) == 1,
              count(class_weights) == 0 ? nullptr : class_weights.typed_data()};
  return Error::Success();
}

// Arrays with one number per row.
template <class... Buffers>
Error check_rows(const Problem& problem, Buffers&... buffers) {
  if (((static_cast<int64_t>(buffers.element_count()) == problem.num_rows) && ...))
    return Error::Success();
  return Error::InvalidArgument("labels, statistics and cotangents must be one a row");
}

Error check_cotangent(const AnyBuffer& logits, AnyBuffer& out) {
  if (out.element_type() == logits.element_type() && out.element_count() == logits.element_count())
    return Error::Success();
  return Error::InvalidArgument("the cotangent must have the type and the size of the logits");
}

#define RETURN_IF_ERROR(expression) \
  if (Error error = (expression); error.failure()) return error

// -- handlers -----------------------------------------------------------------------------------------

Error label_statistics(ThreadPool pool, AnyBuffer logits, In<PRED> where, In<S32> labels,
                       Out<F32> max, Out<F32> tail, Out<F32> at_label) {
  Problem p;
  RETURN_IF_ERROR(read_problem(logits, where, &p));
  RETURN_IF_ERROR(check_rows(p, labels, *max, *tail, *at_label));
  for_rows(pool, p.num_rows, p.num_classes,
           [&kernels = kernels(), z = p.logits, labels = labels.typed_data(), max = max->typed_data(),
            tail = tail->typed_data(), at_label = at_label->typed_data()](int64_t begin, int64_t end) {
             kernels.label_statistics(z, labels, max, tail, at_label, begin, end);
           });
  return Error::Success();
}

Error label_cotangent(ThreadPool pool, AnyBuffer logits, In<PRED> where, In<S32> labels,
                      In<F32> max, In<F32> at_label, In<F32> elsewhere, In<F32> slope,
                      Result<AnyBuffer> out) {
  Problem p;
  RETURN_IF_ERROR(read_problem(logits, where, &p));
  RETURN_IF_ERROR(check_rows(p, labels, max, at_label, elsewhere));
  const bool has_slope = slope.element_count() != 0;  // or there are no rows
  if (has_slope) RETURN_IF_ERROR(check_rows(p, slope));
  RETURN_IF_ERROR(check_cotangent(logits, *out));
  for_rows(pool, p.num_rows, p.num_classes,
           [&kernels = kernels(), z = p.logits, labels = labels.typed_data(), max = max.typed_data(),
            at_label = at_label.typed_data(), elsewhere = elsewhere.typed_data(),
            slope = has_slope ? slope.typed_data() : nullptr,
            out = out->untyped_data()](int64_t begin, int64_t end) {
             kernels.label_cotangent(z, labels, max, at_label, elsewhere, slope, out, begin, end);
           });
  return Error::Success();
}

Error spread(ThreadPool pool, AnyBuffer logits, In<PRED> where, In<F32> max, Out<F32> out) {
  Problem p;
  RETURN_IF_ERROR(read_problem(logits, where, &p));
  RETURN_IF_ERROR(check_rows(p, max, *out));
  for_rows(pool, p.num_rows, p.num_classes,
           [&kernels = kernels(), z = p.logits, max = max.typed_data(),
            out = out->typed_data()](int64_t begin, int64_t end) {
             kernels.spread(z, max, out, begin, end);
           });
  return Error::Success();
}

Error target_statistics(ThreadPool pool, AnyBuffer logits, In<PRED> where, AnyBuffer labels,
                        In<F32> smoothing, In<F32> share, In<F32> class_weights, Out<F32> max,
                        Out<F32> tail, Out<F32> mass, Out<F32> moment) {
  Problem p;
  Targets y;
  RETURN_IF_ERROR(read_problem(logits, where, &p));
  RETURN_IF_ERROR(read_targets(p, labels, smoothing, share, class_weights, &y));
  RETURN_IF_ERROR(check_rows(p, *max, *tail, *mass, *moment));
  for_rows(pool, p.num_rows, p.num_classes,
           [&kernels = kernels(), z = p.logits, y, max = max->typed_data(), tail = tail->typed_data(),
            mass = mass->typed_data(), moment = moment->typed_data()](int64_t begin, int64_t end) {
             kernels.target_statistics(z, y, max, tail, mass, moment, begin, end);
           });
  return Error::Success();
}

Error target_cotangent(ThreadPool pool, AnyBuffer logits, In<PRED> where, AnyBuffer labels,
                       In<F32> smoothing, In<F32> share, In<F32> class_weights, In<F32> max,
                       In<F32> tail, In<F32> mass, In<F32> g_loss, In<F32> g_log_normalizer,
                       Result<AnyBuffer> out) {
  Problem p;
  Targets y;
  RETURN_IF_ERROR(read_problem(logits, where, &p));
  RETURN_IF_ERROR(read_targets(p, labels, smoothing, share, class_weights, &y));
  RETURN_IF_ERROR(check_rows(p, max, tail, mass, g_loss, g_log_normalizer));
  RETURN_IF_ERROR(check_cotangent(logits, *out));
  for_rows(pool, p.num_rows, p.num_classes,
           [&kernels = kernels(), z = p.logits, y, max = max.typed_data(), tail = tail.typed_data(),
            mass = mass.typed_data(), g_loss = g_loss.typed_data(),
            g_log_normalizer = g_log_normalizer.typed_data(),
            out = out->untyped_data()](int64_t begin, int64_t end) {
             kernels.target_cotangent(z, y, max, tail, mass, g_loss, g_log_normalizer, out, begin,
                                      end);
           });
  return Error::Success();
}

// The logits and a teacher's logits, both float32 [N, V].
Error read_both(const In<F32>& logits, const In<F32>& teacher, Problem* problem, Logits* of_teacher) {
  const auto dimensions = logits.dimensions();
  if (dimensions.size() < 1 || dimensions.back() < 1 ||
      logits.element_count() != teacher.element_count())
    return Error::InvalidArgument("logits must have a class or more, and the teacher's their size");
  const int64_t num_classes = dimensions.back();
  const int64_t num_rows = static_cast<int64_t>(logits.element_count()) / num_classes;
  *problem = {num_rows, num_classes, {logits.typed_data(), Type::kF32, num_classes, nullptr, false}};
  *of_teacher = {teacher.typed_data(), Type::kF32, num_classes, nullptr, false};
  return Error::Success();
}

Error divergence_sums(ThreadPool pool, In<F32> logits, In<F32> teacher, In<F32> max, In<F32> tail,
                      In<F32> teacher_max, In<F32> teacher_tail, In<F32> shift, Out<F32> gaps,
                      Out<F32> rest) {
  Problem p;
  Logits t;
  RETURN_IF_ERROR(read_both(logits, teacher, &p, &t));
  RETURN_IF_ERROR(check_rows(p, max, tail, teacher_max, teacher_tail, shift, *gaps, *rest));
  for_rows(pool, p.num_rows, p.num_classes,
           [&kernels = kernels(), z = p.logits, t, max = max.typed_data(), tail = tail.typed_data(),
            teacher_max = teacher_max.typed_data(), teacher_tail = teacher_tail.typed_data(),
            shift = shift.typed_data(), gaps = gaps->typed_data(),
            rest = rest->typed_data()](int64_t begin, int64_t end) {
             kernels.divergence_sums(z, t, max, tail, teacher_max, teacher_tail, shift, gaps, rest,
                                     begin, end);
           });
  return Error::Success();
}

Error divergence_cotangent(ThreadPool pool, In<F32> logits, In<F32> teacher, In<F32> max,
                           In<F32> tail, In<F32> teacher_max, In<F32> teacher_tail, In<F32> shift,
                           In<F32> g_loss, In<F32> constant, Out<F32> out) {
  Problem p;
  Logits t;
  RETURN_IF_ERROR(read_both(logits, teacher, &p, &t));
  RETURN_IF_ERROR(
      check_rows(p, max, tail, teacher_max, teacher_tail, shift, g_loss, constant));
  if (out->element_count() != logits.element_count())
    return Error::InvalidArgument("the cotangent must have the size of the logits");
  for_rows(pool, p.num_rows, p.num_classes,
           [&kernels = kernels(), z = p.logits, t, max = max.typed_data(), tail = tail.typed_data(),
            teacher_max = teacher_max.typed_data(), teacher_tail = teacher_tail.typed_data(),
            shift = shift.typed_data(), g_loss = g_loss.typed_data(),
            constant = constant.typed_data(), out = out->typed_data()](int64_t begin, int64_t end) {
             kernels.divergence_cotangent(z, t, max, tail, teacher_max, teacher_tail, shift, g_loss,
                                          constant, out, begin, end);
           });
  return Error::Success();
}

}  // namespace

// -- what is exported ---------------------------------------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int jax_sce_ffi_major() { return XLA_FFI_API_MAJOR; }
EXPORT int jax_sce_ffi_minor() { return XLA_FFI_API_MINOR; }

// Selects the kernels to use from now on: "best", or the name of a level. Returns their level, or null if no
// kernels have that name or this processor cannot run them.
EXPORT const char* jax_sce_use(const char* level) {
  const Kernels* chosen = nullptr;
  for (const Kernels* found : kernels_for(features_here()))
    if (std::strcmp(level, "best") == 0 || std::strcmp(level, found->level) == 0) chosen = found;
  if (chosen == nullptr) return nullptr;
  current = chosen;
  return chosen->level;
}

#define EXPORT_HANDLER(kernel)                                      \
  XLA_FFI_DEFINE_HANDLER(handle_##kernel, kernel);                  \
  EXPORT XLA_FFI_Error* jax_sce_##kernel(XLA_FFI_CallFrame* frame) { \
    return handle_##kernel(frame);                                  \
  }

EXPORT_HANDLER(label_statistics)
EXPORT_HANDLER(label_cotangent)
EXPORT_HANDLER(target_statistics)
EXPORT_HANDLER(target_cotangent)
EXPORT_HANDLER(spread)
EXPORT_HANDLER(divergence_sums)
EXPORT_HANDLER(divergence_cotangent)

}  // namespace jax_sce
