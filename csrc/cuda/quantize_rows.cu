// Quantizing rows: check -> choose -> launch.
#include "quantize_rows.h"

#include "quantize_rows_kernel.cuh"

namespace lissom::cuda {
namespace {

constexpr const char* kOp = "quantize_rows";

void check(const QuantizeRows& args) {
  LISSOM_CHECK(args.m >= 0 && args.k >= 0, kOp, ": negative size");
  LISSOM_CHECK(args.x_stride >= args.k || args.m <= 1, kOp, ": x_stride=", args.x_stride,
               " is less than k=", args.k);
  LISSOM_CHECK(args.q_stride >= args.k && args.q_stride % kChunk == 0, kOp, ": q_stride=", args.q_stride,
               " must be a multiple of ", kChunk, " and at least k=", args.k);
  LISSOM_CHECK(reinterpret_cast<uintptr_t>(args.q) % 16 == 0, kOp, ": q must lie on a multiple of 16 bytes");
}

// Not measured yet. A row's chunks get a thread each, in whole warps: one read of x. Rows of a warp come four
// to a block, so that a multiprocessor's block limit leaves it full.
dim3 choose_block(int64_t chunks) {
  unsigned threads = kWarp;
  while (threads < kMaxThreadsPerRow && threads < chunks) threads *= 2;
  return threads == kWarp ? dim3(threads, 4) : dim3(threads, 1);
}

template <typename T, bool kRotate, bool kVector>
void run(const QuantizeRows& args, Stream stream) {
  const int64_t chunks = args.q_stride / kChunk;
  const dim3 block = choose_block(chunks);
  const dim3 grid = grid_size(kOp, ceil_div(args.m, block.y));
  launch({kOp, grid, block, stream, 0, 0, true},
         chunks <= block.x ? quantize_rows_kernel<T, kRotate, kVector, true>
                           : quantize_rows_kernel<T, kRotate, kVector, false>,
         args);
}

template <typename T>
void run_typed(const QuantizeRows& args, Stream stream) {
  const bool vector = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.x_stride * sizeof(T) % 16 == 0;
  if (args.rotated) return vector ? run<T, true, true>(args, stream) : run<T, true, false>(args, stream);
  return vector ? run<T, false, true>(args, stream) : run<T, false, false>(args, stream);
}

}  // namespace

void quantize_rows(const QuantizeRows& args, Stream stream) {
  check(args);
  if (args.m == 0) return;
  switch (args.x_type) {
    case DType::kFloat32: return run_typed<float>(args, stream);
    case DType::kBFloat16: return run_typed<BFloat16>(args, stream);
    case DType::kFloat16: return run_typed<Float16>(args, stream);
  }
}

}  // namespace lissom::cuda
