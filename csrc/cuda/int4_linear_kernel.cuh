// y = act(x · Wᵀ + b) with 4-bit weights, on mma.sync: 17 rows and more, and tables. Up to 16 rows without
// tables are int4_linear_few.cuh's.
//
// The fewer rows, the more the weight's bytes count, so everything is arranged around reading them once, at
// full width, and with few instructions a code:
//
//   - Tensor cores take W as their first operand (16 outputs by 16 or 32 k) and xᵀ as their second (by 8 rows
//     of x): 8 rows cost half of what 16 do, and no row of x is multiplied for nothing beyond 7 of them.
//   - Codes were packed as fragments (formats.py): a lane copies 16 bytes with cp.async, reads back the same
//     16 bytes, and has what it multiplies next: 64 k-values of two outputs, 32 codes.
//   - Codes become numbers without a conversion: 4 bits are or-ed into the significand of 128 (bfloat16) or
//     1024 (float16), and one fma takes that offset off, two codes at a time: 11 instructions for the 8 codes
//     of a 16 x 16 tile (float16: 9; int8: 3).
//   - A group's sum is multiplied by its scale in float32, so that no weight is rounded.
//
// A block computes 128 outputs. Its 8 warps are 4 along the outputs (2 panels of 16 each) by 2:
//
//              kDeep, up to 64 rows                     else, 128 rows (64)
//   warp 0-3   chunks 0, 2, 4 … of 128 k-values         rows 0 …
//   warp 4-7   chunks 1, 3, 5 …                         the second half of the rows
//
// so that a panel's sums are added up within the block (deep), or its codes serve twice the rows (else). A
// stage is kChunks chunks of k: the rows of x, which all warps share, and of each panel a run of bytes as it
// is in memory. Up to four of them are in flight, one barrier a stage. Where tiles are too few for the GPU, K
// is split over blocks too: each leaves float32 sums in L2, the last to arrive adds them in the order of K.
//
//   stage:   x [rows][kChunks * 128], pieces of 16 bytes of row r at piece ^ (r % 8), so that the eight that
//            ldmatrix reads together lie in different banks
//            codes [8 panels][kChunks] chunks of formats.h
//
#pragma once

#include "int4_linear.h"
#include "outputs.cuh"

namespace lissom::cuda {

// What a launch computes with: the arguments, and how they are shared out.
struct Int4Call {
  const void* x;      // of the kernel's type
  int64_t x_stride;   // in elements
  int64_t x_columns;  // that a row has; zeros from there on
  bool x_vector;      // rows lie on multiples of 16 bytes
  Outputs outputs;    // scales: of x only
  Int4Fragments layout;
  Int4Zeros zeros;
  const uint8_t* packed;
  float* partial;
  int* counters;
  int splits;      // of K
  int64_t chunks;  // in each
  int stages;
  int along;  // pairs of panels of a block, for few rows
};

// What beside codes is in the inner loop: nothing (zero-points that are integers are taken off the codes);
// sums of x, for the others and for int8; tables.
enum class Int4Form : int { kPlain, kSums, kTable };

constexpr int kInt4Threads = 256, kInt4Outputs = 128;
constexpr int kInt4Panels = kInt4Outputs / kPanel;  // of a block
constexpr int kInt4PanelsPerWarp = 2;
constexpr int kInt4WarpsAlongOutputs = kInt4Panels / kInt4PanelsPerWarp;
constexpr int kInt4TableBytes = kInt4Panels * kPanel * 16 * 4 * 4;  // every entry 4 times: once for each lane
constexpr int kInt4SumStride = kInt4Outputs + 4;  // floats of a row of sums: rows 2t meet no bank twice

// kTiles: of 8 rows, of a warp.
template <typename T, int kTiles, bool kDeep>
struct Int4Tile {
  static constexpr int kWarpRows = 8 * kTiles;
  static constexpr int kRows = kDeep ? kWarpRows : 2 * kWarpRows;
  static constexpr int kChunks = kDeep ? 2 : 1;
  static constexpr int kRowBytes = kChunks * kInt4Chunk * static_cast<int>(sizeof(T));
  static constexpr int kXBytes = kRows * kRowBytes;

