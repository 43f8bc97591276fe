// Tensor cores by mma.sync, two forms: a few rows, bound by the weight's bytes, and tiles of the output.
//
// Both multiply what a lane loaded as 16 neighbouring bytes. mma wants of lane (g, t) = (lane / 4, lane % 4)
// of the weight's row g the columns 4t … and 16 + 4t …; but a sum over K has no order, so that the lane may
// take any columns as long as it takes the same ones of both operands:
//
//   64 columns of K, row g   | t = 0: 16 bytes | t = 1: 16 bytes | t = 2 | t = 3 |
//   int8 x                     two mma of 32 columns: bytes 0-7 and 8-15 of every lane
//   16-bit x                   four of 16: bytes 0-3, 4-7, 8-11, 12-15, widened to x's type (exact)
//
// One 16-byte load then is a fragment: no ldmatrix, and in shared memory no conflicts between banks, since
// the 8 lanes that are served together read two rows of 64 bytes. Sums of int8 are exact, so their bits do
// not depend on the order; sums of floats are added in an order that is the same in every run.
#pragma once

#include "outputs.cuh"
#include "quantize_rows_kernel.cuh"

namespace lissom::cuda {

constexpr int kUnit = 64;  // columns of K of one load

// ---- products
// --------------------------------------------------------------------------------------------

// Four int8 as two pairs of a 16-bit type, every value exact.
template <typename T>
__device__ void widen(uint32_t word, uint32_t (&pair)[2]);

template <>
__device__ __forceinline__ void widen<Float16>(uint32_t word, uint32_t (&pair)[2]) {
  // 0x6400 + b is 1024 + b; with the sign bit turned around b is the value + 128.
  const uint32_t offset = word ^ 0x80808080u;
  pair[0] = fma2<Float16>(__byte_perm(offset, 0x64646464u, 0x4140), 0x3c003c00u, 0xe480e480u);
  pair[1] = fma2<Float16>(__byte_perm(offset, 0x64646464u, 0x4342), 0x3c003c00u, 0xe480e480u);
}
template <>
__device__ __forceinline__ void widen<BFloat16>(uint32_t word, uint32_t (&pair)[2]) {
  // 0x4300 + the low 7 bits is 128 + them; the sign bit, where it is, makes -128 (0xc300) a -256 (0xc380).
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t bytes = __byte_perm(word, 0, i == 0 ? 0x4140 : 0x4342);
    pair[i] = fma2<BFloat16>(lop3<0xea>(bytes, 0x007f007fu, 0x43004300u), 0x3f803f80u,
                             lop3<0xea>(bytes, 0x00800080u, 0xc300c300u));
  }
}

