// Distribute rows over threads.

#ifndef JAX_SCE_FOR_ROWS_H_
#define JAX_SCE_FOR_ROWS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>

#include "rows.h"

namespace jax_sce {

constexpr int64_t kPart = 1 << 15;  // logits; a smaller part is not worth another thread

// Calls work(begin, end) for all rows, on this thread and on those of a pool. Each takes the next part that is
// left. At the end this thread waits only for parts that others have begun, so it does not matter if the others
// never start, or if there is no memory to call them.
template <class Pool, class Work>
void for_rows(Pool& pool, int64_t num_rows, int64_t num_classes, Work work) {
  int64_t size = std::max<int64_t>(kPart / num_classes, 1);
  if (size > kRowsAtOnce) size -= size % kRowsAtOnce;
  const int64_t parts = (num_rows + size - 1) / size;
  if (parts <= 1) return work(0, num_rows);

  struct Progress {
    std::atomic<int64_t> next{0}, left;
    std::mutex mutex;
    std::condition_variable finished;

    explicit Progress(int64_t parts) : left(parts) {}
  };
  const auto run = [=](Progress& progress) {
    for (int64_t part; (part = progress.next.fetch_add(1)) < parts;) {
      work(part * size, std::min((part + 1) * size, num_rows));
      if (progress.left.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(progress.mutex);
        progress.finished.notify_one();
      }
    }
  };
  std::shared_ptr<Progress> progress;  // shared: other threads may start after everything is done
  try {
    progress = std::make_shared<Progress>(parts);
    const int64_t helpers = std::min(parts, pool.num_threads()) - 1;
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([=] { run(*progress); });
  } catch (const std::bad_alloc&) {
    if (progress == nullptr) return work(0, num_rows);
  }
  run(*progress);
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->finished.wait(lock, [&] { return progress->left == 0; });
}

}  // namespace jax_sce

#endif  // JAX_SCE_FOR_ROWS_H_