  LISSOM_HD static constexpr int stage_bytes(const Int4Fragments& layout) {
    return kXBytes + kInt4Panels * kChunks * layout.chunk_bytes();
  }
  // [tables] [terms of whole rows] stages; sums take the stages' place.
  LISSOM_HD static constexpr int fixed_bytes(const Int4Fragments& layout, Int4Form form) {
    return (form == Int4Form::kTable && sizeof(T) == 2 ? kInt4TableBytes : 0) +
           (layout.one_group ? kInt4Panels * layout.term_bytes() : 0);
  }
  static constexpr int kSumBytes = kRows * kInt4SumStride * 4;
};

// ---- codes to numbers
// -----------------------------------------------------------------------------------------

// Of one output: what its codes become numbers with. A group's sum is to be multiplied by scale / unit.
// zero() takes zero-points up to kNear, in an instruction or two; far_zero() any.
template <typename T>
struct Expand;

// (128 + q) unit - (128 + z) unit, with a power of two: sums are as large as the weights, so that nothing
// overflows or vanishes that would not in x · w. 128 + z has 8 bits up to z = 127; `far` is what is above.
template <>
struct Expand<BFloat16> {
  static constexpr int kNear = 127;
  uint32_t factor, offset, far;
  float inverse_unit;

  __device__ __forceinline__ explicit Expand(float unit) : far(0) {
    factor = pack2<BFloat16>(unit, unit);
    inverse_unit = __uint_as_float((254u << 23) - __float_as_uint(unit));
    zero(8);
  }
  __device__ __forceinline__ void zero(uint32_t z) {
    constexpr uint32_t kMinus128 = 0xc300c300, kMinusZero = 0x80008000;
    offset = fma2<BFloat16>(z * 0x00010001 + kMinus128, factor, kMinusZero);
  }
  __device__ __forceinline__ void far_zero(uint32_t z) {
    const float rest = -static_cast<float>(max(static_cast<int>(z) - kNear, 0)) * unit();
    zero(min(z, static_cast<uint32_t>(kNear)));
    far = pack2<BFloat16>(rest, rest);
  }
  __device__ __forceinline__ float unit() const { return __uint_as_float(factor & 0xffff0000u); }
};

// (1024 + q) - (1024 + z); a nibble 4 bits up: (1024 + 16 q) / 16 - (64 + z).
template <>
struct Expand<Float16> {
  static constexpr int kNear = 63;
  static constexpr float inverse_unit = 1.0f;
  uint32_t low, high;

  __device__ __forceinline__ explicit Expand(float) { zero(8); }
  __device__ __forceinline__ void zero(uint32_t z) {
    constexpr uint32_t kMinus1024 = 0xe400e400, kMinus64 = 0xd400d400;
    low = z * 0x00010001 + kMinus1024;
    high = z * 0x00100010 + kMinus64;
  }
  __device__ __forceinline__ void far_zero(uint32_t z) {
    const float sum = -64.0f - static_cast<float>(z);
    high = pack2<Float16>(sum, sum);
  }
  __device__ __forceinline__ static float unit() { return 1.0f; }
};

template <>
struct Expand<int8_t> {
  __device__ __forceinline__ explicit Expand(float) {}
};

// Integer zero-points of a segment. Whether some in the warp are far: move_far() is due then.
template <typename T, int kPanels, typename Terms>
__device__ __forceinline__ bool take_zeros(Expand<T> (&outputs)[kPanels][2], const Terms& terms, int at) {
  uint32_t zeros[kPanels][2];
  bool far = false;
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      zeros[p][h] = static_cast<uint32_t>(terms(p)[at + 8 * h].y);
      outputs[p][h].zero(zeros[p][h]);
      far = far || zeros[p][h] > Expand<T>::kNear;
    }
  }
  far = __any_sync(kAllLanes, far);
  if (far) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int h = 0; h < 2; ++h) outputs[p][h].far_zero(zeros[p][h]);
    }
  }
  return far;
}

constexpr int kMaskAndOr = 0xea, kMaskAndXor = 0x6a;  // (a & b) | c, (a & b) ^ c

// A word of codes to an m16n8k16 operand: nibble i + 4e is element e of register i (formats.py); registers 0
// and 2 are of the first output, 1 and 3 of the one 8 further.
__device__ __forceinline__ void expand(uint32_t (&a)[4], uint32_t word,
                                       const Expand<BFloat16> (&outputs)[2]) {
  constexpr uint32_t kNibbles = 0x000f000f, k128 = 0x43004300;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = fma2<BFloat16>(lop3<kMaskAndOr>(word >> 4 * i, kNibbles, k128), outputs[i % 2].factor,
                          outputs[i % 2].offset);
  }
}
// What a zero-point above 127 is more than that.
__device__ __forceinline__ void move_far(uint32_t (&a)[4], const Expand<BFloat16> (&outputs)[2]) {
  constexpr uint32_t kOne = 0x3f803f80;
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = fma2<BFloat16>(a[i], kOne, outputs[i % 2].far);
}

