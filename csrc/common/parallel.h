// The one place that knows OpenMP. Kernels are plain functions over ranges; these helpers spread them.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <cstdint>

namespace lissom {

// False in a process that was forked from one with several threads: an OpenMP pool (ours, or torch's, which
// is the same) does not survive a fork, and waiting for it would hang. Such a child computes on the calling
// thread.
bool pool_usable();

// Called once, when the extension is loaded, so that forks are noticed.
void watch_forks();

// The threads that run a body together.
class Team {
 public:
  explicit Team(bool several) : several_(several) {}

  // All threads wait here for each other; a team of one passes.
  void barrier() const {
#ifdef _OPENMP
    if (several_) {
#pragma omp barrier
    }
#endif
  }

 private:
  bool several_;
};

// Calls body(team) once on each thread of a team. A team is either 1 or all that the caller asked for:
// changing its size makes libgomp end and start threads. Work is handed out by TaskQueue.
template <typename Body>
void run_team(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && pool_usable() && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    body(Team(true));
    return;
  }
#endif
  body(Team(false));
}

// Hands out 0 … count-1, one at a time, to whichever thread is free: cores are shared and uneven.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}

  // The next task, or -1 when all are taken.
  int64_t take() {
    const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_ ? task : -1;
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  int64_t count_;
};

}  // namespace lissom
