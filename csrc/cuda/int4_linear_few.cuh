// Up to 16 rows of x: bound by the weight's bytes, if instructions and waits allow.
//
// A warp has two panels (32 outputs) of some chunks of K, and goes through them without meeting another warp:
//
//   x         of all the block's chunks is in shared memory before the first product, pieces of 16 bytes of
//   row
//             r at piece ^ (r % 8), so that the eight that ldmatrix reads together lie in different banks;
//             and so are the sums of x over each segment, which tensor cores have worked out for the whole
//             block
//   codes     from global memory to registers, two chunks ahead: a lane multiplies the 16 bytes that it loads
//   terms     likewise, one chunk ahead
//
// A block's 8 warps are `along` pairs of panels by 8 / along ways, which take chunks in turn; their sums are
// added up at the end. Few outputs have one pair and eight ways, many rows four pairs, which share x. Where x
// is too large for shared memory, or tiles are too few, K is split over blocks too (store_tile).
//
// Codes are not turned into weights first. 4 bits or-ed into the significand of a power of two are a number,
// 128 + q (bfloat16, times a unit) or 16 + q (float16), and
//
//   sum of (q - z) x  =  sum of (128 + q) x  -  (128 + z) sum of x
//
// so that zero-points of any kind cost nothing more. 7 instructions for 8 codes (float16: 8), where taking
// the offset off each takes 11. What cancels has 16 (2) times the size of q x: the sums are float32, a
// group's each. int8 has its own digits, 16 (q - 8), and sums of x for zero-points only.
//
// By count (sm_90a, bfloat16, groups of 128): 215 instructions of a warp for its 4096 codes where x has up to
// 8 rows, 260 up to 16. While an H200's memory brings those codes, four schedulers issue 390, and about half
// of that in fact. This file as it first was, with terms through shared memory and sums of x in every warp,
// took 352 by ncu, issued 0.53 a cycle, and reached 57 % of the bandwidth (8192 x 28672, one row), 1.56
// to 2.27 times cuBLAS's speed; what it replaced 1.18 to 1.59 (bench/results/gpu-nvidia-h200-int4.md). As it
// is now it has not run on a GPU.
#pragma once

#include "int4_linear_kernel.cuh"

namespace lissom::cuda {

constexpr int kInt4Warps = kInt4Threads / kWarp;
constexpr int kFewOutputs = 2 * kPanel;     // of a warp
constexpr int kFewDepth = 2;                // chunks of codes on their way
constexpr int64_t kFewPrefetch = 32 << 10;  // bytes of a panel; all blocks' together fit into L2

// Blocks that a multiprocessor's registers are shared out to.
LISSOM_HD constexpr int int4_few_blocks(int tiles, int segments) {
  return segments == 4 || (segments == 2 && tiles == 2) ? 1 : 2;
}

// [x of all rows and chunks] [sums of x: chunks, segments, rows of tiles]; sums of outputs take their place.
LISSOM_HD constexpr int int4_few_sum_stride(int along) { return along * kFewOutputs + 4; }
template <typename T>
LISSOM_HD constexpr int64_t int4_few_chunk_bytes(const Int4Fragments& layout, int64_t m, int rows) {
  return m * kInt4Chunk * static_cast<int64_t>(sizeof(T)) + layout.segments() * rows * 4;
}
template <typename T>
LISSOM_HD constexpr int64_t int4_few_shared_bytes(const Int4Fragments& layout, int64_t m, int rows, int along,
                                                  int64_t chunks) {
  const int64_t during = chunks * int4_few_chunk_bytes<T>(layout, m, rows);
  const int64_t after = kInt4Warps / along * rows * int4_few_sum_stride(along) * 4;
  return during > after ? during : after;
}

// What an output's codes are or-ed into, and what its sums are scaled with.
template <typename T>
struct Offset;

// (128 + q) unit / 16: no larger than weights are. Units are kept where 8 of them and 128 / 8 of them are
// numbers of bfloat16; a scale beyond is many units, or few.
template <>
struct Offset<BFloat16> {
  static constexpr float kOffset = 128.0f;
  uint32_t magic;  // 8 units, twice