__device__ __forceinline__ void expand(uint32_t (&a)[4], uint32_t word, const Expand<Float16> (&outputs)[2]) {
  constexpr uint32_t kLow = 0x000f000f, kHigh = 0x00f000f0, k1024 = 0x64006400, kOne = 0x3c003c00,
                     kSixteenth = 0x2c002c00;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t shifted = word >> 4 * i;
    a[i] = fma2<Float16>(lop3<kMaskAndOr>(shifted, kLow, k1024), kOne, outputs[0].low);
    a[i + 1] = fma2<Float16>(lop3<kMaskAndOr>(shifted, kHigh, k1024), kSixteenth, outputs[1].high);
  }
}
__device__ __forceinline__ void move_far(uint32_t (&)[4], const Expand<Float16> (&)[2]) {}

// Two words to an m16n8k32 operand, as 16 (q - 8): the nibble with its first bit flipped, in the upper half
// of the byte. The factor goes when the sums are finished.
__device__ __forceinline__ void expand(uint32_t (&a)[4], uint32_t first, uint32_t second) {
  constexpr uint32_t kNibbles = 0xf0f0f0f0, kFlip = 0x80808080;
  a[0] = lop3<kMaskAndXor>(first << 4, kNibbles, kFlip);
  a[1] = lop3<kMaskAndXor>(first, kNibbles, kFlip);
  a[2] = lop3<kMaskAndXor>(second << 4, kNibbles, kFlip);
  a[3] = lop3<kMaskAndXor>(second, kNibbles, kFlip);
}

// ---- tables
// ---------------------------------------------------------------------------------------------------

// Entries of 16 bits are two numbers whose sum is the entry but for 2^-17 of it (float16: 2^-22), after a
// power of two that keeps sums finite where x · w are (float16: the second number precise).
template <typename T>
struct TableUnit;
template <>
struct TableUnit<BFloat16> {
  static constexpr float kUp = 1.0f / 256, kDown = 256.0f;
};
template <>
struct TableUnit<Float16> {
  static constexpr float kUp = 8192.0f, kDown = 1.0f / 8192;
};

// The block's tables to shared memory: [8 panels][2 halves][16 entries][32 lanes] words, lane 4g + t having
// the entries of output g, so that a warp's 32 look-ups meet no bank twice.
template <typename T>
__device__ __forceinline__ void spread_tables(uint4* tables, const Int4Call& call, int64_t first_panel,
                                              int64_t panels) {
  for (int i = threadIdx.x; i < kInt4Panels * kPanel * 16; i += kInt4Threads) {
    const int output = i / 16, entry = i % 16, panel = output / kPanel, row = output % kPanel;
    if (first_panel + panel >= panels) break;
    const auto* entries = reinterpret_cast<const float*>(
        call.packed + (first_panel + panel) * call.layout.panel_bytes() + Int4Fragments::tables_at());
    const float v = entries[row * 16 + entry] * TableUnit<T>::kUp;
    const uint32_t both = pack2<T>(v, 0.0f);
    const float2 first = unpack2<T>(both);
    const uint32_t word = pack2<T>(first.x, v - first.x);
    tables[((panel * 2 + row / 8) * 16 + entry) * 8 + row % 8] = make_uint4(word, word, word, word);
  }
}

// A word of codes to the two operands whose sum it stands for; `table` is the lane's, of the panel.
__device__ __forceinline__ void look_up(uint32_t (&first)[4], uint32_t (&second)[4], uint32_t word,
                                        const uint32_t* table) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t* half = table + i % 2 * 16 * kWarp;
    const uint32_t low = half[(word >> 4 * i & 15) * kWarp], high = half[(word >> 4 * (i + 4) & 15) * kWarp];
    first[i] = __byte_perm(low, high, 0x5410);
    second[i] = __byte_perm(low, high, 0x7632);
  }
}

