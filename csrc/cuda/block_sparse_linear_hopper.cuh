// Block-sparse products on Hopper: wgmma, tiles by the copy engine. Right on an H200, and slower than
// Triton's kernel there (bench/results/gpu-nvidia-h200.md); why was not looked into yet.
//
// A block of threads stays on its multiprocessor and takes tiles of 256 rows of x and 64 or 128 outputs of a
// line, in turns. Two of them form a cluster, whose tiles are neighbours along the rows: they need the same
// values, each fetches half of them for both. One thread asks for tiles of x and of the values, kStages
// ahead, and does not stop where a tile ends; two warpgroups multiply 128 rows each:
//
//   producer    for each block of the piece, kStep bytes of inputs at a time: wait for `empty`, which both
//               blocks' consumers complete; copy x to this block, half of the values to both: this block's
//               `full` is completed by its own x and two halves
//   consumers   wait for `full`; two m64 of kStep / 32 wgmma each; when the wgmmas of the stage before are
//               done, `empty` for it, in both blocks. Sums leave through shared memory of a warp's own, 16
//               rows of 32 outputs at a time, while the next stages arrive.
//
//   stage       x [256][kStep bytes], then values [outputs][kStep bytes], swizzled by kStep (128, or 64 for
//               int8 blocks of 64 inputs)
//
// By count: a stage of 256 x 128 x 64 in bfloat16 is 1024 cycles of the tensor cores and takes 40 KB from the
// L2 cache: 40 bytes a cycle at their peak, 28 at the 700 TFLOP/s that dense products reach. (Without the
// cluster it would be 48 and 34; with 128 x 128 tiles 64 and 45.) What an L2 cache delivers bounds this:
// every byte of x serves the outputs of one line only, so with 64 outputs it is 72 and 51. Of shared memory
// the wgmmas read 96 bytes a cycle, 128 with 64 outputs, of the 128 that there are.
//
// Turns go back and forth over the order of the tiles, longest pieces first, so that who had the longest of a
// round has the shortest of the next.
#pragma once

#include "block_sparse_linear_kernel.cuh"
#include "hopper.cuh"

#if defined(LISSOM_CUDA_EMULATOR)
#include "hopper_primitives.h"
#endif

namespace lissom::cuda {

template <int kOutputs_, int kStep_, int kStages_>
struct BlockSparseHopperTile {
  static constexpr int kCluster = 2;      // blocks
  static constexpr int kGroups = 2;       // warpgroups that multiply
  static constexpr int kGroupRows = 128;  // rows of each
  static constexpr int kRows = kGroups * kGroupRows, kOutputs = kOutputs_;
  static constexpr int kStep = kStep_;  // bytes
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = (1 + kGroups) * 128;
  static constexpr int kResident = 1;
  static constexpr int kStage = (kRows + kOutputs) * kStep;
  // Through which sums of a warp leave: 16 rows of 32 outputs.
  static constexpr int kPartRows = 16, kPartOutputs = 32;
  static constexpr int kPart = kPartRows * (kPartOutputs + kSumPadding) * 4;
  static constexpr int kShared = kStages * kStage + kGroups * 4 * kPart;
};

// As wgmma_descriptor(), of rows of 64 or 128 bytes that TMA swizzled by as many.
LISSOM_HD constexpr uint64_t block_sparse_descriptor(uint32_t address, int row_bytes) {
  if (row_bytes == 128) return wgmma_descriptor(address);
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | uint64_t{1} << 16  // unused
         | uint64_t{8 * 64 >> 4} << 32 | uint64_t{2} << 62;                    // 64-byte swizzle
}

// What the `which`-th of `count` takes in round `round`.
LISSOM_HD constexpr unsigned block_sparse_turn(unsigned round, unsigned which, unsigned count) {
  return round * count + (round % 2 ? count - 1 - which : which);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LISSOM_CUDA_EMULATOR)

__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b) { wgmma_m64n128(d, a, b); }
__device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b) { wgmma_m64n64(d, a, b); }
__device__ __forceinline__ void multiply(int32_t (&d)[64], uint64_t a, uint64_t b) { wgmma_m64n128(d, a, b); }
__device__ __forceinline__ void multiply(int32_t (&d)[32], uint64_t a, uint64_t b) { wgmma_m64n64(d, a, b); }

// The tiles of this cluster, in order; where they are is loaded a tile ahead.
struct BlockSparseTurns {
  const BlockSparseLinear& args;
  unsigned subs, tile_rows, together;  // rows of a cluster's tiles
  unsigned which, count, tiles;        // this cluster, of how many
  unsigned round = 0;                  // of `next_…`
  BlockSparsePlace place, next_place;
  BlockSparsePiece piece, next_piece;

