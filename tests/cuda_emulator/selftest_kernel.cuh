// Kernels that put single instructions of device.cuh to the test (tests/test_cuda_emulator.py has the
// formulas), and kernels with faults that the emulator has to find.
#pragma once

#include "activation.cuh"
#include "hopper.cuh"

#if defined(LISSOM_CUDA_EMULATOR)
#include "hopper_primitives.h"
#endif

namespace lissom::cuda {

// a [32, 4], b [32, 2], d [32, 4]: registers by lane.
__global__ void mma_kernel(int type, const uint32_t* a, const uint32_t* b, uint32_t* d) {
  const int lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[lane * 2 + i];
  if (type == 2) {
    int32_t sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = static_cast<int32_t>(d[lane * 4 + i]);
    mma_m16n8k32(sum, ra, rb);
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = static_cast<uint32_t>(sum[i]);
  } else {
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = __uint_as_float(d[lane * 4 + i]);
    type == 0 ? mma_m16n8k16<BFloat16>(sum, ra, rb) : mma_m16n8k16<Float16>(sum, ra, rb);
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = __float_as_uint(sum[i]);
  }
}

// data: 32 rows of 16 bytes; lane i names row rows[i]. r [32, count].
__global__ void ldmatrix_kernel(int count, bool transpose, const uint4* data, const int* rows, uint32_t* r) {
  LISSOM_SHARED(uint4, shared, [32]);
  const int lane = threadIdx.x;
  shared[lane] = data[lane];
  __syncthreads();
  uint32_t four[4] = {}, two[2] = {};
  const void* row = &shared[rows[lane]];
  if (count == 4) {
    transpose ? ldmatrix_x4_trans(four, row) : ldmatrix_x4(four, row);
  } else {
    transpose ? ldmatrix_x2_trans(two, row) : ldmatrix_x2(two, row);
  }
  for (int i = 0; i < count; ++i) r[lane * count + i] = count == 4 ? four[i] : two[i];
}

// out [6, 32]: up, down, xor, from a lane, sum, maximum of `in` in segments of `width`.
__global__ void shuffle_kernel(const int* in, int by, int width, int* out) {
  const int lane = threadIdx.x, v = in[lane];
  out[lane] = __shfl_up_sync(kAllLanes, v, by, width);
  out[32 + lane] = __shfl_down_sync(kAllLanes, v, by, width);
  out[64 + lane] = __shfl_xor_sync(kAllLanes, v, by, width);
  out[96 + lane] = __shfl_sync(kAllLanes, v, by, width);
  out[128 + lane] = warp_sum(v);
  out[160 + lane] = warp_max(v);
  out[192 + lane] = static_cast<int>(__ballot_sync(kAllLanes, v & 1));
}

// Sums of pieces of x by blocks, added up by the block that comes last: cp.async in two stages, a barrier, an
// acquire-release counter.
__global__ void sum_kernel(const float* x, int pieces, float* partial, int* counter, float* sum) {
  auto* stage = reinterpret_cast<float (*)[128]>(dynamic_shared());  // [2][128]
  LISSOM_SHARED(bool, last, [1]);
  const int t = threadIdx.x;
  const auto start = [&](int piece) {
    const bool valid = piece < pieces;
    if (t < 32)
      cp_async_16(&stage[piece % 2][t * 4], x + (valid ? blockIdx.x * pieces + piece : 0) * 128 + t * 4,
                  valid);
    cp_async_commit();
  };
  float mine = 0;
  start(0);
  for (int piece = 0; piece < pieces; ++piece) {
    start(piece + 1);
    cp_async_wait<1>();
    __syncthreads();
    mine += stage[piece % 2][t];
    __syncthreads();
  }
  cp_async_wait<0>();
  __syncthreads();
  stage[0][t] = mine;
  __syncthreads();
  if (t == 0) {
    float all = 0;
    for (int i = 0; i < 128; ++i) all += stage[0][i];
    partial[blockIdx.x] = all;
    last[0] = atomic_add_acq_rel(counter, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (last[0] && t == 0) {
    float all = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) all += partial[i];
    *sum = all;
  }
}

// Warps 0 and 1 produce, 2 and 3 consume, by two barriers of their own.
__global__ void named_barrier_kernel(int rounds, int* out) {
  LISSOM_SHARED(int, box, [64]);
  constexpr int kFull = 1, kEmpty = 2;
  const int t = threadIdx.x;
  for (int round = 0; round < rounds; ++round) {
    if (t < 64) {
      if (round) named_barrier_sync(kEmpty, 128);
      box[t] = round * 100 + t;
      named_barrier_arrive(kFull, 128);
    } else {
      named_barrier_sync(kFull, 128);
      out[round * 64 + t - 64] = box[127 - t];
      if (round + 1 < rounds) named_barrier_arrive(kEmpty, 128);
    }
  }
}

#if defined(LISSOM_CUDA_EMULATOR)
// Blocks of a cluster of `size` read what the next one wrote, static and dynamic shared memory in turn.
__global__ void cluster_kernel(int size, float* out) {
  LISSOM_SHARED(float, fixed, [64]);
  float* dynamic = reinterpret_cast<float*>(dynamic_shared());
  const int t = threadIdx.x, rank = cluster_rank();
  float* mine = t % 2 ? fixed + t : dynamic + t;
  *mine = static_cast<float>(blockIdx.x * 64 + t);
  cluster_sync();
  out[blockIdx.x * 64 + t] = load_cluster(mine, (rank + 1) % size);
  cluster_sync();
}
#endif

__global__ void activate_kernel(Activation function, const float* x, int64_t count, float* y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) y[i] = activate(function, x[i]);
}

// The larger of pairs of 16-bit floats; 2^x.
__global__ void max2_kernel(int type, const uint32_t* a, const uint32_t* b, int64_t count, uint32_t* larger) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) larger[i] = type == 0 ? max2<BFloat16>(a[i], b[i]) : max2<Float16>(a[i], b[i]);
}