// Of int8 entries four at a time: two picks of bytes by three bits of a nibble, and one between them by the
// fourth. `table` holds the 16 bytes of the first output and of the one 8 further.
__device__ __forceinline__ uint32_t pick(const uint4& table, uint32_t nibbles, uint32_t choice) {
  return __byte_perm(__byte_perm(table.x, table.y, nibbles), __byte_perm(table.z, table.w, nibbles), choice);
}
__device__ __forceinline__ void look_up(uint32_t (&a)[4], uint32_t first, uint32_t second,
                                        const uint4 (&table)[2]) {
  const uint32_t words[2] = {first, second};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t nibbles = words[i] & 0x77777777;
    const uint32_t choice = lop3<kMaskAndOr>(words[i] >> 1, 0x44444444, 0x32103210);
    a[2 * i] = pick(table[0], nibbles & 0xffff, choice & 0xffff);
    a[2 * i + 1] = pick(table[1], nibbles >> 16, choice >> 16);
  }
}

// ---- terms
// ----------------------------------------------------------------------------------------------------

// Of a segment's outputs: scale (x) and zero-point (y).
using Int4Term = float2;

// ---- x
// --------------------------------------------------------------------------------------------------------

// 16 bytes of a row of x into shared memory, zeros past the row's end.
template <typename T>
__device__ __forceinline__ void copy_piece(unsigned char* to, const T* row, int64_t column, int64_t columns,
                                           bool vector) {
  constexpr int kValues = 16 / sizeof(T);
  if (vector && column + kValues <= columns) {
    cp_async_16(to, row + column);
    return;
  }
  alignas(16) T values[kValues] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (column + i < columns) values[i] = row[column + i];
  }
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
}

// ---- products
// ------------------------------------------------------------------------------------------------

// A pair of 2^-7, or four ones of int8. Sums of x / 128 are finite where x is.
template <typename T>
struct Ones;
template <>
struct Ones<BFloat16> {
  static constexpr uint32_t kBits = 0x3c003c00;
  static constexpr float kInverse = 128.0f;
};
template <>
struct Ones<Float16> {
  static constexpr uint32_t kBits = 0x20002000;
  static constexpr float kInverse = 128.0f;
};
template <>
struct Ones<int8_t> {
  static constexpr uint32_t kBits = 0x01010101;
};

// Sums of a group; integers are exact.
template <typename T>
struct GroupSum {
  using Type = float;
};
template <>
struct GroupSum<int8_t> {
  using Type = int32_t;
};

// The second operand of 32 k-values: rows of x from `x` on, whose pieces begin at `piece`.
template <int kTiles, int kRowBytes>
__device__ __forceinline__ void load_rows(uint32_t (&b)[kTiles][2][2], const unsigned char* x, int piece) {
  const int lane = threadIdx.x % kWarp, row = lane % 8;
  const unsigned char* from = x + row * kRowBytes + ((piece + lane / 8) ^ row) * 16;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    uint32_t r[4];
    ldmatrix_x4(r, from + j * 8 * kRowBytes);
    b[j][0][0] = r[0], b[j][0][1] = r[1], b[j][1][0] = r[2], b[j][1][1] = r[3];
  }
}
// int8: 32 k-values are two pieces.
template <int kTiles, int kRowBytes>
__device__ __forceinline__ void load_rows(uint32_t (&b)[kTiles][1][2], const unsigned char* x, int piece) {
  const int lane = threadIdx.x % kWarp, row = lane % 8;
  const unsigned char* from = x + row * kRowBytes + ((piece + lane / 8 % 2) ^ row) * 16;
  if constexpr (kTiles == 1) {
    ldmatrix_x2(b[0][0], from);
  } else {
    from += lane / 16 * 8 * kRowBytes;
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t r[4];
      ldmatrix_x4(r, from + j * 8 * kRowBytes);
      b[j][0][0] = r[0], b[j][0][1] = r[1], b[j + 1][0][0] = r[2], b[j + 1][0][1] = r[3];
    }
  }
}

template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<T>(d, a, b);
}
template <typename T>
__device__ __forceinline__ void multiply(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k32(d, a, b);
}

// ---- results
// -------------------------------------------------------------------------------------------------

