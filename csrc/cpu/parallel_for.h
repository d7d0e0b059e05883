// A loop over independent tasks on XLA's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "params.h"

namespace flashmla::cpu {

// How many workers a loop over `num_tasks` tasks can have, the calling thread included.
inline int64_t NumWorkers(const ThreadPool& pool, int64_t num_tasks) {
  return std::max<int64_t>(1, std::min(pool.num_threads, num_tasks));
}

// Calls task(worker, index) once for every index in [0, num_tasks), in no particular order, and
// returns when all calls have. Indices are handed out in ascending order; `worker` is below
// NumWorkers(pool, num_tasks), and no two calls that run at the same time share one.
//
// The caller may itself be a thread of the pool, and all the others may be busy for as long as they
// like. So it works too, and then waits only for tasks that another thread has already begun: a
// helper that the pool starts late finds no task left and leaves, without touching `task`, which
// may be gone by then.
template <typename Task>
void ParallelFor(const ThreadPool& pool, int64_t num_tasks, const Task& task) {
  const int64_t workers = NumWorkers(pool, num_tasks);
  if (workers == 1) {
    for (int64_t index = 0; index < num_tasks; ++index) task(0, index);
    return;
  }

  struct Loop {
    const Task* task;
    int64_t num_tasks;
    std::fenv_t environment;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> finished{0};
    std::mutex mutex;
    std::condition_variable all_finished;

    void Work(int64_t worker) {
      for (int64_t index; (index = next.fetch_add(1)) < num_tasks;) {
        (*task)(worker, index);
        if (finished.fetch_add(1) + 1 == num_tasks) {
          const std::lock_guard lock(mutex);
          all_finished.notify_one();
        }
      }
    }
  };
  const auto loop = std::make_shared<Loop>();
  loop->task = &task;
  loop->num_tasks = num_tasks;
  // Rounding, and on most processors the flushing of subnormals, belong to the thread; which thread
  // runs a task must not show in its result.
  std::fegetenv(&loop->environment);
  for (int64_t worker = 1; worker < workers; ++worker) {
    pool.schedule([loop, worker] {
      if (loop->next.load() >= loop->num_tasks) return;
      std::fenv_t own;
      std::fegetenv(&own);
      std::fesetenv(&loop->environment);
      loop->Work(worker);
      std::fesetenv(&own);
    });
  }
  loop->Work(0);
  std::unique_lock lock(loop->mutex);
  loop->all_finished.wait(lock, [&] { return loop->finished.load() == num_tasks; });
}

}  // namespace flashmla::cpu