template <typename X>
struct Multiply {
  static __device__ __forceinline__ void step(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16<X>(d, a, b);
  }
};
template <>
struct Multiply<int8_t> {
  static __device__ __forceinline__ void step(int32_t (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
    mma_m16n8k32(d, a, b);
  }
};

// The B fragments of the two steps that 16 bytes of x are good for: all 16 bytes of the weight, or, where x
// has 16 bits, the 8 bytes of its half.
template <typename X>
__device__ __forceinline__ void weight_fragments(const uint4& w, int half, uint32_t (&b)[2][2]) {
  if constexpr (sizeof(X) == 1) {
    b[0][0] = w.x, b[0][1] = w.y, b[1][0] = w.z, b[1][1] = w.w;
  } else {
    widen<X>(half == 0 ? w.x : w.z, b[0]);
    widen<X>(half == 0 ? w.y : w.w, b[1]);
  }
}

// Two steps: 16 bytes of row g and of row g + 8 of x.
template <typename X, typename Sum>
__device__ __forceinline__ void multiply(Sum (&d)[4], const uint4& low, const uint4& high,
                                         const uint32_t (&b)[2][2]) {
  const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
  Multiply<X>::step(d, first, b[0]);
  Multiply<X>::step(d, second, b[1]);
}

// ---- a few rows
// ---------------------------------------------------------------------------------------------

// A warp streams 8 rows of the weight past all rows of x, `slices` warps of a block share their K and add up
// through shared memory. The grid is persistent: a block takes x once, and then 8 outputs, or so, after the
// other. What counts is bytes under way: 8 loads of 16 bytes a lane are 4 KB a warp; they leave before the
// block looks at x, and each is followed by the next as soon as it was used, past the end of these outputs.
// Little's law asks for about 30 KB a multiprocessor (4.8 TB/s x 0.8 us / 132): 8 warps have them, and 16
// reside.
//
// Fused: the block finds the scales of the rows and quantizes what it needs of them into shared memory, in
// place of another launch, which would last about as long as the weight of a small layer.
constexpr int kRowsThreads = 256;
constexpr int kRowsWarps = kRowsThreads / kWarp;
constexpr int kRowsOutputs = 8;  // of a warp
constexpr int kRowsBatch = 8;    // units under way
constexpr int kRowsColumns = kRowsBatch * kUnit;
constexpr int kRowsSums = kRowsWarps * 16 * kRowsOutputs;  // of a block: [slice][group][16 rows][8 outputs]
constexpr int64_t kRowsMostColumns = 1 << 30;              // column numbers are int
constexpr int kRowsMost = 16;                              // rows of x
constexpr int kFusedRowsMost = 4;  // … that blocks quantize: by count 400 cycles each, a launch some 2 us
constexpr int kFloatRowsMost = 4;  // … of a block, where x is float32

struct RowsShape {
  int slices;   // 1, 2, 4 or 8: warps that share the K of 8 outputs
  int columns;  // of x in shared memory at a time, a multiple of slices * kRowsColumns
  int blocks;   // along x
};

// Rows of x in shared memory lie this many elements apart. The two rows that 8 lanes read from use different
// halves of the banks: 64 bytes of each row, or, of 16-bit elements, every other 16 bytes.
template <typename X>
LISSOM_HD constexpr int rows_pitch(int columns) {
  return columns + (sizeof(X) == 1 ? 64 : sizeof(X) == 2 ? 8 : 0);
}

static_assert(
    in_different_banks(8, 16, [](int lane) { return lane / 4 * rows_pitch<int8_t>(512) + lane % 4 * 16; }) &&
        in_different_banks(8, 16,
                           [](int lane) {
                             return 2 * (lane / 4 * rows_pitch<Float16>(512) + lane % 4 * 16);
                           }),
    "what 8 lanes read together");

// Sixteen columns of a row as floats, rotated; zeros from k on, which divides by sixteen. Rows lie on
// multiples of 16 bytes.
template <typename T>
__device__ __forceinline__ void load_sixteen(float (&v)[kChunk], const T* row, int at, int k, bool rotated) {
  if (at >= k) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[j] = 0.0f;
    return;
  }
  load_chunk<T, false, true>(v, row, at, at + kChunk);
  if (rotated) rotate_chunk(v);
}

// Rates of all rows of x, to shared memory.
template <typename Source>
__device__ __forceinline__ void find_rates(const Int8Linear& args, RowRates* rates) {
  LISSOM_SHARED(int, partial, [kFusedRowsMost][kRowsWarps]);
  const int thread = threadIdx.x, k = static_cast<int>(args.k);
  for (int row = 0; row < args.m; ++row) {
    const Source* from = static_cast<const Source*>(args.x) + row * args.x_stride;
    int magnitude = 0;
    for (int at = thread * kChunk; at < k; at += kRowsThreads * kChunk) {
      float v[kChunk];
      load_sixteen(v, from, at, k, args.rotated);
      magnitude = largest(v, magnitude);
    }
    magnitude = warp_max(magnitude);
    if (thread % kWarp == 0) partial[row][thread / kWarp] = magnitude;
  }
  __syncthreads();
  if (thread < args.m) {
    int magnitude = 0;
    for (int i = 0; i < kRowsWarps; ++i) magnitude = max(magnitude, partial[thread][i]);
    rates[thread] = row_rates(magnitude, args.input_scale);
  }
  __syncthreads();
}