  __device__ __forceinline__ BlockSparseTurns(const BlockSparseLinear& args, unsigned subs,
                                              unsigned tile_rows, unsigned together, unsigned cluster)
      : args(args),
        subs(subs),
        tile_rows(tile_rows),
        together(together),
        which(blockIdx.x / cluster),
        count(gridDim.x / cluster),
        tiles(static_cast<unsigned>(args.piece_count) * subs * tile_rows) {
    look();
  }
  __device__ __forceinline__ void look() {
    const unsigned tile = block_sparse_turn(round, which, count);
    next_piece.line = -1;
    if (tile >= tiles) return;
    next_place = block_sparse_place(tile, static_cast<unsigned>(args.piece_count), subs, tile_rows, together);
    next_piece = load_piece(args.pieces, next_place.piece);
  }
  // Whether there is one more round; its piece has line -1 where there is no tile.
  __device__ __forceinline__ bool next() {
    if (round * count >= tiles) return false;
    place = next_place;
    piece = next_piece;
    ++round;
    look();
    return true;
  }
};

// A place among the stages, and how often all of them were gone through: barriers tell odd from even.
template <int kStages>
struct Ring {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

#endif

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    block_sparse_hopper_kernel([[maybe_unused]] const __grid_constant__ BlockSparseLinear args,
                               [[maybe_unused]] const __grid_constant__ TensorMap x_map,
                               [[maybe_unused]] const __grid_constant__ TensorMap values_map,
                               [[maybe_unused]] unsigned subs, [[maybe_unused]] unsigned cluster_rows) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LISSOM_CUDA_EMULATOR)
  using Sum = SumOf<T>;
  constexpr int kConsumerWarps = Tile::kGroups * 4;
  constexpr unsigned kTogether = tile_rows_together(Tile::kCluster * Tile::kRows);
  constexpr int kShare = Tile::kOutputs / Tile::kCluster;      // of the values, that a block fetches
  const int width = args.width * static_cast<int>(sizeof(T));  // all coordinates of columns are bytes
  LISSOM_SHARED(uint64_t, full, [Tile::kStages]);
  LISSOM_SHARED(uint64_t, empty, [Tile::kStages]);
  LISSOM_SHARED(int, last, [1]);
  unsigned char* stages = dynamic_shared();

  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, Tile::kCluster * kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  cluster_sync();  // no copy and no arrival comes before the other block's barriers are there

  const int rank = cluster_rank();
  const int group = static_cast<int>(threadIdx.x) / 128 - 1;  // -1: the producer's
  const int steps_of_block = width / Tile::kStep;
  Ring<Tile::kStages> ring;
  if (group < 0) {
    registers_down<40>();
    if (threadIdx.x == 0) {
      for (BlockSparseTurns turns(args, subs, cluster_rows, kTogether, Tile::kCluster); turns.next();) {
        const BlockSparsePiece& piece = turns.piece;
        if (piece.line < 0) continue;
        const int row = (turns.place.tile_row * Tile::kCluster + rank) * Tile::kRows;
        const int output = turns.place.sub * Tile::kOutputs + rank * kShare;
        int column = piece.begin < piece.end ? __ldg(args.block_columns + piece.begin) : 0;
#pragma unroll 1
        for (int block = piece.begin; block < piece.end; ++block) {
          const int next_column = block + 1 < piece.end ? __ldg(args.block_columns + block + 1) : 0;
#pragma unroll 1
          for (int step = 0; step < steps_of_block; ++step) {
            unsigned char* stage = stages + ring.stage * Tile::kStage;
            mbarrier_wait(empty + ring.stage, ring.phase ^ 1);
            mbarrier_expect(full + ring.stage, Tile::kStage);
            copy_tile(stage, &x_map, column * width + step * Tile::kStep, row, full + ring.stage);
            copy_tile_multicast(stage + (Tile::kRows + rank * kShare) * Tile::kStep, &values_map,
                                step * Tile::kStep, block * args.height + output, full + ring.stage,
                                (1 << Tile::kCluster) - 1);
            ring.next();
          }
          column = next_column;
        }
      }
    }
  } else {
    registers_up<232>();
    const int warp = static_cast<int>(threadIdx.x) / kWarp % 4, lane = static_cast<int>(threadIdx.x) % kWarp;
    const uint64_t x_from =
        block_sparse_descriptor(shared_address(stages) + group * Tile::kGroupRows * Tile::kStep, Tile::kStep);
    const uint64_t values_from =
        block_sparse_descriptor(shared_address(stages) + Tile::kRows * Tile::kStep, Tile::kStep);
    constexpr int kUnit = 16;  // of addresses in descriptors

    Sum* part_sums =
        reinterpret_cast<Sum*>(stages + Tile::kStages * Tile::kStage + (group * 4 + warp) * Tile::kPart);
    using Two = std::conditional_t<std::is_same_v<Sum, float>, float2, int2>;
    using Part = BlockSparseSums<Sum, Tile::kPartRows, Tile::kPartOutputs, kWarp, Tile::kOutputs>;
    constexpr int kAcross = Tile::kOutputs / Tile::kPartOutputs;  // parts of 16 rows

    for (BlockSparseTurns turns(args, subs, cluster_rows, kTogether, Tile::kCluster); turns.next();) {
      const BlockSparsePiece piece = turns.piece;
      const BlockSparsePlace place = turns.place;
      if (piece.line < 0) continue;
      Sum sum[2][Tile::kOutputs / 2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < Tile::kOutputs / 2; ++i) sum[half][i] = 0;
      }

      const int steps = (piece.end - piece.begin) * steps_of_block;
      int before = 0;
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(full + ring.stage, ring.phase);
        const uint64_t offset = static_cast<uint64_t>(ring.stage * (Tile::kStage / kUnit));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < Tile::kStep / 32; ++k) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            multiply(sum[half], x_from + offset + (half * 64 * Tile::kStep + k * 32) / kUnit,
                     values_from + offset + k * 32 / kUnit);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (step && lane < Tile::kCluster) mbarrier_arrive_cluster(empty + before, lane);
        before = ring.stage;
        ring.next();
      }
      wgmma_wait<0>();
      if (steps && lane < Tile::kCluster) mbarrier_arrive_cluster(empty + before, lane);

      // Part p: 16 rows of one m64, 32 outputs. The loop is not unrolled, what is written in it is chosen:
      // one copy of what finishes.
      const bool whole = piece.parts == 1;
      const int64_t tiles = static_cast<int64_t>(subs) * cluster_rows * Tile::kCluster;
      const int64_t tile_row = static_cast<int64_t>(place.tile_row) * Tile::kCluster + rank;
      const int64_t tile = tile_row * subs + place.sub;
      constexpr int64_t kElements = Tile::kRows * Tile::kOutputs;
      Sum* partial = static_cast<Sum*>(args.partial) + (piece.slot * tiles + tile) * kElements;
      const auto part_row = [&](int p) { return group * Tile::kGroupRows + p / kAcross * 64 + warp * 16; };
      const auto part_at = [&](int p) {
        const int output = place.sub * Tile::kOutputs + p % kAcross * Tile::kPartOutputs;
        return Part{args,
                    part_sums,
                    tile_row * Tile::kRows + part_row(p),
                    static_cast<int64_t>(piece.line) * args.height + output,
                    static_cast<int64_t>(piece.line + 1) * args.height,
                    lane};
      };
