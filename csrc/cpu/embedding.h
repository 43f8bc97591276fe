// What the embedding ops share: checking indices and spreading the look-ups over threads.
#pragma once

#include <cstdint>

#include "../common/check.h"
#include "../common/formats.h"
#include "../common/parallel.h"

namespace lissom {

// Elements that one task gathers; below two of them a second thread costs more than it brings.
constexpr int64_t kGatherTask = 64 << 10;

template <typename Args>
inline int64_t index_at(const Args& args, int64_t i) {
  return args.wide_indices ? static_cast<const int64_t*>(args.indices)[i]
                           : static_cast<const int32_t*>(args.indices)[i];
}

// kernel(args, begin, end) for all of args.count look-ups. Returns -1, or the position of the first index out
// of range, in which case nothing is written.
template <typename Args>
int64_t run_embedding(const char* op, void (*kernel)(const Args&, int64_t, int64_t), const Args& args,
                      int threads) {
  LISSOM_CHECK(args.count >= 0 && args.rows >= 0 && args.width >= 0, op, ": negative size");
  LISSOM_CHECK(threads >= 1, op, ": threads=", threads, " must be at least 1");
  for (int64_t i = 0; i < args.count; ++i) {
    if (index_at(args, i) < 0 || index_at(args, i) >= args.rows) return i;
  }
  const int64_t per_task = kGatherTask / (args.width + 1) + 1;
  const int64_t count = ceil_div(args.count, per_task);
  TaskQueue tasks(count, count > 1 ? threads : 1);
  run_team(count > 1 ? threads : 1, [&](Team team) {
    for (int64_t task = tasks.take(team); task >= 0; task = tasks.take(team)) {
      const int64_t begin = task * per_task, end = begin + per_task;
      kernel(args, begin, end < args.count ? end : args.count);
    }
  });
  return -1;
}

}  // namespace lissom