// Columns first … first + count of x's rows into shared memory, zeros past k. count: a multiple of
// kRowsColumns.
template <typename X, typename Source>
__device__ __forceinline__ void stage_rows(X* staged, const Int8Linear& args, const RowsShape& shape,
                                           const RowRates* rates, int first, int count, int rows) {
  const int thread = threadIdx.x, pitch = rows_pitch<X>(shape.columns), k = static_cast<int>(args.k);
  if constexpr (sizeof(X) == 4) {
    // Where lane t reads its 16 floats as four times four, four lanes read neighbours: of every 64 columns,
    // the four fours of each lane are dealt out.
    for (int i = thread; i < rows * (count / 4); i += kRowsThreads) {
      const int row = i / (count / 4), four = i % (count / 4);
      const float* from =
          static_cast<const float*>(args.x) + (blockIdx.y * kFloatRowsMost + row) * args.x_stride;
      float4 v;
      const int at = first + 4 * four;
      v.x = at < k ? from[at] : 0.0f;
      v.y = at + 1 < k ? from[at + 1] : 0.0f;
      v.z = at + 2 < k ? from[at + 2] : 0.0f;
      v.w = at + 3 < k ? from[at + 3] : 0.0f;
      const int to = four / 16 * 16 + four % 4 * 4 + four / 4 % 4;
      *reinterpret_cast<float4*>(staged + row * pitch + 4 * to) = v;
    }
  } else if constexpr (sizeof(Source) == sizeof(X)) {
    constexpr int kValues = 16 / sizeof(X);
    for (int i = thread; i < rows * (count / kValues); i += kRowsThreads) {
      const int row = i / (count / kValues), at = i % (count / kValues) * kValues;
      const bool inside = first + at < k;
      const X* from = static_cast<const X*>(args.x) + row * args.x_stride;
      cp_async_16(staged + row * pitch + at, from + (inside ? first + at : 0), inside);
    }
    cp_async_commit();
    cp_async_wait<0>();
  } else {
    for (int row = 0; row < rows; ++row) {
      const Source* from = static_cast<const Source*>(args.x) + row * args.x_stride;
      const RowRates mine = rates[row];
      for (int at = thread * kChunk; at < count; at += kRowsThreads * kChunk) {
        float v[kChunk];
        load_sixteen(v, from, first + at, k, args.rotated);
        *reinterpret_cast<uint4*>(staged + row * pitch + at) =
            mine.finite ? codes(v, mine.inverse, args.input_scale != nullptr) : make_uint4(0, 0, 0, 0);
      }
    }
  }
}

// Sixteen int8 of the weight times as many floats of each row.
__device__ __forceinline__ void multiply_floats(float (&total)[4], const uint4& w, const float* staged,
                                                int pitch, int rows) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float weight[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) weight[j] = __int2float_rn(static_cast<int>(words[i] << (24 - 8 * j)) >> 24);
#pragma unroll
    for (int row = 0; row < kFloatRowsMost; ++row) {
      if (row >= rows) break;
      const float4 v = *reinterpret_cast<const float4*>(staged + row * pitch + 16 * i);
      total[row] = __fmaf_rn(v.x, weight[0], total[row]);
      total[row] = __fmaf_rn(v.y, weight[1], total[row]);
      total[row] = __fmaf_rn(v.z, weight[2], total[row]);
      total[row] = __fmaf_rn(v.w, weight[3], total[row]);
    }
  }
}