#pragma unroll 1
      for (int p = 0; p < 2 * kAcross; ++p) {
#pragma unroll
        for (int known = 0; known < 2 * kAcross; ++known) {
          if (p != known) continue;
#pragma unroll
          for (int j = 0; j < Tile::kPartOutputs / 8; ++j) {
            const Sum* four = sum[known / kAcross] + (known % kAcross * (Tile::kPartOutputs / 8) + j) * 4;
            Sum* to = part_sums + lane / 4 * Part::kPitch + j * 8 + lane % 4 * 2;
            *reinterpret_cast<Two*>(to) = {four[0], four[1]};
            *reinterpret_cast<Two*>(to + 8 * Part::kPitch) = {four[2], four[3]};
          }
        }
        __syncwarp();
        const Part part = part_at(p);
        if (whole) {
          part.finish();
        } else {
          part.save(partial + piece.part * tiles * kElements + part_row(p) * Tile::kOutputs +
                    p % kAcross * Tile::kPartOutputs);
        }
        __syncwarp();
      }
      if (whole) continue;

      constexpr int kBarrier = 1;
      named_barrier_sync(kBarrier, Tile::kGroups * 128);
      if (group == 0 && warp == 0 && lane == 0) {
        last[0] = is_last(args.arrived + piece.slot * tiles + tile, piece.parts);
      }
      named_barrier_sync(kBarrier, Tile::kGroups * 128);
      if (!last[0]) continue;
#pragma unroll 1
      for (int p = 0; p < 2 * kAcross; ++p) {
        const Part part = part_at(p);
        part.collect(partial + part_row(p) * Tile::kOutputs + p % kAcross * Tile::kPartOutputs, piece.parts,
                     tiles * kElements);
        part.finish();  // each thread what it collected
      }
    }
  }
  __syncwarp();
  cluster_sync();  // until nothing comes to this block's shared memory any more
#endif
}

}  // namespace lissom::cuda
