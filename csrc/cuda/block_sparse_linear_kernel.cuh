// Block-sparse products on tensor cores by mma.sync, and what all forms end with.
//
// A block of threads has a tile of rows of x times outputs of one line (a row of stored blocks), and goes
// over the blocks of a piece of it: the stored inputs side by side, 64 bytes of each row and output a stage,
// or up to 256 where few rows make little of them.
// Blocks may be of any width that is a multiple of 16 bytes: a thread copies the same 16 of those bytes in
// every stage, and keeps the block they belong to, so that x is gathered by nothing but the address of a
// cp.async.
//
//   stage   x [rows][64 bytes], then values [outputs][64 bytes]; chunk c of row r lies at c ^ (r / 2 % 4),
//           with longer rows at c ^ (r % 8), so that 8 rows of a chunk, which ldmatrix reads at once, and 8
//           chunks of two rows, which cp.async writes, are in 8 different groups of banks
//   warps   each has a part of the tile, 64 x 64 in the large ones: 16 ldmatrix for 64 mma
//   end     sums go through shared memory (where the stages were), so that 4 neighbours are one thread's, are
//           finished in a loop, and leave as whole lines of memory
//
// By count, not yet measured: of a 128 x 128 tile, an mma takes a multiprocessor of sm_80 2 cycles, 64 x 64 x
// 16 64 cycles; its 8 ldmatrix read 4 KB in 32 cycles, and its share of the copies writes 2 KB in 16: shared
// memory is busy 75 % of the time that tensor cores are, the L2 cache delivers 16 KB for 1024 cycles' work.
// Two blocks on a multiprocessor hide each other's beginning and end.
//
// A line that is longer than its share of the work is cut into pieces. Their sums go to memory, and whoever
// comes last adds them in their order.
#pragma once

#include <type_traits>

#include "block_sparse_linear.h"
#include "outputs.cuh"

namespace lissom::cuda {

constexpr int kChunkBytes = 16;  // of a copy
constexpr int kSumPadding = 8;   // floats after a row of sums: 4 rows of fragments in different banks

// Rows of tiles that follow each other, of `rows` rows of x each: 1024, which are 16 MB of 16-bit x at 8192
// columns, stay in the L2 cache while all lines go over them. At most 8: then the values stay there too.
LISSOM_HD constexpr unsigned tile_rows_together(int rows) { return rows > 128 ? 1024 / rows : 8; }

template <int kWarpsDown_, int kWarpsAcross_, int kWarpRows_, int kWarpOutputs_, int kStageBytes_,
          int kStages_, int kResident_>
struct BlockSparseTile {
  static constexpr int kWarpsDown = kWarpsDown_, kWarpsAcross = kWarpsAcross_;
  static constexpr int kWarpRows = kWarpRows_, kWarpOutputs = kWarpOutputs_;
  static constexpr int kStageBytes = kStageBytes_;  // of a row
  static constexpr int kStageChunks = kStageBytes / kChunkBytes;
  static constexpr int kStages = kStages_;
  static constexpr int kResident = kResident_;  // blocks on a multiprocessor
  static constexpr int kThreads = kWarpsDown * kWarpsAcross * kWarp;
  static constexpr int kRows = kWarpsDown * kWarpRows, kOutputs = kWarpsAcross * kWarpOutputs;
  static constexpr int kStage = (kRows + kOutputs) * kStageBytes;
  static constexpr int kSums = kRows * (kOutputs + kSumPadding) * 4;
  static constexpr int kShared = kStages * kStage > kSums ? kStages * kStage : kSums;
};

// Where chunk `chunk` of row `row` lies in a stage with rows of 64, 128 or 256 bytes, in bytes.
LISSOM_HD constexpr int stage_offset(int row_bytes, int row, int chunk) {
  return row * row_bytes + (chunk ^ (row_bytes == 64 ? row / 2 % 4 : row % 8)) * kChunkBytes;
}

// ---- which tile
// ----------------------------------------------------------------------------------------------

struct BlockSparsePlace {
  int tile_row;
  int piece;
  int sub;  // which outputs of the line
};

// Tile `tile` of `pieces` x `subs` x `tile_rows`: `together` rows of tiles at a time, piece by piece, so that
// the longest pieces come first within them.
LISSOM_HD constexpr BlockSparsePlace block_sparse_place(unsigned tile, unsigned pieces, unsigned subs,
                                                        unsigned tile_rows, unsigned together) {
  const unsigned across = pieces * subs, group = together * across;
  const unsigned first = tile / group * together, rest = tile % group;
  const unsigned height = tile_rows - first < together ? tile_rows - first : together;
  const unsigned part = rest / height;
  return {static_cast<int>(first + rest % height), static_cast<int>(part / subs),
          static_cast<int>(part % subs)};
}

__device__ __forceinline__ BlockSparsePiece load_piece(const BlockSparsePiece* pieces, int piece) {
  const int4* at = reinterpret_cast<const int4*>(pieces + piece);
  const int4 low = __ldg(at), high = __ldg(at + 1);
  return {low.x, low.y, low.z, low.w, high.x, high.y, {}};
}

// Counts one of `parts`. Whoever is last leaves the counter as it was, for the next launch.
__device__ __forceinline__ bool is_last(int32_t* arrived, int parts) {
  const bool last = atomic_add_acq_rel(arrived, 1) == parts - 1;
  if (last) *arrived = 0;
  return last;
}

// ---- from sums to y
// ------------------------------------------------------------------------------------------

// Sums of a tile: [kRows][kOutputs + kSumPadding], from row `first_row` of x and output `first_output` of the
// layer on; outputs from `end_output` on are another line's. Every thread has four outputs, of every
// kThreads / (kOutputs / 4)-th row.
template <typename Sum, int kRows, int kOutputs, int kThreads>
struct BlockSparseSums {
  static constexpr int kAcross = kOutputs / 4, kDown = kThreads / kAcross;
  static constexpr int kPitch = kOutputs + kSumPadding;
  static_assert(kThreads % kAcross == 0 && kRows % kDown == 0, "whole rows at a time");
  using Four = lissom::cuda::Four<Sum>;

