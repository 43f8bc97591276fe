// Block-sparse products on Hopper: wgmma, tiles by the copy engine.
//
// A block of threads stays on its multiprocessor and takes tiles of 128 rows of x by 128 outputs of a line
// (256 by 64 where blocks are so low), in turns. A cluster of up to four has neighbouring tiles along the
// rows: they need the same values, of which each fetches its share for all. One thread asks for tiles of x
// and of the values, kStages ahead, and does not stop where a tile ends. Two warpgroups take every other tile
// each, and multiply one after the other ("ping-pong"): while one's sums are finished and stored, the tensor
// cores are the other's.
//
//   producer    for each block of the piece, kStep bytes of inputs at a time: wait for `empty`, which the
//               cluster's consumers complete; copy x to this block, a share of the values to all: this
//               block's `full` is completed by its own x and everybody's shares
//   consumers   wait for their `turn`; then for `full` and kStep / 32 wgmma for each 64 rows; when the wgmmas
//               of the stage before are done, `empty` for it, in all blocks. With the last wgmma issued it is
//               the other's turn. Sums leave through shared memory of a warp's own, 16 rows at a time.
//
//   stage       x [rows][kStep bytes], then values [outputs][kStep bytes], swizzled by kStep (128, or 64 for
//               int8 blocks of 64 inputs)
//
// By count: a stage of 128 x 128 x 64 in 16 bits is 512 cycles of the tensor cores, for which 32 KB are
// needed, 20 from the L2 cache: 40 bytes a cycle at their peak, 48 with two blocks in a cluster, 64 alone.
// What an L2 cache delivers bounds this: every byte of x serves the outputs of one line only, so with 64
// outputs it is 68 and more. Of shared memory the wgmmas read 96 bytes a cycle, 128 with 64 outputs, of the
// 128 that there are.
//
// On an H200 the form before this one, in which both warpgroups multiplied the same tile of 256 rows and then
// finished it, took 488, 306, 236 us for 8192 x 8192, 4096 rows, 50, 80, 90 % sparse (cuBLAS, dense: 675;
// Triton: 372, 177, 103): 630 us a density, which is more than cuBLAS's speed, and 173 us, whatever the
// density, in which 8 tiles a multiprocessor were finished, while nothing was multiplied. As it is now it has
// not run on a GPU.
//
// Turns of clusters go back and forth over the order of the tiles, longest pieces first, so that who had the
// longest of a round has the shortest of the next.
#pragma once

#include "block_sparse_linear_kernel.cuh"
#include "hopper.cuh"

#if defined(LISSOM_CUDA_EMULATOR)
#include "hopper_primitives.h"
#endif

namespace lissom::cuda {

template <int kFragments_, int kOutputs_, int kStep_, int kStages_>
struct BlockSparseHopperTile {
  static constexpr int kMostCluster = 4;          // blocks
  static constexpr int kGroups = 2;               // warpgroups that multiply, a tile each
  static constexpr int kFragments = kFragments_;  // of 64 rows
  static constexpr int kRows = 64 * kFragments, kOutputs = kOutputs_;
  static constexpr int kStep = kStep_;  // bytes
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = (1 + kGroups) * 128;
  static constexpr int kResident = 1;
  static constexpr int kStage = (kRows + kOutputs) * kStep;
  static constexpr int kPartOutputs = kOutputs / 2;  // of 16 rows, which leave a warp together
  static constexpr int kScratch = 16 * kPartOutputs;
  static constexpr int kShared = kStages * kStage + kGroups * 4 * kScratch * 4;
  static_assert(kShared + 1024 <= 227 << 10, "what a block can have, and its barriers");
  static_assert(kOutputs / kMostCluster % 8 == 0, "the swizzle repeats after 8 rows");
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

template <typename T>
__device__ __forceinline__ void multiply(SumOf<T> (&d)[64], uint64_t a, uint64_t b) {
  wgmma_m64n128<T>(d, a, b);
}
template <typename T>
__device__ __forceinline__ void multiply(SumOf<T> (&d)[32], uint64_t a, uint64_t b) {
  wgmma_m64n64<T>(d, a, b);
}

// The tiles of this cluster, in order. kAhead: where they are is loaded a tile ahead; else when it is asked
// for, which takes fewer registers.
template <bool kAhead>
struct BlockSparseTurns {
  const BlockSparseLinear& args;
  unsigned subs, tile_rows, together;  // rows of a cluster's tiles
  unsigned which, count, tiles;        // this cluster, of how many
  unsigned round = 0;                  // that looks
  BlockSparsePlace place, seen_place;
  BlockSparsePiece piece, seen_piece;

