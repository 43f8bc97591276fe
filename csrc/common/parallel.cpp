#include "parallel.h"

#include <dirent.h>
#include <pthread.h>

namespace lissom {
namespace {

std::atomic<bool> pool_lost{false};
bool several_threads = false;  // at the time of the fork

// Whether this process has more than one thread; true where that cannot be told.
bool has_several_threads() {
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return true;
  int count = 0;
  while (const dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
  closedir(tasks);
  return count > 1;
}

void before_fork() { several_threads = has_several_threads(); }
void after_fork_in_child() {
  if (several_threads) pool_lost.store(true);
}

}  // namespace

void watch_forks() {
  static const int registered = pthread_atfork(before_fork, nullptr, after_fork_in_child);
  (void)registered;
}

bool pool_usable() { return !pool_lost.load(std::memory_order_relaxed); }

}  // namespace lissom
