#include "parallel.h"

#include <pthread.h>

namespace lissom {
namespace {

std::atomic<bool> pool_started{false};
std::atomic<bool> pool_lost{false};

void after_fork_in_child() {
  if (pool_started.load()) pool_lost.store(true);
}

}  // namespace

bool pool_usable() { return !pool_lost.load(std::memory_order_relaxed); }

void note_pool_used() {
  if (pool_started.load(std::memory_order_relaxed)) return;
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
  (void)registered;
  pool_started.store(true);
}

}  // namespace lissom