  __device__ __forceinline__ explicit Offset(float unit) {
    unit = fminf(fmaxf(unit, 0x1p-110f), 0x1p120f);
    magic = pack2<BFloat16>(unit * 8.0f, unit * 8.0f);
  }
  __device__ __forceinline__ float unit() const {  // of a code's number, times what sums of x are short of
    return __uint_as_float(magic & 0xffff0000u);
  }
  __device__ __forceinline__ float rest(float scale) const {  // 16 / unit
    return scale * __uint_as_float((261u << 23) - (magic & 0xffff0000u));
  }
};
// 16 + q: the nibble at the top of the significand.
template <>
struct Offset<Float16> {
  static constexpr float kOffset = 16.0f;
  static constexpr uint32_t magic = 0x4c004c00;
  __device__ __forceinline__ explicit Offset(float) {}
  __device__ __forceinline__ static float unit() { return Ones<Float16>::kInverse; }
  __device__ __forceinline__ static float rest(float scale) { return scale; }
};
template <>
struct Offset<int8_t> {
  __device__ __forceinline__ explicit Offset(float) {}
};

// A word of codes to an m16n8k16 operand; nibble i + 4e is element e of register i (formats.py).
__device__ __forceinline__ void place(uint32_t (&a)[4], uint32_t word, const Offset<BFloat16> (&outputs)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = lop3<kMaskAndOr>(word >> 4 * i, 0x000f000f, outputs[i % 2].magic);
}
__device__ __forceinline__ void place(uint32_t (&a)[4], uint32_t word, const Offset<Float16> (&)[2]) {
  constexpr uint32_t kNibbles = 0x03c003c0, kMagic = Offset<Float16>::magic;
  a[0] = lop3<kMaskAndOr>(word << 6, kNibbles, kMagic);
  a[1] = lop3<kMaskAndOr>(word << 2, kNibbles, kMagic);
  a[2] = lop3<kMaskAndOr>(word >> 2, kNibbles, kMagic);
  a[3] = lop3<kMaskAndOr>(word >> 6, kNibbles, kMagic);
}

// Of a warp: its pair of panels and its chunks among `along` (4 or 1) pairs.
struct FewPlace {
  int pair, way, ways;
  __device__ __forceinline__ FewPlace(int warp, int along)
      : pair(along == 1 ? 0 : warp % 4), way(along == 1 ? warp : warp / 4), ways(along == 1 ? 8 : 2) {}
};

// Grid (tiles of outputs, splits of K). kTiles: of 8 rows, all there are. kSegments: of a chunk, that have
// terms of their own. kSums: whether x is summed, as it always is but for int8.
template <typename T, int kTiles, int kSegments, bool kSums>
__global__ void __launch_bounds__(kInt4Threads, int4_few_blocks(kTiles, kSegments))
    int4_few_kernel(Int4Call call) {
  using Sum = typename GroupSum<T>::Type;
  constexpr bool kInt8 = sizeof(T) == 1;
  static_assert(kInt8 || kSums);
  constexpr int kXChunkBytes = kInt4Chunk * static_cast<int>(sizeof(T));
  constexpr int kBlocks = 4 / kSegments;  // of 32 k-values, of a segment
  const Int4Fragments& layout = call.layout;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const FewPlace place_of_warp(warp, call.along);
  const int pair = place_of_warp.pair, way = place_of_warp.way, ways = place_of_warp.ways;
  const int64_t first_panel = static_cast<int64_t>(blockIdx.x) * call.along * 2;
  const int64_t own_panel = first_panel + pair * 2, panels = panel_count(call.outputs.n);
  const int64_t first_chunk = blockIdx.y * call.chunks;
  const int chunks = static_cast<int>(min(call.chunks, layout.chunks() - first_chunk));
  const int rows = static_cast<int>(call.outputs.m);
  const int row_bytes = static_cast<int>(call.chunks) * kXChunkBytes;
  const int chunk_bytes = layout.chunk_bytes();
  unsigned char* const x_at = dynamic_shared();
  auto* const x_sums = reinterpret_cast<float*>(x_at + rows * row_bytes);
  constexpr int kRows = 8 * kTiles;

  // ---- to L2 meanwhile, while the kernel before this one ends: what the block reads first of each panel
  if (static_cast<int>(threadIdx.x) < 2 * call.along && first_panel + threadIdx.x < panels) {
    const int64_t bytes = min(int64_t{chunks} * chunk_bytes, kFewPrefetch);
    prefetch_l2(call.packed + (first_panel + threadIdx.x) * layout.panel_bytes() + layout.header_bytes() +
                    first_chunk * chunk_bytes,
                static_cast<uint32_t>(bytes / 16 * 16));
  }
  if (const int64_t output = first_panel * kPanel + threadIdx.x * 8;
      static_cast<int>(threadIdx.x) < 4 * call.along && output < call.outputs.n) {
    prefetch_columns(call.outputs, output);
  }
  wait_for_previous_grid();

  // ---- codes on their way; of a panel past the edge the last one's: what it gives is not stored
  const int steps = own_panel < panels && chunks > way ? (chunks - way - 1) / ways + 1 : 0;
  const int panel_step = own_panel + 1 < panels ? static_cast<int>(layout.panel_bytes()) : 0;
  const uint8_t* const panel = call.packed + min(own_panel, panels - 1) * layout.panel_bytes();
  const uint8_t* const first = panel + layout.header_bytes() + (first_chunk + way) * chunk_bytes;
  const int step_bytes = ways * chunk_bytes;
  const uint8_t* from = first + lane * 16;
  uint4 codes[kFewDepth][2][2];  // [chunk][unit][panel]
  const auto fetch = [&](uint4(&unit)[2], int at) {
    unit[0] = load_stream(reinterpret_cast<const uint4*>(from + at));
    unit[1] = load_stream(reinterpret_cast<const uint4*>(from + panel_step + at));
  };
#pragma unroll
  for (int d = 0; d < kFewDepth; ++d) {
    if (d < steps) {
      fetch(codes[d][0], 0);
      fetch(codes[d][1], kInt4UnitBytes);
    }
    from += step_bytes;
  }

  // Terms of the chunk that comes next; of whole rows once.
  const int group = lane / 4;  // as the fragments' drawings have it
  const auto* terms_from = reinterpret_cast<const Int4Term*>(
      (layout.one_group ? panel + layout.row_terms_at() : first + kInt4CodeBytes) + group * kInt4TermBytes);
  Int4Term next_terms[kSegments][2][2] = {};
  const auto fetch_terms = [&] {
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto* one =
              reinterpret_cast<const unsigned char*>(terms_from + s * kPanel + h * 8) + p * panel_step;
          const uint2 bits = load_stream(reinterpret_cast<const uint2*>(one));
          next_terms[s][p][h] = make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
        }
      }
    }
  };
  if (steps > 0) fetch_terms();

  // ---- x, and its sums
  const T* x = static_cast<const T*>(call.x);
  for (int row = 0; row < rows; ++row) {
    for (int piece = threadIdx.x; piece < chunks * (kXChunkBytes / 16); piece += kInt4Threads) {
      copy_piece(x_at + row * row_bytes + (piece ^ row % 8) * 16, x + row * call.x_stride,
                 first_chunk * kInt4Chunk + piece * (16 / static_cast<int>(sizeof(T))), call.x_columns,
                 call.x_vector);
    }
  }
  cp_async_commit();
  const auto unit_of = [&](int p, int h) {
    return reinterpret_cast<const float*>(panel + p * panel_step)[group + 8 * h];
  };
  const Offset<T> outputs[2][2] = {{Offset<T>(unit_of(0, 0)), Offset<T>(unit_of(0, 1))},
                                   {Offset<T>(unit_of(1, 0)), Offset<T>(unit_of(1, 1))}};
  // Of matrix lane / 8 of four, row lane % 8; the last row of x once more where there is none.
  const SharedAddress x_base = shared_address_of(x_at);
  int x_offset[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int row = min(j * 8 + lane % 8, rows - 1);
    x_offset[j] = row * row_bytes + (lane / 8 ^ row % 8) * 16;
  }
  // The second operand of 32 k-values, or of 64 of int8.
  const auto load_x = [&](uint32_t (&b)[kTiles][4], int chunk_at, int block) {
    const int group_at = kInt8 ? 0 : block / 2 * 128, within = kInt8 ? block / 2 * 64 : block % 2 * 64;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      ldmatrix_x4_at(b[j], x_base + (chunk_at + group_at + (x_offset[j] ^ within)));
  };
  const auto half_of = [&](const uint32_t (&b)[4], int which, uint32_t (&second)[2]) {
    second[0] = b[2 * which], second[1] = b[2 * which + 1];
  };
  cp_async_wait<0>();
  __syncthreads();
  if constexpr (kSums) {
    constexpr uint32_t kBits = Ones<T>::kBits;
    const uint32_t ones[4] = {kBits, kBits, kBits, kBits};
    for (int chunk = warp; chunk < chunks; chunk += kInt4Warps) {
      uint32_t b[kTiles][4];
      Sum sum[kTiles][4];
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        if (!kInt8 || block % 2 == 0) load_x(b, chunk * kXChunkBytes, block);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (block % kBlocks == 0) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0;
          uint32_t second[2];
#pragma unroll
          for (int s = 0; s < (kInt8 ? 1 : 2); ++s) {
            half_of(b[j], kInt8 ? block % 2 : s, second);
            multiply<T>(sum[j], ones, second);
          }
          if ((block + 1) % kBlocks == 0 && group == 0) {  // all rows of ones give the same
            auto* to = x_sums + ((chunk * kSegments + block / kBlocks) * kRows + j * 8 + lane % 4 * 2);
            *reinterpret_cast<float2*>(to) =
                make_float2(static_cast<float>(sum[j][0]), static_cast<float>(sum[j][1]));
          }
        }
      }
    }
    __syncthreads();
  }

  // ---- sums
  float total[2][kTiles][4] = {};
  int x_use_at = way * kXChunkBytes;
  const float* sums_from = x_sums + way * kSegments * kRows + lane % 4 * 2;
  const auto take = [&](uint4(&chunk)[2][2], int left) {
    Int4Term terms[kSegments][2][2];
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) terms[s][i / 2][i % 2] = next_terms[s][i / 2][i % 2];
    }
    if (!layout.one_group && left > 1) {
      terms_from =
          reinterpret_cast<const Int4Term*>(reinterpret_cast<const unsigned char*>(terms_from) + step_bytes);
      fetch_terms();
    }
    Sum sum[2][kTiles][4];
    uint32_t b[kTiles][4];
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      if (block % kBlocks == 0) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[0][j][i] = sum[1][j][i] = 0;
        }
      }
      if (!kInt8 || block % 2 == 0) load_x(b, x_use_at, block);
      uint4(&unit)[2] = chunk[block / 2];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint32_t words[2] = {block % 2 ? unit[p].z : unit[p].x, block % 2 ? unit[p].w : unit[p].y};
        uint32_t second[2];
        if constexpr (kInt8) {
          uint32_t a[4];
          expand(a, words[0], words[1]);
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            half_of(b[j], block % 2, second);
            multiply<T>(sum[p][j], a, second);
          }
        } else {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            uint32_t a[4];
            place(a, words[s], outputs[p]);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              half_of(b[j], s, second);
              multiply<T>(sum[p][j], a, second);
            }
          }
        }
      }
      if (block % 2 == 1 && left > kFewDepth) fetch(unit, block / 2 * kInt4UnitBytes);
      if ((block + 1) % kBlocks != 0) continue;

      // A segment is complete: its sums meet the others in float32.
      const int segment = block / kBlocks;
      float2 of_x[kTiles];  // of rows 2t and 2t + 1
      if constexpr (kSums) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          of_x[j] = *reinterpret_cast<const float2*>(sums_from + segment * kRows + j * 8);
        }
      }
