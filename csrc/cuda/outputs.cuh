// From sums to outputs of linear layers, the same sequence of float operations in every form
// (reference/int8_linear.py):
//   y = act( fma( float(sum), x_scale * weight_scale, bias ) ), rounded once to y's type.
// Sums of floating point have no scales: 1, with which the fma is an addition.
#pragma once

#include <type_traits>

#include "activation.cuh"

namespace lissom::cuda {

struct Outputs {
  const float* x_scale;       // [m]; null: 1, of activations that are not quantized
  const float* weight_scale;  // [n]; null: 1
  const void* bias;           // [n] of bias_type, or null
  DType bias_type;
  Activation activation;
  void* y;  // [m, n]
  DType y_type;
  int64_t m, n;
  bool vector;  // four neighbouring outputs, the first a multiple of four, can be stored at once
};

// From an op's arguments. Columns that are finished together start and end at multiples of `step`, or at n.
template <typename Args>
Outputs outputs_of(const Args& args, const float* x_scale, const float* weight_scale, DType y_type,
                   int64_t step) {
  const bool vector = args.n % 4 == 0 && step % 4 == 0 && reinterpret_cast<uintptr_t>(args.y) % 16 == 0;
  return {x_scale, weight_scale, args.bias, args.bias_type, args.activation,
          args.y,  y_type,       args.m,    args.n,         vector};
}

// What four neighbouring columns need; those from `end` on, which is at most n, are somebody else's.
struct FourColumns {
  int64_t first, end;
  float scale[4], offset[4];
};

template <typename T>
__device__ __forceinline__ void load_four(const T* values, int64_t first, int64_t end, float (&v)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = first + j < end ? to_float(values[first + j]) : 0.0f;
}

// Choices, which are the same for the whole grid, stand outside of the loops: the loads of a loop are on
// their way together. One by one, each with a choice of its own, they and what followed took
// block_sparse_linear more time on an H200 than its products, where 80 % were left out.
__device__ __forceinline__ FourColumns load_columns(const Outputs& o, int64_t first, int64_t end) {
  FourColumns c = {first, end, {1.0f, 1.0f, 1.0f, 1.0f}, {}};
  if (o.weight_scale != nullptr) load_four(o.weight_scale, first, end, c.scale);
  if (o.bias == nullptr) return c;
  switch (o.bias_type) {
    case DType::kBFloat16: load_four(static_cast<const BFloat16*>(o.bias), first, end, c.offset); break;
    case DType::kFloat16: load_four(static_cast<const Float16*>(o.bias), first, end, c.offset); break;
    default: load_four(static_cast<const float*>(o.bias), first, end, c.offset); break;
  }
  return c;
}

// On their way to L2 long before they are needed: those of column `first`, and of its neighbours in 32 bytes.
// For kernels that end sooner than memory answers twice.
__device__ __forceinline__ void prefetch_columns(const Outputs& o, int64_t first) {
  const int bytes = o.bias_type == DType::kFloat32 ? 4 : 2;
  if (o.weight_scale != nullptr) prefetch_sector(o.weight_scale + first);
  if (o.bias != nullptr) prefetch_sector(static_cast<const unsigned char*>(o.bias) + first * bytes);
}

__device__ __forceinline__ float as_float(int32_t sum) { return __int2float_rn(sum); }
__device__ __forceinline__ float as_float(float sum) { return sum; }

// Neighbouring sums in memory, 16 or 8 bytes at a time.
__device__ __forceinline__ int4 make_four(const int32_t (&v)[4]) { return make_int4(v[0], v[1], v[2], v[3]); }
__device__ __forceinline__ float4 make_four(const float (&v)[4]) {
  return make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ int2 make_two(int32_t a, int32_t b) { return make_int2(a, b); }
__device__ __forceinline__ float2 make_two(float a, float b) { return make_float2(a, b); }
template <typename Sum>
using Four = decltype(make_four(*static_cast<const Sum (*)[4]>(nullptr)));
template <typename Sum>
using Two = decltype(make_two(Sum(), Sum()));

// kActivate: false where there is no activation function to apply, true always.
template <bool kActivate, typename Sum>
__device__ __forceinline__ void compute_four(const Outputs& o, const FourColumns& c, float x_scale,
                                             const Sum (&sum)[4], float (&v)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    v[j] = __fmaf_rn(as_float(sum[j]), __fmul_rn(x_scale, c.scale[j]), c.offset[j]);
    if (kActivate) v[j] = activate(o.activation, v[j]);
  }
}

// act(y's type, whether there is an activation function): the choices of the whole grid, made outside of
// loops.
template <typename Act>
__device__ __forceinline__ void for_outputs(const Outputs& o, const Act& act) {
  const auto as = [&](auto type) {
    o.activation == Activation::kNone ? act(type, std::false_type()) : act(type, std::true_type());
  };
  switch (o.y_type) {
    case DType::kBFloat16: return as(BFloat16());
    case DType::kFloat16: return as(Float16());
    default: return as(0.0f);
  }
}

// y: where the first of the four columns is.
template <typename T>
__device__ __forceinline__ void store_four(const Outputs& o, T* y, const FourColumns& c,
                                           const float (&v)[4]) {
  if (!o.vector) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (c.first + j < c.end) y[j] = from_float<T>(v[j]);
    }
  } else if (c.first < c.end) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(y) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
      *reinterpret_cast<uint2*>(y) = make_uint2(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]));
    }
  }
}