// X: what is multiplied (int8_t, BFloat16, Float16, float); Source: what args.x is. kHalves: rows of x in
// eights. Rows of the weight lie on multiples of 16 bytes; K is a multiple of 16, at most kRowsMostColumns.
template <typename X, typename Source, int kHalves>
__global__ void __launch_bounds__(kRowsThreads, 2)
    rows_kernel(Int8Linear args, Outputs outputs, RowsShape shape) {
  using Sum = SumOf<X>;
  constexpr bool kFused = sizeof(X) == 1 && sizeof(Source) > 1, kFloat = sizeof(X) == 4;
  Sum* all_sums = reinterpret_cast<Sum*>(dynamic_shared());  // twice, in turns
  X* staged = reinterpret_cast<X*>(all_sums + 2 * kRowsSums);
  LISSOM_SHARED(RowRates, rates, [kFusedRowsMost]);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int slice = warp % shape.slices, group = warp / shape.slices, groups = kRowsWarps / shape.slices;
  const int k = static_cast<int>(args.k), pitch = rows_pitch<X>(shape.columns);
  const int64_t outputs_at_a_time = groups * kRowsOutputs;
  const int64_t first_row = kFloat ? static_cast<int64_t>(blockIdx.y) * kFloatRowsMost : 0;
  const int rows = static_cast<int>(min(args.m - first_row, kFloat ? int64_t{kFloatRowsMost} : args.m));

  // Where the next batch of the weight is. Past the last output that one is read again: no lane goes astray,
  // and nothing of it is stored.
  int64_t next_output = blockIdx.x * outputs_at_a_time;
  int next_column = slice * kRowsColumns;
  const int8_t* from;
  int rest;  // bytes there are
  const auto advance = [&] {
    const int64_t output = min(next_output + group * kRowsOutputs + g, args.n - 1);
    from = args.weight + output * args.weight_stride + next_column + 16 * t;
    rest = next_output < args.n ? k - next_column - 16 * t : 0;
    next_column += shape.slices * kRowsColumns;
    if (next_column >= k) {
      next_column = slice * kRowsColumns;
      next_output += gridDim.x * outputs_at_a_time;
    }
  };
  uint4 w[kRowsBatch];
  const auto load = [&](int i) {
    w[i] = i * kUnit < rest ? load_stream(reinterpret_cast<const uint4*>(from + i * kUnit))
                            : make_uint4(0, 0, 0, 0);
  };
  if (const int64_t output = blockIdx.x * outputs_at_a_time + threadIdx.x;
      threadIdx.x < outputs_at_a_time && output < args.n) {
    prefetch_l2(args.weight + output * args.weight_stride, static_cast<uint32_t>(k));
  }
  if (const int64_t output = (blockIdx.x + int64_t{threadIdx.x} * gridDim.x) * outputs_at_a_time;
      output < args.n) {  // a thread for each of the block's turns
    prefetch_columns(outputs, output);
  }
  wait_for_previous_grid();
  advance();
#pragma unroll
  for (int i = 0; i < kRowsBatch; ++i) load(i);
  if constexpr (kFused) find_rates<Source>(args, rates);
  const auto stage = [&](int first) {
    const int rest = (k - first + kRowsColumns - 1) / kRowsColumns * kRowsColumns;
    stage_rows<X, Source>(staged, args, shape, rates, first, min(rest, shape.columns), rows);
    __syncthreads();
  };
  const bool whole = k <= shape.columns;
  if (whole) stage(0);

  int turn = 0;
  for (int64_t output = blockIdx.x * outputs_at_a_time; output < args.n;
       output += gridDim.x * outputs_at_a_time, turn ^= 1) {
    Sum total[4] = {};
    int column = slice * kRowsColumns;
    for (int first = 0; first < k; first += shape.columns) {
      if (!whole) {
        __syncthreads();  // the columns before were read
        stage(first);
      }
      for (; column < min(first + shape.columns, k); column += shape.slices * kRowsColumns) {
        const X* columns = staged + (column - first);
        advance();
#pragma unroll
        for (int i = 0; i < kRowsBatch; ++i) {
          if constexpr (kFloat) {
            multiply_floats(total, w[i], columns + i * kUnit + 4 * t, pitch, rows);
          } else {
            const X* low_row = columns + g * pitch + i * kUnit + 16 * t;
            const X* high_row = low_row + 8 * pitch;
#pragma unroll
            for (int half = 0; half < static_cast<int>(sizeof(X)); ++half) {
              uint4 low = make_uint4(0, 0, 0, 0), high = make_uint4(0, 0, 0, 0);
              if (g < rows) low = reinterpret_cast<const uint4*>(low_row)[half];
              if (kHalves == 2 && g + 8 < rows) high = reinterpret_cast<const uint4*>(high_row)[half];
              uint32_t b[2][2];
              weight_fragments<X>(w[i], half, b);
              multiply<X>(total, low, high, b);
            }
          }
          load(i);
        }
      }
    }

    // Threads finish four outputs of a row each; what they need for that is on its way while they meet, if
    // registers are left for it.
    constexpr bool kAhead = sizeof(X) > 1 || kHalves == 1;
    const int fours = groups * kRowsOutputs / 4;
    const int row = static_cast<int>(threadIdx.x) / fours, four = static_cast<int>(threadIdx.x) % fours;
    const bool finishes = row < rows;
    FourColumns columns;
    if (kAhead && finishes) columns = load_columns(outputs, output + 4 * four, outputs.n);

    Sum* sums = all_sums + turn * kRowsSums;
    Sum* mine = sums + (slice * groups + group) * (16 * kRowsOutputs);
    if constexpr (kFloat) {
#pragma unroll
      for (int r = 0; r < kFloatRowsMost; ++r) {
        Sum all = total[r];
        all += __shfl_xor_sync(kAllLanes, all, 1);
        all += __shfl_xor_sync(kAllLanes, all, 2);
        if (t == 0) mine[r * kRowsOutputs + g] = all;
      }
    } else {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        Sum* at = mine + (g + 8 * half) * kRowsOutputs + 2 * t;
        *reinterpret_cast<Two<Sum>*>(at) = make_two(total[2 * half], total[2 * half + 1]);
      }
    }
    __syncthreads();  // with the sums in turns, the only barrier: it also ends the reading of those before
    if (finishes) {
      if (!kAhead) columns = load_columns(outputs, output + 4 * four, outputs.n);
      Sum sum[4] = {};
      for (int s = 0; s < shape.slices; ++s) {
        const auto v = *reinterpret_cast<const Four<Sum>*>(
            sums + (s * groups + four / 2) * (16 * kRowsOutputs) + row * kRowsOutputs + four % 2 * 4);
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
      }
      const float x_scale = kFused                       ? rates[row].scale
                            : outputs.x_scale != nullptr ? outputs.x_scale[row]
                                                         : 1.0f;
      finish_four(outputs, columns, first_row + row, x_scale, sum);
    }
  }
}