// Up to four neighbouring outputs of a row, from their sums; `shift`: what those of int8 are multiplied by.
template <bool kInt8>
__device__ __forceinline__ void finish(const Outputs& o, float4 sums, int64_t row, int64_t output,
                                       float shift) {
  float four[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
  for (int i = 0; i < 4 && kInt8; ++i) four[i] = __fmul_rn(four[i], shift);
  finish_four(o, load_columns(o, output, o.n), row, kInt8 ? o.x_scale[row] : 1.0f, four);
}

// Codes of int8 are 16 times as large but in tables.
template <Int4Form kForm>
constexpr float kShift = kForm == Int4Form::kTable ? 1.0f : 0.0625f;

// A tile's outputs from its sums, of which sums_at(row, output) are four, once all threads may ask: of all of
// K, or of this block's share of it; then the last block to come finishes the tile. `meet`: a barrier.
template <bool kInt8, int kRows, int kOutputs, typename SumsAt, typename Meet>
__device__ __forceinline__ void store_tile(const Int4Call& call, const SumsAt& sums_at, int64_t first_row,
                                           int64_t first_output, float shift, int thread, int threads,
                                           const Meet& meet) {
  const int rows = static_cast<int>(min(int64_t{kRows}, call.outputs.m - first_row));
  const int outputs = static_cast<int>(min(int64_t{kOutputs}, call.outputs.n - first_output));
  const auto each = [&](const auto& act) {  // four outputs of a row
    for (int i = thread; i < rows * (kOutputs / 4); i += threads) {
      const int row = i / (kOutputs / 4), output = i % (kOutputs / 4) * 4;
      if (output < outputs) act(row, output);
    }
  };
  if (call.splits == 1) {
    each([&](int row, int output) {
      finish<kInt8>(call.outputs, sums_at(row, output), first_row + row, first_output + output, shift);
    });
    return;
  }
  constexpr int64_t kTileSums = int64_t{kRows} * kOutputs;
  float* parts = call.partial + static_cast<int64_t>(blockIdx.x) * call.splits * kTileSums;
  each([&](int row, int output) {
    __stcg(reinterpret_cast<float4*>(parts + blockIdx.y * kTileSums + row * kOutputs + output),
           sums_at(row, output));
  });
  LISSOM_SHARED(bool, last, [1]);
  meet();
  if (thread == 0) {
    last[0] = atomic_add_acq_rel(call.counters + blockIdx.x, 1) == call.splits - 1;
    if (last[0]) call.counters[blockIdx.x] = 0;  // for the next launch
  }
  meet();
  if (!last[0]) return;
  each([&](int row, int output) {
    float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int split = 0; split < call.splits; ++split) {  // in the order of K, whoever is last
      const float4 part =
          __ldcg(reinterpret_cast<const float4*>(parts + split * kTileSums + row * kOutputs + output));
      all.x += part.x, all.y += part.y, all.z += part.z, all.w += part.w;
    }
    finish<kInt8>(call.outputs, all, first_row + row, first_output + output, shift);
  });
}

// Sums in shared memory, [rows][kInt4SumStride].
__device__ __forceinline__ auto sums_of_tile(const float* sums) {
  return [sums](int row, int output) {
    return *reinterpret_cast<const float4*>(sums + row * kInt4SumStride + output);
  };
}

// ---- the kernel
// ----------------------------------------------------------------------------------------------

