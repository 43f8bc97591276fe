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

  // This thread's number, from 0 on.
  int thread() const {
#ifdef _OPENMP
    if (several_) return omp_get_thread_num();
#endif
    return 0;
  }

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

// Hands out 0 … count-1, one at a time. Each thread has a range of its own, the same in every call with the
// same sizes, so that weights and outputs stay in its caches; when that is done it helps with the others':
// cores are shared and uneven. (Two cores of a virtual machine need not share a cache: a line was seen to
// take 0.2 us from one to the other.)
class TaskQueue {
 public:
  TaskQueue(int64_t count, int threads) : count_(count), ranges_(threads < kMost ? threads : kMost) {}

  // The next task for this thread, or -1 when all are taken.
  int64_t take(const Team& team) {
    const int own = team.thread() % ranges_;
    for (int i = 0; i < ranges_; ++i) {
      const int range = (own + i) % ranges_;
      const int64_t task = begin(range) + next_[range].taken.fetch_add(1, std::memory_order_relaxed);
      if (task < begin(range + 1)) return task;
    }
    return -1;
  }

 private:
  static constexpr int kMost = 32;
  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0};
  };

  int64_t begin(int range) const { return count_ / ranges_ * range + count_ % ranges_ * range / ranges_; }

  Counter next_[kMost];
  int64_t count_;
  int ranges_;
};

}  // namespace lissom