// ---- tiles
// ------------------------------------------------------------------------------------------------

// Columns of K pass through shared memory 64 at a time, in stages by cp.async, of which all but one are under
// way while that one is multiplied; a barrier a stage. Large tiles have four stages; the smallest, for rows
// that cost little beside the weight's bytes, up to eight: 28 KB of the weight under way. The large tiles'
// warps compute 64 x 64 outputs: 8 KB read from shared memory (of 128 bytes a cycle) for 64 mma.m16n8k32,
// twice the cycles at sm_80's rate.
//
// Where tiles are too few for the GPU, K is split: blocks leave their sums in a workspace, and the last one
// to arrive at a tile adds all of them up, in order, and finishes.
constexpr int kTileGroup = 8;  // tile rows whose tiles follow each other: x and the weight meet again in L2

struct TileCall {
  const void* x;        // what is multiplied: [m, k] int8 or of a 16-bit type
  int64_t x_stride, k;  // elements; of int8 rows, k may go on with zeros up to the stride
  const int8_t* weight;
  int64_t weight_stride, weight_k;
  int64_t tiles_m, tiles_n;
  int splits;
  int64_t steps;  // of 64 columns, in each split
  void* partial;  // sums [tile][split][fragment][thread], 16 bytes each
  int* counters;  // [tile], 0 before and after
  Outputs outputs;
};

struct TilePlace {
  int64_t row, column;  // in tiles
};
LISSOM_HD constexpr TilePlace tile_place(int64_t tile, int64_t tiles_m, int64_t tiles_n) {
  const int64_t first = tile / (tiles_n * kTileGroup) * kTileGroup, rest = tile % (tiles_n * kTileGroup);
  const int64_t height = tiles_m - first < kTileGroup ? tiles_m - first : kTileGroup;
  return {first + rest % height, rest / height};
}