// Grid (tiles, splits of K); T: of x as it is multiplied.
template <typename T, int kTiles, bool kDeep, Int4Form kForm>
__global__ void __launch_bounds__(kInt4Threads, kTiles <= 2 ? 2 : 1) int4_linear_kernel(Int4Call call) {
  using Tile = Int4Tile<T, kTiles, kDeep>;
  using Sum = typename GroupSum<T>::Type;
  constexpr bool kInt8 = sizeof(T) == 1;
  constexpr int kChunks = Tile::kChunks, kRowBytes = Tile::kRowBytes, kPieces = kRowBytes / 16;
  constexpr int kPanelsEach = kInt4PanelsPerWarp, kSteps = kInt8 ? 1 : 2;  // mma to 32 k-values
  const Int4Fragments& layout = call.layout;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int along = warp % kInt4WarpsAlongOutputs, across = warp / kInt4WarpsAlongOutputs;

  // Tiles of the same outputs come one after the other: what is in L2 of their codes is used again.
  const unsigned row_tiles = static_cast<unsigned>(ceil_div(call.outputs.m, Tile::kRows));
  const int64_t first_row = static_cast<int64_t>(blockIdx.x % row_tiles) * Tile::kRows;
  const int64_t first_panel = static_cast<int64_t>(blockIdx.x / row_tiles) * kInt4Panels;
  const int64_t panels = panel_count(call.outputs.n);
  const int64_t first_chunk = blockIdx.y * call.chunks;
  const int chunks = static_cast<int>(min(call.chunks, layout.chunks() - first_chunk));
  const int rows = static_cast<int>(min(int64_t{Tile::kRows}, call.outputs.m - first_row));

  const int chunk_bytes = layout.chunk_bytes(), term_bytes = layout.term_bytes();
  const int stage_bytes = Tile::stage_bytes(layout), ring_bytes = call.stages * stage_bytes;
  unsigned char* tables = dynamic_shared();
  unsigned char* row_terms = tables + (kForm == Int4Form::kTable && !kInt8 ? kInt4TableBytes : 0);
  unsigned char* stages = row_terms + (layout.one_group ? kInt4Panels * term_bytes : 0);

  // ---- copies
  const T* x = static_cast<const T*>(call.x) + first_row * call.x_stride;
  const int panel_of_warp = along * kPanelsEach;
  // Deep: both panels of a chunk of the warp's own; else one panel of the chunk for two warps. A panel past
  // the edge is the last one once more: what it gives is not stored.
  constexpr int kCopied = kDeep ? kPanelsEach : 1;
  const int own_chunk = kDeep ? across : 0, own_panel = panel_of_warp + (kDeep ? 0 : across);
  const int64_t mine = panels - first_panel - panel_of_warp;  // panels of this warp that are there
  const int64_t copied_panel = min(first_panel + own_panel, panels - 1);
  const int64_t panel_step = copied_panel + 1 < panels ? layout.panel_bytes() : 0;
  const uint8_t* codes_from = call.packed + copied_panel * layout.panel_bytes() + layout.header_bytes() +
                              (first_chunk + own_chunk) * chunk_bytes + lane * 16;
  int codes_to = Tile::kXBytes + (own_panel * kChunks + own_chunk) * chunk_bytes + lane * 16;
  // Pieces of terms, mostly 2 or 3 of a panel, are the first lanes' together.
  const int term_pieces = (chunk_bytes - kInt4CodeBytes) / 16;
  const auto term_offset = [&](int i) {  // of piece i, from the lane's codes on
    return kInt4CodeBytes + (i - (i >= term_pieces ? term_pieces : 0) - lane) * 16;
  };
  int term_at = term_offset(lane);
  if constexpr (kForm != Int4Form::kTable) {  // which has no registers to spare
    keep(codes_to);
    keep(term_at);
  }
  int64_t column = first_chunk * kInt4Chunk;
  int copy_step = 0, fill_at = 0;
  const auto start_stage = [&] {
    if (copy_step < chunks) {
      unsigned char* stage = stages + fill_at;
      for (int i = threadIdx.x; i < rows * kPieces; i += kInt4Threads) {
        const int row = i / kPieces, piece = i % kPieces;
        copy_piece(stage + row * kRowBytes + (piece ^ row % 8) * 16, x + row * call.x_stride,
                   column + piece * (16 / static_cast<int>(sizeof(T))), call.x_columns, call.x_vector);
      }
    }
    if (copy_step + own_chunk < chunks && mine > 0) {
      unsigned char* to = stages + (fill_at + codes_to);
#pragma unroll
      for (int p = 0; p < kCopied; ++p) {
        cp_async_16(to + p * kChunks * chunk_bytes, codes_from + p * panel_step);
        cp_async_16(to + p * kChunks * chunk_bytes + kInt4UnitBytes,
                    codes_from + p * panel_step + kInt4UnitBytes);
      }
      if (lane < kCopied * term_pieces) {
        const bool second = lane >= term_pieces;
        cp_async_16(to + (second ? kChunks * chunk_bytes : 0) + term_at,
                    codes_from + (second ? panel_step : 0) + term_at);
      }
#pragma unroll 1
      for (int i = lane + kWarp; i < kCopied * term_pieces; i += kWarp) {  // groups of 32 in float32
        const bool second = i >= term_pieces;
        cp_async_16(to + (second ? kChunks * chunk_bytes : 0) + term_offset(i),
                    codes_from + (second ? panel_step : 0) + term_offset(i));
      }
    }
    cp_async_commit();
    column += kChunks * kInt4Chunk;
    copy_step += kChunks;
    codes_from += kChunks * chunk_bytes;
    fill_at = fill_at + stage_bytes == ring_bytes ? 0 : fill_at + stage_bytes;
  };
  for (int i = 1; i < call.stages; ++i) start_stage();

  // ---- what is the same for all of K
  if constexpr (kForm == Int4Form::kTable && !kInt8) {
    spread_tables<T>(reinterpret_cast<uint4*>(tables), call, first_panel, panels);
  }
  if (layout.one_group) {
    const int pieces = term_bytes / 16;
    for (int i = threadIdx.x; i < kInt4Panels * pieces; i += kInt4Threads) {
      const int panel = i / pieces;
      if (first_panel + panel >= panels) break;
      reinterpret_cast<uint4*>(row_terms)[i] =
          *reinterpret_cast<const uint4*>(call.packed + (first_panel + panel) * layout.panel_bytes() +
                                          layout.row_terms_at() + i % pieces * 16);
    }
  }
  const int group = lane / 4, thread = lane % 4;  // as the fragments' drawings have them
  const auto header = [&](int p) {  // past the edge the last panel is read again; nothing is stored there
    return call.packed + (first_panel + panel_of_warp + (p < mine ? p : 0)) * layout.panel_bytes();
  };
  Expand<T> outputs[kPanelsEach][2] = {{Expand<T>(1.0f), Expand<T>(1.0f)},
                                       {Expand<T>(1.0f), Expand<T>(1.0f)}};
  uint4 int8_tables[kPanelsEach][2];
  if (mine > 0) {
#pragma unroll
    for (int p = 0; p < kPanelsEach; ++p) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if constexpr (kForm != Int4Form::kTable) {
          outputs[p][h] = Expand<T>(reinterpret_cast<const float*>(header(p))[group + 8 * h]);
        } else if constexpr (kInt8) {
          int8_tables[p][h] =
              reinterpret_cast<const uint4*>(header(p) + Int4Fragments::tables_at())[group + 8 * h];
        }
      }
    }
  }

  // ---- sums
  float total[kPanelsEach][kTiles][4] = {};
  Sum sum[kPanelsEach][kTiles][4];
  Sum sum_x[kTiles][4];  // with kSums; every lane has those of its rows
  bool far = false;
  const int segment_shift = layout.segment == 32 ? 0 : layout.segment == 64 ? 1 : 2;  // of blocks of 32
  const auto ends_segment = [&](int block) { return ((block + 1) & ((1 << segment_shift) - 1)) == 0; };
  // Of this lane, in a stage.
  int codes_of_lane = Tile::kXBytes + (panel_of_warp * kChunks + own_chunk) * chunk_bytes + lane * 16;
  keep(codes_of_lane);
  int use_at = 0;
  for (int step = 0; step < chunks; step += kChunks) {
    switch (call.stages) {  // the newest but one may still be on their way
      case 2: cp_async_wait<0>(); break;
      case 3: cp_async_wait<1>(); break;
      default: cp_async_wait<2>(); break;
    }
    __syncthreads();
    start_stage();  // where all have just finished
    const unsigned char* stage = stages + use_at;
    const unsigned char* codes_at = stages + (use_at + codes_of_lane);
    use_at = use_at + stage_bytes == ring_bytes ? 0 : use_at + stage_bytes;
    if (step + own_chunk >= chunks || mine <= 0 || (!kDeep && across * Tile::kWarpRows >= rows)) continue;

    const unsigned char* rows_at = stage + (kDeep ? 0 : across * Tile::kWarpRows * kRowBytes);
    const auto terms = [&](int p) {
      return reinterpret_cast<const Int4Term*>(
          layout.one_group ? row_terms + (panel_of_warp + p) * term_bytes
                           : codes_at + (p * kChunks * chunk_bytes + kInt4CodeBytes - lane * 16));
    };
    uint4 codes[kPanelsEach];
#pragma unroll
    for (int block = 0; block < kInt4Chunk / 32; ++block) {
      const int output = (block >> segment_shift) * kPanel + group;  // of the segment's terms; and 8 further
      if constexpr (!kInt8 && kForm == Int4Form::kPlain) {
        if (call.zeros == Int4Zeros::kInteger && (block == 0 || ends_segment(block - 1))) {
          far = take_zeros(outputs, terms, output);
        }
      }
      if (block == 0) {  // the compiler sees zeros here, and spends no instruction on them
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sum_x[j][i] = 0;
#pragma unroll
            for (int p = 0; p < kPanelsEach; ++p) sum[p][j][i] = 0;
          }
        }
      }
      if (block % 2 == 0) {
#pragma unroll
        for (int p = 0; p < kPanelsEach; ++p) {
          codes[p] = *reinterpret_cast<const uint4*>(codes_at + p * kChunks * chunk_bytes +
                                                     block / 2 * kInt4UnitBytes);
        }
      }
      uint32_t b[kTiles][kSteps][2];
      load_rows<kTiles, kRowBytes>(b, rows_at, (own_chunk * 4 + block) * 2 * kSteps);
