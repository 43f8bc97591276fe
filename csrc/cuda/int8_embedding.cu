// int8 embedding: check -> choose -> launch.
#include "int8_embedding.h"

#include "int8_embedding_kernel.cuh"

namespace lissom::cuda {
namespace {

constexpr const char* kOp = "int8_embedding";

void check(const Int8Embedding& args) {
  LISSOM_CHECK(args.count >= 0 && args.rows >= 0 && args.width >= 0, kOp, ": negative size");
  LISSOM_CHECK(args.row_stride >= args.width || args.rows <= 1, kOp, ": row_stride=", args.row_stride,
               " is less than a row of ", args.width);
}

// 256 threads: shared out to as many look-ups as have few enough steps. Not measured yet: one thread for each
// step of a row up to a warp's, then whole warps, and a step is 16 bytes of output.
dim3 choose_block(int64_t steps) {
  unsigned threads = 1;
  while (threads < 256 && threads < steps) threads *= 2;
  return dim3(threads, 256 / threads);
}

template <typename T>
void run(const Int8Embedding& args, Stream stream) {
  constexpr int kValues = EmbeddingStep<T>::kValues;
  const uintptr_t table = reinterpret_cast<uintptr_t>(args.table), y = reinterpret_cast<uintptr_t>(args.y);
  const bool vector =
      args.width % kValues == 0 && args.row_stride % kValues == 0 && table % kValues == 0 && y % 16 == 0;
  const dim3 block = choose_block(vector ? args.width / kValues : args.width);
  const dim3 grid = grid_size(kOp, ceil_div(args.count, block.y));
  launch({kOp, grid, block, stream},
         vector ? int8_embedding_kernel<T, true> : int8_embedding_kernel<T, false>, args);
}

}  // namespace

void int8_embedding(const Int8Embedding& args, Stream stream) {
  check(args);
  if (args.count == 0 || args.width == 0) return;
  switch (args.y_type) {
    case DType::kFloat32: return run<float>(args, stream);
    case DType::kBFloat16: return run<BFloat16>(args, stream);
    case DType::kFloat16: return run<Float16>(args, stream);
  }
}

}  // namespace lissom::cuda