// One row's sums in four columns.
template <typename Sum>
__device__ __forceinline__ void finish_four(const Outputs& o, const FourColumns& c, int64_t row,
                                            float x_scale, const Sum (&sum)[4]) {
  float v[4];
  if (o.activation == Activation::kNone) {
    compute_four<false>(o, c, x_scale, sum, v);
  } else {
    compute_four<true>(o, c, x_scale, sum, v);
  }
  const int64_t at = row * o.n + c.first;
  switch (o.y_type) {  // the same for the whole grid
    case DType::kBFloat16: return store_four(o, static_cast<BFloat16*>(o.y) + at, c, v);
    case DType::kFloat16: return store_four(o, static_cast<Float16*>(o.y) + at, c, v);
    default: return store_four(o, static_cast<float*>(o.y) + at, c, v);
  }
}

// ---- 16 rows of a warp's fragments, through shared memory: whole sectors are stored, and what finishes them
// stands in a loop, once for all fragments
// ----------------------------------------------------------------------------------------------

// Element (row, column) of a scratch of 16 rows of 32 or 64 words: rows swap groups of 8 columns, so that
// neither the pairs that lanes of 4 rows write nor the fours that lanes of a row read meet in a bank.
LISSOM_HD constexpr int scratch_at(int width, int row, int column) {
  return row * width + (column ^ (row & 3) << 3);
}

// Whether what lanes access together (`bytes` from at(lane) on each) lies in different banks of shared
// memory.
template <typename At>
constexpr bool in_different_banks(int lanes, int bytes, At at) {
  uint32_t used = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    for (int word = 0; word < bytes / 4; ++word) {
      const uint32_t bank = uint32_t{1} << (at(lane) / 4 + word) % 32;
      if (used & bank) return false;
      used |= bank;
    }
  }
  return true;
}
static_assert(in_different_banks(16, 8,
                                 [](int lane) { return 4 * scratch_at(64, lane / 4, lane % 4 * 2); }) &&
                  in_different_banks(16, 8,
                                     [](int lane) { return 4 * scratch_at(32, lane / 4, lane % 4 * 2); }),
              "pairs are written 16 lanes at a time");
static_assert(in_different_banks(8, 16, [](int lane) { return 4 * scratch_at(64, 1, lane * 4); }) &&
                  in_different_banks(8, 16, [](int lane) { return 4 * scratch_at(32, 3, lane * 4); }),
              "fours are read 8 lanes at a time");

// sum(j, e): element e of the D fragment (device.cuh) of columns 8j …, for kBlocks of them.
template <int kBlocks, typename Sum, typename Get>
__device__ __forceinline__ void write_scratch(Sum* scratch, Get sum) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Sum* at = scratch + scratch_at(8 * kBlocks, g + 8 * half, 8 * j + 2 * t);
      *reinterpret_cast<Two<Sum>*>(at) = make_two(sum(j, 2 * half), sum(j, 2 * half + 1));
    }
  }
}

// The scale of row `first` + lane, for lanes 0 … 15, as finish_scratch wants it.
__device__ __forceinline__ float lane_scale(const Outputs& o, int64_t first) {
  const int64_t row = first + threadIdx.x % 16;
  return o.x_scale == nullptr ? 1.0f : row < o.m ? o.x_scale[row] : 0.0f;
}

template <typename T, int kBlocks, bool kActivate, typename Sum>
__device__ __forceinline__ void finish_scratch_as(const Outputs& o, const Sum* scratch, int64_t first_row,
                                                  int64_t first_column, int64_t end, float lane_scale) {
  constexpr int kWidth = 8 * kBlocks, kLanes = kWidth / 4, kRows = kWarp / kLanes;  // at a time
  static_assert(kWidth == 32 || kWidth == 64, "what scratch_at is made for");
  const int lane = static_cast<int>(threadIdx.x) % kWarp, across = lane % kLanes * 4;
  const FourColumns columns = load_columns(o, first_column + across, end);
  const int64_t left = o.m - first_row;
  T* y = static_cast<T*>(o.y) + (first_row + lane / kLanes) * o.n + columns.first;
#pragma unroll(kActivate ? 1 : 4)
  for (int i = 0; i < 16 / kRows; ++i, y += kRows * o.n) {
    const int row = i * kRows + lane / kLanes;
    const float x_scale = __shfl_sync(kAllLanes, lane_scale, row);
    const auto sum = *reinterpret_cast<const Four<Sum>*>(scratch + scratch_at(kWidth, row, across));
    const Sum four[4] = {sum.x, sum.y, sum.z, sum.w};
    float v[4];
    compute_four<kActivate>(o, columns, x_scale, four, v);
    if (row < left) store_four(o, y, columns, v);
  }
}

// Outputs of the 16 rows from first_row on, 8 * kBlocks columns of them, if they lie before `end`.
template <int kBlocks, typename Sum>
__device__ __forceinline__ void finish_scratch(const Outputs& o, const Sum* scratch, int64_t first_row,
                                               int64_t first_column, int64_t end, float lane_scale) {
  for_outputs(o, [&](auto type, auto activate) {
    finish_scratch_as<decltype(type), kBlocks, activate>(o, scratch, first_row, first_column, end,
                                                         lane_scale);
  });
}

}  // namespace lissom::cuda