__global__ void exp2_kernel(const float* x, int64_t count, float* y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) y[i] = exp2_approx(x[i]);
}

__global__ void fault_kernel(int fault, float* out) {
  LISSOM_SHARED(float, shared, [64]);
  const int t = threadIdx.x;
  uint32_t r[2] = {};
  switch (fault) {
    case 0: out[t] = shared[t]; break;  // never written
    case 1:                             // not waited for
      if (t < 16) cp_async_16(shared + 4 * t, out + 4 * t);
      cp_async_commit();
      __syncthreads();
      out[t] = shared[t];
      break;
    case 2:  // lanes of one warp at two places
      if (t % 2) {
        __syncwarp();
      } else {
        __shfl_sync(kAllLanes, t, 0);
      }
      break;
    case 3:  // one thread never comes
      if (t != 5) __syncthreads();
      if (t == 5) named_barrier_sync(3, 64);
      break;
    case 4:  // two barriers in the source
      if (t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 5:
      if (t != 9) __shfl_xor_sync(kAllLanes, t, 1);  // lane 9 has returned, or never comes
      break;
    case 6: ldmatrix_x2(r, shared + t); break;  // rows on no multiple of 16 bytes
    case 7:                                     // a barrier is missing: depends on the order
      shared[t] = static_cast<float>(t);
      out[t] = shared[63 - t];
      break;
    case 8: cp_async_16(out, out); break;  // into global memory
    case 9:                                // waits for another block
      while (load_acquire(reinterpret_cast<const int*>(out)) != 1) {
      }
      break;
    case 10: out[t] = dynamic_shared()[60 + t]; break;  // past the end
    default: break;
  }
}

// Only compiled: every instruction of hopper.cuh once. The body is what is guarded, since the host names
// kernels.
__global__ void __launch_bounds__(256, 1)
    hopper_kernel([[maybe_unused]] const float* x, [[maybe_unused]] const void* map,
                  [[maybe_unused]] float* y) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  LISSOM_SHARED(uint64_t, barrier, [1]);
  unsigned char* tile = dynamic_shared();
  const float* values = reinterpret_cast<const float*>(tile);
  threadIdx.x < 128 ? registers_up<160>() : registers_down<40>();
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 2);
    mbarrier_init_fence();
    mbarrier_expect(barrier, 2048);
    copy_bulk(tile, x, 1024, barrier);
    copy_tile(tile + 1024, map, 0, 0, barrier);
    mbarrier_arrive(barrier);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  fence_async_proxy();
  wgmma_fence();
  wgmma_commit();
  wgmma_wait<0>();
  cluster_sync();
  y[threadIdx.x] = load_cluster(values + threadIdx.x, cluster_rank() ^ 1);
  cluster_arrive();
  y[256] = static_cast<float>(load_cluster(reinterpret_cast<const double*>(values), cluster_rank() ^ 1));
  cluster_wait();
#endif
}

}  // namespace lissom::cuda