  __device__ __forceinline__ BlockSparseTurns(const BlockSparseLinear& args, unsigned subs,
                                              unsigned tile_rows, unsigned together, unsigned cluster)
      : args(args),
        subs(subs),
        tile_rows(tile_rows),
        together(together),
        which(blockIdx.x / cluster),
        count(gridDim.x / cluster),
        tiles(static_cast<unsigned>(args.piece_count) * subs * tile_rows) {
    if (kAhead) look();
  }
  __device__ __forceinline__ void look() {
    const unsigned tile = block_sparse_turn(round, which, count);
    seen_piece.line = -1;
    if (tile >= tiles) return;
    seen_place = block_sparse_place(tile, static_cast<unsigned>(args.piece_count), subs, tile_rows, together);
    seen_piece = load_piece(args.pieces, seen_place.piece);
  }
  // Whether there is one more tile.
  __device__ __forceinline__ bool next() {
    while (round * count < tiles) {
      if (!kAhead) look();
      place = seen_place;
      piece = seen_piece;
      ++round;
      if (kAhead) look();
      if (piece.line >= 0) return true;
    }
    return false;
  }
};

#endif

// cluster: blocks of one, along the rows. cluster_rows: rows of clusters' tiles.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    block_sparse_hopper_kernel([[maybe_unused]] const __grid_constant__ BlockSparseLinear args,
                               [[maybe_unused]] const __grid_constant__ Outputs outputs,
                               [[maybe_unused]] const __grid_constant__ TensorMap x_map,
                               [[maybe_unused]] const __grid_constant__ TensorMap values_map,
                               [[maybe_unused]] unsigned subs, [[maybe_unused]] unsigned cluster_rows,
                               [[maybe_unused]] int cluster) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LISSOM_CUDA_EMULATOR)
  using Sum = SumOf<T>;
  constexpr int kGroupWarps = 4, kGroupThreads = kGroupWarps * kWarp;
  const unsigned together = max(1u, tile_rows_together(Tile::kRows) / cluster);
  const int width = args.width * static_cast<int>(sizeof(T));  // all coordinates of columns are bytes
  LISSOM_SHARED(uint64_t, full, [Tile::kStages]);
  LISSOM_SHARED(uint64_t, empty, [Tile::kStages]);
  LISSOM_SHARED(uint64_t, turn, [Tile::kGroups]);
  LISSOM_SHARED(int, last, [Tile::kGroups]);
  unsigned char* stages = dynamic_shared();

  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, cluster * kGroupWarps);
    }
