// int8 embedding: check -> choose the ISA's kernel -> spread the rows over threads.
#include "int8_embedding.h"

#include "../common/check.h"
#include "../common/parallel.h"
#include "isa.h"

namespace lissom {
namespace {

#if defined(LISSOM_X86)
constexpr Int8EmbeddingKernel kTable[kIsaCount] = {int8_embedding_scalar, int8_embedding_avx2,
                                                   int8_embedding_avx512vnni};
#else
constexpr Int8EmbeddingKernel kTable[kIsaCount] = {int8_embedding_scalar, nullptr, nullptr};
#endif

// Elements that one task gathers; below two of them a second thread costs more than it brings.
constexpr int64_t kTaskElements = 64 << 10;

}  // namespace

int64_t int8_embedding(const Int8EmbeddingArgs& args, int threads) {
  LISSOM_CHECK(args.count >= 0 && args.rows >= 0 && args.width >= 0, "int8_embedding: negative size");
  LISSOM_CHECK(threads >= 1, "int8_embedding: threads=", threads, " must be at least 1");
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t index = args.wide_indices ? static_cast<const int64_t*>(args.indices)[i]
                                            : static_cast<const int32_t*>(args.indices)[i];
    if (index < 0 || index >= args.rows) return i;
  }
  const Int8EmbeddingKernel kernel = kTable[static_cast<int>(active_isa())];
  const int64_t per_task = kTaskElements / (args.width + 1) + 1;
  const int64_t count = ceil_div(args.count, per_task);
  TaskQueue tasks(count);
  run_team(count > 1 ? threads : 1, [&](Team) {
    for (int64_t task = tasks.take(); task >= 0; task = tasks.take()) {
      const int64_t begin = task * per_task, end = begin + per_task;
      kernel(args, begin, end < args.count ? end : args.count);
    }
  });
  return -1;
}

}  // namespace lissom
