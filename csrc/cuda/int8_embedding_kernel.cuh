// A thread writes 16 bytes at a time: neighbouring threads write neighbouring bytes, and read them.
#pragma once

#include "device.cuh"
#include "int8_embedding.h"

namespace lissom::cuda {

template <typename T>
struct EmbeddingStep {
  static constexpr int kValues = 16 / sizeof(T);  // 4 or 8 values: 4 or 8 bytes of the table
};

template <typename T>
__device__ __forceinline__ T scaled(int8_t q, float scale) {
  return from_float<T>(__fmul_rn(static_cast<float>(q), scale));
}

// Block (x, y): y look-ups at a time, x threads for each. kVector: everything lies on the boundaries of
// steps.
template <typename T, bool kVector>
__global__ void __launch_bounds__(256) int8_embedding_kernel(Int8Embedding args) {
  constexpr int kValues = kVector ? EmbeddingStep<T>::kValues : 1;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (i >= args.count) return;
  const int64_t index = args.wide_indices ? static_cast<const int64_t*>(args.indices)[i]
                                          : static_cast<const int32_t*>(args.indices)[i];
  const bool valid = index >= 0 && index < args.rows;
  const float scale = valid ? args.scale[index] : __int_as_float(0x7fc00000);
  const int8_t* row = args.table + (valid ? index : 0) * args.row_stride;
  T* y = static_cast<T*>(args.y) + i * args.width;
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * kValues; at < args.width;
       at += blockDim.x * kValues) {
    alignas(16) int8_t q[kValues] = {};
    alignas(16) T out[kValues];
    if (valid) {
      if (kVector && kValues == 4) {
        *reinterpret_cast<uint32_t*>(q) = *reinterpret_cast<const uint32_t*>(row + at);
      } else if (kVector) {
        *reinterpret_cast<uint2*>(q) = *reinterpret_cast<const uint2*>(row + at);
      } else {
        q[0] = row[at];
      }
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) out[j] = scaled<T>(q[j], scale);
    if (kVector) {
      *reinterpret_cast<uint4*>(y + at) = *reinterpret_cast<const uint4*>(out);
    } else {
      y[at] = out[0];
    }
  }
}

}  // namespace lissom::cuda