#pragma unroll
    for (int i = 0; i < Tile::kGroups; ++i) mbarrier_init(turn + i, kGroupWarps);
    mbarrier_init_fence();
  }
  cluster_sync();  // no copy and no arrival comes before the other blocks' barriers are there

  const int rank = cluster_rank();
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;  // -1: the producer's
  const int steps_of_block = width / Tile::kStep;
  Ring<Tile::kStages> ring;
  if (group < 0) {
    registers_down<40>();
    if (threadIdx.x == 0) {
      const int share = Tile::kOutputs / cluster;  // of the values, that a block fetches
      for (BlockSparseTurns<true> turns(args, subs, cluster_rows, together, cluster); turns.next();) {
        const BlockSparsePiece& piece = turns.piece;
        const int row = (turns.place.tile_row * cluster + rank) * Tile::kRows;
        const int output = turns.place.sub * Tile::kOutputs + rank * share;
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
            copy_tile_multicast(stage + (Tile::kRows + rank * share) * Tile::kStep, &values_map,
                                step * Tile::kStep, block * args.height + output, full + ring.stage,
                                static_cast<uint16_t>((1 << cluster) - 1));
            ring.next();
          }
          column = next_column;
        }
      }
    }
  } else {
    registers_up<232>();
    const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
    const int warp = thread / kWarp, lane = thread % kWarp;
    const uint64_t x_from = block_sparse_descriptor(shared_address(stages), Tile::kStep);
    const uint64_t values_from =
        block_sparse_descriptor(shared_address(stages) + Tile::kRows * Tile::kStep, Tile::kStep);
    constexpr int kUnit = 16;  // of addresses in descriptors
    const auto release = [&](int stage) {
      if (lane < cluster) mbarrier_arrive_cluster(empty + stage, lane);
    };
    Sum* scratch = reinterpret_cast<Sum*>(stages + Tile::kStages * Tile::kStage) +
                   (group * kGroupWarps + warp) * Tile::kScratch;

    int number = 0;  // of the tile
    for (BlockSparseTurns<false> turns(args, subs, cluster_rows, together, cluster); turns.next(); ++number) {
      const BlockSparsePiece piece = turns.piece;
      const BlockSparsePlace place = turns.place;
      const int steps = (piece.end - piece.begin) * steps_of_block;
      if (number % Tile::kGroups != group) {
        ring.skip(steps);
        continue;
      }
      Sum sum[Tile::kFragments][Tile::kOutputs / 2];
#pragma unroll
      for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
        for (int i = 0; i < Tile::kOutputs / 2; ++i) sum[f][i] = 0;
      }

      // The first group's first turn is there from the beginning.
      mbarrier_wait(turn + group, (number / Tile::kGroups + (group == 0 ? 1 : 0)) & 1);
      int before = 0;
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(full + ring.stage, ring.phase);
        const uint64_t offset = static_cast<uint64_t>(ring.stage * (Tile::kStage / kUnit));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < Tile::kStep / 32; ++k) {
#pragma unroll
          for (int f = 0; f < Tile::kFragments; ++f) {
            multiply<T>(sum[f], x_from + offset + (f * 64 * Tile::kStep + k * 32) / kUnit,
                        values_from + offset + k * 32 / kUnit);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (step) release(before);
        before = ring.stage;
        ring.next();
      }
      __syncwarp();  // a tile without steps: no lane still waits while the others' turn comes round
      if (lane == 0) mbarrier_arrive(turn + (group ^ 1));
      wgmma_wait<0>();
      if (steps) release(before);

      // Sums of pieces as the registers have them, [part][fours of registers][thread].
      const int64_t tile_row = static_cast<int64_t>(place.tile_row) * cluster + rank;
      if (piece.parts > 1) {
        constexpr int kFours = Tile::kFragments * Tile::kOutputs / 8;
        const int64_t tiles = static_cast<int64_t>(subs) * cluster_rows * cluster;
        const int64_t tile = tile_row * subs + place.sub;
        Four<Sum>* const partial = static_cast<Four<Sum>*>(args.partial) +
                                   (piece.slot * tiles + tile) * (kFours * kGroupThreads) + thread;
        Four<Sum>* const mine = partial + piece.part * tiles * (kFours * kGroupThreads);
        const auto four = [&](int i) -> Sum* {
          return sum[i / (Tile::kOutputs / 8)] + i % (Tile::kOutputs / 8) * 4;
        };
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          Sum* s = four(i);
          mine[i * kGroupThreads] = {s[0], s[1], s[2], s[3]};
          s[0] = s[1] = s[2] = s[3] = 0;
        }
        named_barrier_sync(1 + group, kGroupThreads);
        if (thread == 0) last[group] = is_last(args.arrived + piece.slot * tiles + tile, piece.parts);
        named_barrier_sync(1 + group, kGroupThreads);
        if (!last[group]) continue;
#pragma unroll 1
        for (int part = 0; part < piece.parts; ++part) {  // in their order; others wrote them: not through L1
          const Four<Sum>* const from = partial + part * tiles * (kFours * kGroupThreads);
#pragma unroll
          for (int i = 0; i < kFours; ++i) {
            if (i % 8 == 0) order_memory();  // registers are there for 8 on their way
            const Four<Sum> v = __ldcg(from + i * kGroupThreads);
            Sum* s = four(i);
            s[0] += v.x, s[1] += v.y, s[2] += v.z, s[3] += v.w;
          }
        }
      }

      // The loop is not unrolled, what is written in it is chosen: one copy of what finishes.
      constexpr int kAcross = Tile::kOutputs / Tile::kPartOutputs, kPartFours = Tile::kPartOutputs / 8;
      const int64_t line_end = static_cast<int64_t>(piece.line + 1) * args.height;
      const int64_t end = line_end < outputs.n ? line_end : outputs.n;
      const int64_t first_output =
          static_cast<int64_t>(piece.line) * args.height + place.sub * Tile::kOutputs;
#pragma unroll 1
      for (int part = 0; part < Tile::kFragments * kAcross; ++part) {
        __syncwarp();  // what was there has been read
#pragma unroll
        for (int known = 0; known < Tile::kFragments * kAcross; ++known) {
          if (part != known) continue;
          write_scratch<kPartFours>(scratch, [&](int j, int e) {
            return sum[known / kAcross][(known % kAcross * kPartFours + j) * 4 + e];
          });
        }
        __syncwarp();
        const int64_t row = tile_row * Tile::kRows + part / kAcross * 64 + warp * 16;
        finish_scratch<kPartFours>(outputs, scratch, row, first_output + part % kAcross * Tile::kPartOutputs,
                                   end, lane_scale(outputs, row));
      }
    }
  }
  __syncwarp();
  cluster_sync();  // until nothing comes to this block's shared memory any more
#endif
}

}  // namespace lissom::cuda