#pragma unroll
      for (int p = 0; p < 2; ++p) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float scale = terms[segment][p][h].x, zero = terms[segment][p][h].y;
          if constexpr (kInt8) {  // 16 times: as the codes are
            const float offset = __fmul_rn(__fmul_rn(scale, __fsub_rn(8.0f, zero)), 16.0f);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                float& all = total[p][j][2 * h + i];
                all = __fmaf_rn(static_cast<float>(sum[p][j][2 * h + i]), scale, all);
                if constexpr (kSums) all = __fmaf_rn(i == 0 ? of_x[j].x : of_x[j].y, offset, all);
              }
            }
          } else {
            const float offset = -(Offset<T>::kOffset + zero) * outputs[p][h].unit();
            const float rest = outputs[p][h].rest(scale);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                float& all = total[p][j][2 * h + i];
                const float part = __fmaf_rn(i == 0 ? of_x[j].x : of_x[j].y, offset, sum[p][j][2 * h + i]);
                all = __fmaf_rn(part, rest, all);
              }
            }
          }
        }
      }
    }
    from += step_bytes;
    x_use_at += ways * kXChunkBytes;
    sums_from += ways * kSegments * kRows;
  };
  for (int left = steps; left > 0; left -= kFewDepth) {
#pragma unroll
    for (int d = 0; d < kFewDepth; ++d) {
      if (left > d) take(codes[d], left - d);
    }
  }

  // ---- through shared memory, so that a row's outputs are neighbours: sums [ways][rows][outputs]
  __syncthreads();
  int again = static_cast<int>(threadIdx.x);  // anew, rather than kept in registers meanwhile
  keep(again);
  const FewPlace place_at_end(again / kWarp, call.along);
  const int group_at_end = again % kWarp / 4, thread = again % 4;
  const int stride = int4_few_sum_stride(call.along);
  auto* sums = reinterpret_cast<float*>(x_at);
