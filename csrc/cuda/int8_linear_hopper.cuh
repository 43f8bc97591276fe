// Tiles of 128 x 256 outputs on Hopper's wgmma (sm_90a). On an H200 8192 x 8192 x 8192 took
// 773 us with the quantization before it: 1422 TOP/s (bench/results/gpu-nvidia-h200.md).
//
// Two blocks form a cluster and compute 256 x 256 outputs, rows shared out between them, columns the same:
//
//             weight: 256 rows         a stage is 128 columns of K (48 KB), four of them are 192 KB:
//          +-----------------------+     x [128, 128 bytes], each block's own
//   x: 128 | block 0, 2 warpgroups |     weight [256, 128 bytes], of which each block asks for one half and
//      128 | block 1, 2 warpgroups |     the copy engine writes it to both
//          +-----------------------+
//
// Multicast is what feeds them: at wgmma's peak (4096 products a cycle) a stage lasts 1024 cycles, in which a
// block alone would take 48 KB from L2 (48 bytes a cycle and multiprocessor; L2 is said to give some 40), the
// two take 32 KB each. Finishing a tile is by count some 3000 cycles of 65000 at K = 8192, partly behind the
// other warpgroup's products, which may lag by the stages there are.
//
// Warpgroup 0 copies (one thread of it; its registers go to the others), warpgroups 1 and 2 multiply, 64 rows
// each: 128 sums a thread. `full` barriers count the bytes of a stage, `empty` ones the 8 multiplying warps
// of both blocks, since either block's copies overwrite both. The grid is persistent: while the sums of a
// tile are finished, the stages of the next fill up.
#pragma once

#include "hopper.cuh"
#include "int8_linear_kernel.cuh"

#if defined(LISSOM_CUDA_EMULATOR)
#include "hopper_primitives.h"
#endif

namespace lissom::cuda {

struct HopperTile {
  static constexpr int kM = 128, kN = 256, kDepth = 128;  // of a block
  static constexpr int kCluster = 2;
  static constexpr int kStages = 4;
  static constexpr int kGroup = 128;                 // threads of a warpgroup
  static constexpr int kThreads = 3 * kGroup;        // one that copies, two that multiply
  static constexpr int kWarps = 2 * kGroup / kWarp;  // that multiply
  static constexpr int kXBytes = kM * kDepth, kHalfBytes = kN / kCluster * kDepth;
  static constexpr int kStageBytes = kXBytes + kCluster * kHalfBytes;
  static constexpr int kScratch = 16 * 64;  // sums of each warp, for finish_scratch
  static constexpr int kScratchAt = kStages * kStageBytes;
  static constexpr int kBarriersAt = kScratchAt + kWarps * kScratch * 4;
  static constexpr int kSharedBytes = kBarriersAt + 2 * kStages * 8;
  static_assert(kSharedBytes <= 227 << 10, "what a block can have");
  static_assert(kXBytes % 1024 == 0 && kHalfBytes % 1024 == 0, "the swizzle repeats after 1024 bytes");
};

// x: [m, k] through a tensor map, boxes of 128 rows; weight [n, k] likewise. tiles_m counts pairs of tiles.
__global__ void __launch_bounds__(HopperTile::kThreads, 1)
    hopper_tile_kernel([[maybe_unused]] const __grid_constant__ TensorMap x_map,
                       [[maybe_unused]] const __grid_constant__ TensorMap weight_map,
                       [[maybe_unused]] Outputs outputs, [[maybe_unused]] int64_t tiles_m,
                       [[maybe_unused]] int64_t tiles_n, [[maybe_unused]] int steps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LISSOM_CUDA_EMULATOR)
  using T = HopperTile;
  unsigned char* shared = dynamic_shared();
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + T::kBarriersAt);
  uint64_t* empty = full + T::kStages;
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, T::kCluster * T::kWarps);
    }
    mbarrier_init_fence();
  }
  cluster_sync();  // nobody arrives at barriers that are not there
  wait_for_previous_grid();

  const int64_t tiles = tiles_m * tiles_n, first = blockIdx.x / T::kCluster, stride = gridDim.x / T::kCluster;
  Ring<T::kStages> at;
  if (threadIdx.x < T::kGroup) {
    registers_down<40>();
    if (threadIdx.x == 0) {
      for (int64_t tile = first; tile < tiles; tile += stride) {
        const TilePlace place = tile_place(tile, tiles_m, tiles_n);
        const int row = static_cast<int>((place.row * T::kCluster + rank) * T::kM);
        const int column = static_cast<int>(place.column * T::kN + rank * (T::kN / T::kCluster));
        for (int step = 0; step < steps; ++step, at.next()) {
          unsigned char* stage = shared + at.stage * T::kStageBytes;
          mbarrier_wait(empty + at.stage, at.phase ^ 1);  // true at once the first time round
          mbarrier_expect(full + at.stage, T::kStageBytes);
          copy_tile(stage, &x_map, step * T::kDepth, row, full + at.stage);
          copy_tile_multicast(stage + T::kXBytes + rank * T::kHalfBytes, &weight_map, step * T::kDepth,
                              column, full + at.stage, (1 << T::kCluster) - 1);
        }
      }
    }
    __syncwarp();
  } else {
    registers_up<232>();
    const int group = threadIdx.x / T::kGroup - 1;  // of rows
    const int warp = threadIdx.x / kWarp - T::kGroup / kWarp, lane = threadIdx.x % kWarp;
    int32_t* scratch = reinterpret_cast<int32_t*>(shared + T::kScratchAt) + warp * T::kScratch;
    const auto release = [&](int stage) {  // to both blocks' copies
      if (lane < T::kCluster) mbarrier_arrive_cluster(empty + stage, lane);
    };
    for (int64_t tile = first; tile < tiles; tile += stride) {
      const TilePlace place = tile_place(tile, tiles_m, tiles_n);
      int32_t sum[T::kN / 2] = {};
      int previous = 0;
      for (int step = 0; step < steps; ++step, at.next()) {
        mbarrier_wait(full + at.stage, at.phase);
        const uint32_t x = shared_address(shared + at.stage * T::kStageBytes);
        const uint64_t a = wgmma_descriptor(x + group * (T::kXBytes / 2));
        const uint64_t b = wgmma_descriptor(x + T::kXBytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < T::kDepth / 32; ++k) wgmma_m64n256(sum, a + 2 * k, b + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();  // the step before has been multiplied
        if (step > 0) release(previous);
        previous = at.stage;
      }
      wgmma_wait<0>();
      release(previous);
      const int64_t row = (place.row * T::kCluster + rank) * T::kM + warp * 16;
      const float scale = lane_scale(outputs, row);
#pragma unroll 1
      for (int i = 0; i < T::kN / 64; ++i) {
        __syncwarp();  // what was there has been read
#pragma unroll
        for (int f = 0; f < T::kN / 64; ++f) {  // registers have no index
          if (f == i) write_scratch<8>(scratch, [&](int j, int e) { return sum[(8 * f + j) * 4 + e]; });
        }
        __syncwarp();
        finish_scratch<8>(outputs, scratch, row, place.column * T::kN + 64 * i, outputs.n, scale);
      }
    }
  }
  cluster_sync();  // the other block may still arrive here
#endif
}

}  // namespace lissom::cuda