template <typename X, int kRows, int kColumns, int kWarpsDown, int kWarpsAcross>
struct Tile {
  static constexpr int kM = kRows, kN = kColumns;
  static constexpr int kAcross = kWarpsAcross;
  static constexpr int kThreads = kWarpsDown * kWarpsAcross * kWarp;
  static constexpr int kI = kM / kWarpsDown / 16, kJ = kN / kWarpsAcross / 8;  // fragments of a warp
  static constexpr int kXBytes = kM * kUnit * static_cast<int>(sizeof(X));
  static constexpr int kStageBytes = kXBytes + kN * kUnit;
  static constexpr int kStages = kM > 64 ? 4 : (64 << 10) / kStageBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kThreads / kWarp * 16 * kJ * 8 * 4 <= kSharedBytes, "scratch of all warps");
};

// Bytes from the start of a stage to 16 bytes of x. Rows of 16-bit elements are 128 bytes: swizzled, the
// lanes of two rows, which read every other 16 bytes, use all banks. Rows of int8 are 64 bytes: two rows in a
// line of banks, as they are.
template <int kBytes>
LISSOM_HD constexpr int staged_x_at(int row, int chunk) {
  return kBytes == 1 ? row * kUnit + chunk * 16 : row * 2 * kUnit + ((chunk ^ (row & 7)) * 16);
}

// Sixteen bytes that lie anywhere, or that the row ends within.
__device__ __forceinline__ uint4 gather_bytes(const unsigned char* from, int64_t bytes) {
  uint32_t word[4] = {};
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    if (j < bytes) word[j / 4] |= static_cast<uint32_t>(from[j]) << 8 * (j % 4);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Columns k … k + 63 of kRows rows from row `first` on into shared memory; zeros past the edges.
template <typename E, int kRows, int kThreads, bool kAligned, typename At>
__device__ __forceinline__ void stage_tile(unsigned char* shared, const E* from, int64_t stride,
                                           int64_t first, int64_t rows, int64_t k, int64_t columns, At at) {
  constexpr int kValues = 16 / sizeof(E), kChunks = kUnit / kValues;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks, row = static_cast<int>(threadIdx.x) / kChunks;
  const int64_t column = k + chunk * kValues;
  static_assert(kRows * kChunks % kThreads == 0, "the same number of copies for every thread");
  const E* mine = from + (first + row) * stride + column;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    constexpr int kStep = kThreads / kChunks;
    const bool inside = first + row + i * kStep < rows && column < columns;
    unsigned char* to = shared + at(row + i * kStep, chunk);
    const E* source = inside ? mine + i * kStep * stride : from;
    if constexpr (kAligned) {
      cp_async_16(to, source, inside);
    } else {
      const int64_t bytes = inside ? (columns - column) * static_cast<int64_t>(sizeof(E)) : 0;
      *reinterpret_cast<uint4*>(to) = gather_bytes(reinterpret_cast<const unsigned char*>(source), bytes);
    }
  }
}