  const Outputs& outputs;
  Sum* sums;
  int64_t first_row, first_output, end_output;
  int thread;

  __device__ __forceinline__ int row(int i) const { return thread / kAcross + i * kDown; }
  __device__ __forceinline__ int column() const { return thread % kAcross * 4; }
  __device__ __forceinline__ Four* four(int i) const {
    return reinterpret_cast<Four*>(sums + row(i) * kPitch + column());
  }

  static __device__ __forceinline__ Four add(const Four& a, const Four& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
  }

  // To partial sums.
  __device__ __forceinline__ void save(Sum* partial) const {
#pragma unroll 4
    for (int i = 0; i < kRows / kDown; ++i) {
      if (first_row + row(i) < outputs.m)
        *reinterpret_cast<Four*>(partial + row(i) * kOutputs + column()) = *four(i);
    }
  }

  // Adds up `parts` of them, in order. Other blocks wrote them: not through L1. Several rows of two parts are
  // on their way at a time.
  __device__ __forceinline__ void collect(const Sum* partial, int parts, int64_t part_stride) const {
    constexpr int kTogether = kRows / kDown < 8 ? kRows / kDown : 8;
    static_assert(kRows / kDown % kTogether == 0, "no rest");
    for (int part = 0; part < parts; part += 2, partial += 2 * part_stride) {
      const bool two = part + 1 < parts;
#pragma unroll 1
      for (int first = 0; first < kRows / kDown; first += kTogether) {
        Four one[kTogether], other[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          one[i] = other[i] = Four{};
          if (first_row + row(first + i) >= outputs.m) continue;
          const Sum* at = partial + row(first + i) * kOutputs + column();
          one[i] = __ldcg(reinterpret_cast<const Four*>(at));
          if (two) other[i] = __ldcg(reinterpret_cast<const Four*>(at + part_stride));
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          Four sum = part ? add(*four(first + i), one[i]) : one[i];
          *four(first + i) = two ? add(sum, other[i]) : sum;
        }
      }
    }
  }

  template <typename T, bool kActivate>
  __device__ __forceinline__ void finish_as() const {
    const FourColumns columns = load_columns(outputs, first_output + column(), min(end_output, outputs.n));
    T* y = static_cast<T*>(outputs.y) + columns.first;
#pragma unroll(kActivate ? 1 : 4)
    for (int i = 0; i < kRows / kDown; ++i) {
      const int64_t m = first_row + row(i);
      const bool there = m < outputs.m;
      const float x_scale = outputs.x_scale == nullptr ? 1.0f : there ? outputs.x_scale[m] : 0.0f;
      const Four sum = *four(i);
      const Sum by_number[4] = {sum.x, sum.y, sum.z, sum.w};
      float v[4];
      compute_four<kActivate>(outputs, columns, x_scale, by_number, v);
      if (there) store_four(outputs, y + m * outputs.n, columns, v);
    }
  }
  __device__ __forceinline__ void finish() const {
    for_outputs(outputs, [&](auto type, auto activate) { finish_as<decltype(type), activate>(); });
  }
};

// ---- the product
// ---------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void multiply(SumOf<T> (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, int8_t>) {
    mma_m16n8k32(d, a, b);
  } else {
    mma_m16n8k16<T>(d, a, b);
  }
}