#pragma unroll
      for (int p = 0; p < kPanelsEach; ++p) {
        const uint32_t words[2] = {block % 2 ? codes[p].z : codes[p].x, block % 2 ? codes[p].w : codes[p].y};
        if constexpr (kInt8) {
          uint32_t a[4];
          if constexpr (kForm == Int4Form::kTable) {
            look_up(a, words[0], words[1], int8_tables[p]);
          } else {
            expand(a, words[0], words[1]);
          }
#pragma unroll
          for (int j = 0; j < kTiles; ++j) multiply<T>(sum[p][j], a, b[j][0]);
        } else if constexpr (kForm == Int4Form::kTable) {
          const uint32_t* table =
              reinterpret_cast<const uint32_t*>(tables) + (panel_of_warp + p) * 32 * kWarp + lane;
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            uint32_t a[4], rest[4];
            look_up(a, rest, words[s], table);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              multiply<T>(sum[p][j], a, b[j][s]);
              multiply<T>(sum[p][j], rest, b[j][s]);
            }
          }
        } else {
          uint32_t a[kSteps][4];
#pragma unroll
          for (int s = 0; s < kSteps; ++s) expand(a[s], words[s], outputs[p]);
          if (kForm == Int4Form::kPlain && far) {  // the same for the whole warp
#pragma unroll
            for (int s = 0; s < kSteps; ++s) move_far(a[s], outputs[p]);
          }
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) multiply<T>(sum[p][j], a[s], b[j][s]);
          }
        }
      }
      if constexpr (kForm == Int4Form::kSums) {
        constexpr uint32_t kBits = Ones<T>::kBits;
        const uint32_t ones[4] = {kBits, kBits, kBits, kBits};
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
          for (int j = 0; j < kTiles; ++j) multiply<T>(sum_x[j], ones, b[j][s]);
        }
      }
      if (block != 3 && !ends_segment(block)) continue;

      // A segment is complete: its sums meet the others in float32.