// kAligned: rows of the weight, and of x where it is not the workspace's, lie on multiples of 16 bytes, and
// their lengths are multiples of 16 bytes too.
template <typename X, typename T, bool kAligned>
__global__ void __launch_bounds__(T::kThreads, T::kThreads == 256 ? 1 : 2) tile_kernel(TileCall call) {
  using Sum = SumOf<X>;
  unsigned char* shared = dynamic_shared();
  wait_for_previous_grid();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int warp_row = warp / T::kAcross * (T::kI * 16), warp_column = warp % T::kAcross * (T::kJ * 8);
  const int64_t tile = blockIdx.x;
  const TilePlace place = tile_place(tile, call.tiles_m, call.tiles_n);
  const int64_t first_row = place.row * T::kM, first_column = place.column * T::kN;
  const int64_t first_step = blockIdx.y * call.steps;
  const int64_t last_step = min(first_step + call.steps, ceil_div(call.weight_k, kUnit));

  // Whether the warp has rows for its fragments i: of up to 32 rows a tile of 64 leaves half the warps idle.
  const auto used = [&](int i) { return first_row + warp_row + 16 * i < call.outputs.m; };

  const auto start = [&](int64_t step) {
    if (step < last_step) {
      unsigned char* stage = shared + (step - first_step) % T::kStages * T::kStageBytes;
      stage_tile<X, T::kM, T::kThreads, kAligned || sizeof(X) == 1>(
          stage, static_cast<const X*>(call.x), call.x_stride, first_row, call.outputs.m, step * kUnit,
          call.k, [](int row, int chunk) { return staged_x_at<sizeof(X)>(row, chunk); });
      stage_tile<int8_t, T::kN, T::kThreads, kAligned>(
          stage + T::kXBytes, call.weight, call.weight_stride, first_column, call.outputs.n, step * kUnit,
          call.weight_k, [](int row, int chunk) { return staged_x_at<1>(row, chunk); });
    }
    cp_async_commit();  // also an empty group, so that waiting counts stages
  };

  Sum sum[T::kI][T::kJ][4] = {};
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) start(first_step + i);
#pragma unroll 1
  for (int64_t step = first_step; step < last_step; ++step) {
    cp_async_wait<T::kStages - 2>();
    __syncthreads();  // this stage has come, and the one before was read by all
    start(step + T::kStages - 1);
    if (!used(0)) continue;
    const unsigned char* x = shared + (step - first_step) % T::kStages * T::kStageBytes;
    const unsigned char* weight = x + T::kXBytes;
#pragma unroll
    for (int half = 0; half < static_cast<int>(sizeof(X)); ++half) {
      uint4 a[T::kI][2];
#pragma unroll
      for (int i = 0; i < 2 * T::kI; ++i) {
        const int chunk = static_cast<int>(sizeof(X)) * t + half;
        a[i / 2][i % 2] =
            *reinterpret_cast<const uint4*>(x + staged_x_at<sizeof(X)>(warp_row + 8 * i + g, chunk));
      }
#pragma unroll
      for (int j = 0; j < T::kJ; ++j) {
        uint32_t b[2][2];
        weight_fragments<X>(
            *reinterpret_cast<const uint4*>(weight + staged_x_at<1>(warp_column + 8 * j + g, t)), half, b);
#pragma unroll
        for (int i = 0; i < T::kI; ++i) multiply<X>(sum[i][j], a[i][0], a[i][1], b);
      }
    }
  }
  cp_async_wait<0>();

  if (call.splits > 1) {
    // 16 bytes a thread and fragment, neighbours beside each other.
    const auto part = [&](int split, int fragment) {
      const int64_t at = ((tile * call.splits + split) * (T::kI * T::kJ) + fragment) * T::kThreads;
      return static_cast<Four<Sum>*>(call.partial) + at + threadIdx.x;
    };
#pragma unroll
    for (int f = 0; f < T::kI * T::kJ; ++f) {
      if (used(f / T::kJ)) __stcg(part(blockIdx.y, f), make_four(sum[f / T::kJ][f % T::kJ]));
    }
    LISSOM_SHARED(bool, last, [1]);
    __syncthreads();  // all threads have stored before one of them counts
    if (threadIdx.x == 0) {
      last[0] = atomic_add_acq_rel(call.counters + tile, 1) == call.splits - 1;
      if (last[0]) call.counters[tile] = 0;  // ready for another launch
    }
    __syncthreads();
    if (!last[0]) return;
#pragma unroll
    for (int f = 0; f < T::kI * T::kJ; ++f) {
      Sum(&mine)[4] = sum[f / T::kJ][f % T::kJ];
#pragma unroll
      for (int e = 0; e < 4; ++e) mine[e] = 0;
#pragma unroll 1
      for (int split = 0; split < call.splits && used(f / T::kJ); ++split) {
        const auto v = __ldcg(part(split, f));
        mine[0] += v.x, mine[1] += v.y, mine[2] += v.z, mine[3] += v.w;
      }
    }
  }
  __syncthreads();  // the stages become scratch
  Sum* scratch = reinterpret_cast<Sum*>(shared) + warp * (16 * T::kJ * 8);