// What a thread copies: 16 bytes of every kApart-th row of x and output, of a stage after the other. Rows
// stay in registers, as pointers and as bits for whether they are there: integer arithmetic in 64 bits is
// slow, and would be done for every copy.
template <typename T, typename Tile>
struct BlockSparseCopies {
  static constexpr int kStageBytes = Tile::kStageBytes, kStageChunks = Tile::kStageChunks;
  static constexpr int kApart = Tile::kThreads / kStageChunks;
  static constexpr int kXCopies = (Tile::kRows + kApart - 1) / kApart;
  static constexpr int kValueCopies = (Tile::kOutputs + kApart - 1) / kApart;
  static_assert(Tile::kOutputs % kApart == 0 && kApart % 8 == 0, "rows apart are swizzled alike");

  const BlockSparseLinear& args;
  const char* x[kXCopies];
  const char* values[kValueCopies];
  unsigned x_valid = 0, values_valid = 0;
  int chunks;        // of a row of a block
  int skip, rest;    // a stage further: whole blocks, and chunks
  int block, inner;  // where the thread is
  int end;           // of the piece
  int column;        // of `block`; loaded a stage ahead: no copy waits for it

  __device__ __forceinline__ BlockSparseCopies(const BlockSparseLinear& args, const BlockSparsePiece& piece,
                                               int64_t first_row, int first_output)
      : args(args), end(piece.end) {
    constexpr int64_t kItem = sizeof(T);
    const int chunk = static_cast<int>(threadIdx.x) % kStageChunks;
    const int row = static_cast<int>(threadIdx.x) / kStageChunks;
    chunks = args.width * static_cast<int>(kItem) / kChunkBytes;
    skip = kStageChunks / chunks;
    rest = kStageChunks % chunks;
    block = piece.begin + chunk / chunks;
    inner = chunk % chunks;
    column = block < end ? __ldg(args.block_columns + block) : 0;
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      const int64_t m = first_row + row + i * kApart;
      const bool there = m < args.m;  // of few rows none is read that is not there
      x[i] = static_cast<const char*>(args.x) + (there ? m : 0) * args.x_stride * kItem;
      x_valid |= static_cast<unsigned>(there) << i;
    }
#pragma unroll
    for (int i = 0; i < kValueCopies; ++i) {
      const int output = first_output + row + i * kApart;
      const bool there = output < args.height;
      values[i] = static_cast<const char*>(args.values) + (there ? output : 0) * kItem * args.width;
      values_valid |= static_cast<unsigned>(there) << i;
    }
  }

  __device__ __forceinline__ void next(unsigned char* stage) {
    constexpr int64_t kItem = sizeof(T);
    const int chunk = static_cast<int>(threadIdx.x) % kStageChunks;
    const int row = static_cast<int>(threadIdx.x) / kStageChunks;
    unsigned char* to = stage + stage_offset(kStageBytes, row, chunk);

    const bool inside = block < end;
    const int64_t k = (static_cast<int64_t>(column) * chunks + inner) * kChunkBytes;
    const bool met = inside && k < args.columns * kItem;
    const int64_t x_at = met ? k : 0;
    const unsigned x_copied = met ? x_valid : 0;
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      if (Tile::kRows % kApart && row + i * kApart >= Tile::kRows) break;
      cp_async_16(to + i * kApart * kStageBytes, x[i] + x_at, (x_copied & 1u << i) != 0);
    }

    to += Tile::kRows * kStageBytes;
    const int64_t values_at = inside ? static_cast<int64_t>(block) * args.height * args.width * kItem +
                                           static_cast<int64_t>(inner) * kChunkBytes
                                     : 0;
    const unsigned values_copied = inside ? values_valid : 0;
