// Two passes over a row: its largest magnitude, then its codes. A chunk is 16 columns, one thread's: what a
// rotation mixes, and 16 bytes of codes. Rows of up to one chunk a thread stay in registers in between.
//
// Every operation names its rounding: the compiler fuses none of them, and bits agree with all other
// backends.
#pragma once

#include "device.cuh"
#include "quantize_rows.h"

namespace lissom::cuda {

constexpr int kChunk = 16;
constexpr int kMaxThreadsPerRow = 1024;
constexpr int kInfinity = 0x7f800000;

// Sylvester's butterflies in the order of formats.rotate.
__device__ __forceinline__ void rotate_chunk(float (&v)[kChunk]) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) v[j] = __fmul_rn(v[j], 0.0625f);
#pragma unroll
  for (int distance = 1; distance < kChunk; distance *= 2) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j & distance) continue;
      const float a = v[j], b = v[j + distance];
      v[j] = __fadd_rn(a, b);
      v[j + distance] = __fsub_rn(a, b);
    }
  }
}

// Columns at … at + 15 as floats, zeros past k. kVector: rows lie on multiples of 16 bytes.
template <typename T, bool kRotate, bool kVector>
__device__ __forceinline__ void load_chunk(float (&v)[kChunk], const T* row, int64_t at, int64_t k) {
  constexpr int kValues = 16 / sizeof(T);
  if (at + kChunk <= k) {
    if (kVector) {
#pragma unroll
      for (int i = 0; i < kChunk / kValues; ++i) {
        const uint4 four = *reinterpret_cast<const uint4*>(row + at + i * kValues);
        const T* values = reinterpret_cast<const T*>(&four);
#pragma unroll
        for (int j = 0; j < kValues; ++j) v[i * kValues + j] = to_float(values[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[j] = to_float(row[at + j]);
    }
    if (kRotate) rotate_chunk(v);
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[j] = at + j < k ? to_float(row[at + j]) : 0.0f;
  }
}

// Bits of the largest magnitude: as integers, so that NaN is the largest of all.
__device__ __forceinline__ int largest(const float (&v)[kChunk], int so_far) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) so_far = max(so_far, __float_as_int(v[j]) & 0x7fffffff);
  return so_far;
}

// Over the threads of a row: blockDim.x of them, whole warps.
__device__ __forceinline__ int largest_of_row(int mine) {
  mine = warp_max(mine);
  if (blockDim.x == kWarp) return mine;
  LISSOM_SHARED(int, partial, [kMaxThreadsPerRow / kWarp]);  // one row a block then
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = mine;
  __syncthreads();
  mine = threadIdx.x % kWarp < blockDim.x / kWarp ? partial[threadIdx.x % kWarp] : 0;
  return warp_max(mine);
}

__device__ __forceinline__ uint4 codes(const float (&v)[kChunk], float inverse, bool clamp) {
  uint32_t word[4] = {};
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    float scaled = __fmul_rn(v[j], inverse);
    if (clamp) scaled = fminf(127.0f, fmaxf(-127.0f, scaled));
    word[j / 4] |= (static_cast<uint32_t>(__float2int_rn(scaled)) & 255u) << 8 * (j % 4);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// What a row's values are multiplied by, and the row's scale, from the bits of its largest magnitude. A row
// that is not finite has scale NaN.
struct RowRates {
  float inverse, scale;
  bool finite;
};
__device__ __forceinline__ RowRates row_rates(int magnitude, const float* input_scale) {
  const float absmax = __int_as_float(magnitude);
  const bool fixed = input_scale != nullptr, finite = magnitude < kInfinity;
  float scale = fixed ? *input_scale : __fdiv_rn(absmax, 127.0f);
  float inverse = fixed ? __fdiv_rn(1.0f, scale) : __fdiv_rn(127.0f, absmax);
  if (!fixed && __float_as_int(inverse) >= kInfinity) scale = inverse = 0.0f;  // (nearly) all zero
  return {inverse, finite ? scale : __int_as_float(0x7fc00000), finite};
}

// Block (x, y): y rows of x threads. kHeld: a row has at most one chunk for each of its threads.
template <typename T, bool kRotate, bool kVector, bool kHeld>
__global__ void __launch_bounds__(kMaxThreadsPerRow, 1) quantize_rows_kernel(QuantizeRows args) {
  wait_for_previous_grid();
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t rows = static_cast<int64_t>(gridDim.x) * blockDim.y;
  if (threadIdx.x == 0) {
    for (int64_t i = mine; i < args.counter_count; i += rows) args.counters[i] = 0;
  }
  const bool stores = mine < args.m;
  const T* row =
      static_cast<const T*>(args.x) + (stores ? mine : 0) * args.x_stride;  // all threads meet below
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kChunk,
                step = static_cast<int64_t>(blockDim.x) * kChunk;

  float v[kChunk];
  int magnitude = 0;
  for (int64_t at = first; at < args.k || (kHeld && at == first); at += step) {
    load_chunk<T, kRotate, kVector>(v, row, at, args.k);
    magnitude = largest(v, magnitude);
  }
  magnitude = largest_of_row(magnitude);
  if (!stores) return;

  const RowRates rates = row_rates(magnitude, args.input_scale);
  if (threadIdx.x == 0) args.scale[mine] = rates.scale;

  for (int64_t at = first; at < args.q_stride; at += step) {
    if (!kHeld) load_chunk<T, kRotate, kVector>(v, row, at, args.k);
    *reinterpret_cast<uint4*>(args.q + mine * args.q_stride + at) =
        rates.finite ? codes(v, rates.inverse, args.input_scale != nullptr) : make_uint4(0, 0, 0, 0);
  }
}

}  // namespace lissom::cuda