#pragma unroll
      for (int p = 0; p < kPanelsEach; ++p) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Int4Term term = terms(p)[output + 8 * h];
          const float scale = term.x;
          [[maybe_unused]] const float zero = term.y;
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; ++i) {
              float& all = total[p][j][i];
              if constexpr (kInt8) {
                all = __fmaf_rn(static_cast<float>(sum[p][j][i]), scale, all);
                if constexpr (kForm == Int4Form::kSums) {  // 16 times: as the codes are
                  const float offset = __fmul_rn(__fmul_rn(scale, __fsub_rn(8.0f, zero)), 16.0f);
                  all = __fmaf_rn(static_cast<float>(sum_x[j][i % 2]), offset, all);
                }
              } else {
                float part = sum[p][j][i], rest = scale;
                if constexpr (kForm == Int4Form::kTable) {
                  rest *= TableUnit<T>::kDown;
                } else {
                  rest *= outputs[p][h].inverse_unit;
                }
                if constexpr (kForm == Int4Form::kSums) {
                  const float offset = (8.0f - zero) * outputs[p][h].unit() * Ones<T>::kInverse;
                  part = __fmaf_rn(sum_x[j][i % 2], offset, part);
                }
                all = __fmaf_rn(part, rest, all);
              }
              sum[p][j][i] = 0;
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_x[j][i] = 0;
      }
    }
  }

  // ---- through shared memory, so that a row's outputs are neighbours: sums [rows][128]
  cp_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int turn = 0; turn < (kDeep ? 2 : 1); ++turn) {
    if (!kDeep || turn == across) {
#pragma unroll
      for (int p = 0; p < kPanelsEach; ++p) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = (kDeep ? 0 : across * Tile::kWarpRows) + j * 8 + thread * 2 + i % 2;
            float& place = sums[row * kInt4SumStride + (panel_of_warp + p) * kPanel + group + i / 2 * 8];
            place = turn == 0 ? total[p][j][i] : place + total[p][j][i];
          }
        }
      }
    }
    __syncthreads();
  }

  store_tile<kInt8, Tile::kRows, kInt4Outputs>(call, sums_of_tile(sums), first_row, first_panel * kPanel,
                                               kShift<kForm>, threadIdx.x, kInt4Threads,
                                               [] { __syncthreads(); });
}

}  // namespace lissom::cuda