#pragma unroll
    for (int i = 0; i < kValueCopies; ++i) {
      cp_async_16(to + i * kApart * kStageBytes, values[i] + values_at, (values_copied & 1u << i) != 0);
    }

    block += skip;
    inner += rest;
    if (inner >= chunks) {
      inner -= chunks;
      ++block;
    }
    column = block < end ? __ldg(args.block_columns + block) : 0;
  }
};

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    block_sparse_kernel(BlockSparseLinear args, Outputs outputs, unsigned subs, unsigned tile_rows) {
  using Sum = SumOf<T>;
  constexpr int kFragmentsDown = Tile::kWarpRows / 16, kFragmentsAcross = Tile::kWarpOutputs / 8;
  static_assert(kFragmentsAcross % 2 == 0, "one ldmatrix for two fragments of values");
  constexpr int kStageBytes = Tile::kStageBytes;

  const BlockSparsePlace place = block_sparse_place(blockIdx.x, static_cast<unsigned>(args.piece_count), subs,
                                                    tile_rows, tile_rows_together(Tile::kRows));
  const BlockSparsePiece piece = load_piece(args.pieces, place.piece);
  if (piece.line < 0) return;
  const int64_t first_row = static_cast<int64_t>(place.tile_row) * Tile::kRows;
  const int first_output = place.sub * Tile::kOutputs;

  unsigned char* stages = dynamic_shared();
  BlockSparseCopies<T, Tile> copies(args, piece, first_row, first_output);
  const int steps = static_cast<int>(
      ceil_div(static_cast<int64_t>(piece.end - piece.begin) * copies.chunks, Tile::kStageChunks));
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (stage < steps) copies.next(stages + stage * Tile::kStage);
    cp_async_commit();
  }

  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_row = warp / Tile::kWarpsAcross * Tile::kWarpRows;
  const int warp_output = warp % Tile::kWarpsAcross * Tile::kWarpOutputs;
  // Rows of fragments 16 apart are swizzled alike; bytes `at` of a stage lie at ^ further.
  const int x_at = stage_offset(kStageBytes, warp_row + lane % 16, lane / 16);
  const int values_at = Tile::kRows * kStageBytes +
                        stage_offset(kStageBytes, warp_output + lane % 8 + lane / 16 * 8, lane / 8 % 2);

  Sum sum[kFragmentsDown][kFragmentsAcross][4] = {};
  int read = 0, write = Tile::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this stage is there for all, and the one before it was read by all
    if (step + Tile::kStages - 1 < steps) copies.next(stages + write * Tile::kStage);
    cp_async_commit();
    const unsigned char* stage = stages + read * Tile::kStage;
    read = read + 1 == Tile::kStages ? 0 : read + 1;
    write = write + 1 == Tile::kStages ? 0 : write + 1;
#pragma unroll
    for (int at = 0; at < kStageBytes; at += 32) {
      uint32_t a[kFragmentsDown][4], b[kFragmentsAcross / 2][4];
#pragma unroll
      for (int i = 0; i < kFragmentsDown; ++i) ldmatrix_x4(a[i], stage + (x_at ^ at) + i * 16 * kStageBytes);
#pragma unroll
      for (int j = 0; j < kFragmentsAcross / 2; ++j)
        ldmatrix_x4(b[j], stage + (values_at ^ at) + j * 16 * kStageBytes);
#pragma unroll
      for (int i = 0; i < kFragmentsDown; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentsAcross; ++j) {
          const uint32_t both[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply<T>(sum[i][j], a[i], both);
        }
      }
    }
  }

  cp_async_wait<0>();
  __syncthreads();
  const BlockSparseSums<Sum, Tile::kRows, Tile::kOutputs, Tile::kThreads> sums = {
      outputs,
      reinterpret_cast<Sum*>(stages),
      first_row,
      static_cast<int64_t>(piece.line) * args.height + first_output,
      static_cast<int64_t>(piece.line + 1) * args.height,
      static_cast<int>(threadIdx.x)};
#pragma unroll
  for (int i = 0; i < kFragmentsDown; ++i) {
#pragma unroll
    for (int j = 0; j < kFragmentsAcross; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Sum* to = sums.sums + (warp_row + i * 16 + half * 8 + lane / 4) * sums.kPitch + warp_output + j * 8 +
                  lane % 4 * 2;
        *reinterpret_cast<Two<Sum>*>(to) = make_two(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
      }
    }
  }
  __syncthreads();

  if (piece.parts > 1) {
    constexpr int64_t kElements = Tile::kRows * Tile::kOutputs;
    const int64_t tiles = static_cast<int64_t>(subs) * tile_rows;
    const int64_t tile = static_cast<int64_t>(place.tile_row) * subs + place.sub;
    Sum* partial = static_cast<Sum*>(args.partial) + (piece.slot * tiles + tile) * kElements;
    sums.save(partial + piece.part * tiles * kElements);
    LISSOM_SHARED(bool, last, [1]);
    __syncthreads();
    if (threadIdx.x == 0) last[0] = is_last(args.arrived + piece.slot * tiles + tile, piece.parts);
    __syncthreads();
    if (!last[0]) return;
    sums.collect(partial, piece.parts, tiles * kElements);
  }
  sums.finish();
}

}  // namespace lissom::cuda