#pragma unroll 1
  for (int i = 0; i < T::kI; ++i) {
    const int64_t row = first_row + warp_row + 16 * i;
    const float scale = lane_scale(call.outputs, row);
    __syncwarp();  // what was there has been read
#pragma unroll
    for (int f = 0; f < T::kI; ++f) {  // registers have no index
      if (f == i) write_scratch<T::kJ>(scratch, [&](int j, int e) { return sum[f][j][e]; });
    }
    __syncwarp();
    finish_scratch<T::kJ>(call.outputs, scratch, row, first_column + warp_column, call.outputs.n, scale);
  }
}

static_assert(in_different_banks(8, 16, [](int lane) { return staged_x_at<1>(lane / 4, lane % 4); }) &&
                  in_different_banks(8, 16,
                                     [](int lane) { return staged_x_at<2>(lane / 4, lane % 4 * 2); }) &&
                  in_different_banks(8, 16,
                                     [](int lane) { return staged_x_at<2>(lane / 4, lane % 4 * 2 + 1); }),
              "what 8 lanes read together of a stage");
static_assert(in_different_banks(8, 16, [](int lane) { return staged_x_at<1>(lane / 4, lane % 4); }) &&
                  in_different_banks(8, 16, [](int lane) { return staged_x_at<2>(3, lane); }),
              "… and copy into it");

// ---- float32 activations that are not quantized
// -------------------------------------------------------------

// Tensor cores would round x to TF32; this is the classic product on the ordinary cores: 64 x 64 outputs of
// a block, 4 x 4 of a thread, both operands as float32 in shared memory, K first, 16 columns at a time.
constexpr int kFloatTile = 64, kFloatDepth = 16, kFloatThreads = 256;

__global__ void __launch_bounds__(kFloatThreads, 2) float_tile_kernel(TileCall call) {
  constexpr int kPitch = kFloatTile + 4;  // the 16-byte reads stay aligned
  LISSOM_SHARED(float, x, [kFloatDepth][kPitch]);
  LISSOM_SHARED(float, weight, [kFloatDepth][kPitch]);
  const TilePlace place = tile_place(blockIdx.x, call.tiles_m, call.tiles_n);
  const int64_t first_row = place.row * kFloatTile, first_column = place.column * kFloatTile;
  const int down = threadIdx.x / 16 * 4, across = threadIdx.x % 16 * 4;
  const float* from = static_cast<const float*>(call.x);
  float sum[4][4] = {};
  for (int64_t k = 0; k < call.k; k += kFloatDepth) {
    float next_x[4], next_weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.x / kFloatDepth + 16 * i;
      const int64_t column = k + threadIdx.x % kFloatDepth;
      const bool inside = column < call.k;
      next_x[i] = inside && first_row + row < call.outputs.m
                      ? from[(first_row + row) * call.x_stride + column]
                      : 0.0f;
      next_weight[i] = inside && first_column + row < call.outputs.n
                           ? __int2float_rn(call.weight[(first_column + row) * call.weight_stride + column])
                           : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[threadIdx.x % kFloatDepth][threadIdx.x / kFloatDepth + 16 * i] = next_x[i];
      weight[threadIdx.x % kFloatDepth][threadIdx.x / kFloatDepth + 16 * i] = next_weight[i];
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kFloatDepth; ++d) {
      const float4 a = *reinterpret_cast<const float4*>(&x[d][down]);
      const float4 b = *reinterpret_cast<const float4*>(&weight[d][across]);
      const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = __fmaf_rn(left[i], right[j], sum[i][j]);
      }
    }
  }
  const FourColumns columns = load_columns(call.outputs, first_column + across, call.outputs.n);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first_row + down + i < call.outputs.m) {
      finish_four(call.outputs, columns, first_row + down + i, 1.0f, sum[i]);
    }
  }
}

// Counters of arrivals to 0 where no kernel before does it.
__global__ void zero_kernel(int* counters, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) counters[i] = 0;
}

}  // namespace lissom::cuda