#pragma unroll
  for (int p = 0; p < 2; ++p) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = j * 8 + thread * 2 + i % 2;
        const int output = (place_at_end.pair * 2 + p) * kPanel + group_at_end + i / 2 * 8;
        sums[(place_at_end.way * kRows + row) * stride + output] = total[p][j][i];
      }
    }
  }
  __syncthreads();
  const auto sums_at = [&](int row, int output) {
    float4 all = *reinterpret_cast<const float4*>(sums + row * stride + output);
#pragma unroll 4
    for (int other = 1; other < kInt4Warps / call.along; ++other) {
      const float4 part = *reinterpret_cast<const float4*>(sums + (other * kRows + row) * stride + output);
      all.x += part.x, all.y += part.y, all.z += part.z, all.w += part.w;
    }
    return all;
  };
  const auto store = [&](auto outputs_of_tile) {
    store_tile<kInt8, kRows, outputs_of_tile>(
        call, sums_at, 0, static_cast<int64_t>(blockIdx.x) * call.along * kFewOutputs,
        kShift<Int4Form::kPlain>, again, kInt4Threads, [] { __syncthreads(); });
  };
  if (call.along == 1) {
    store(std::integral_constant<int, kFewOutputs>());
  } else {
    store(std::integral_constant<int, kInt4Outputs>());
  }
}

}  // namespace lissom::cuda
