// Hopper's own instructions (sm_90a): kernels that use them, and everything here, are compiled for no other
// GPU. Tests compile and disassemble them; for the emulator hopper_primitives.h has a twin of each. wgmma's
// shapes are added by the ops that use them.
#pragma once

#include "device.cuh"

namespace lissom::cuda {

// Where a tile lies that copy_tile brought through a tensor_map_128: rows of 128 bytes, eight of which repeat
// the swizzle (1024 bytes, on a multiple of which the tile starts). For columns further on, 32 bytes at a
// time, the address alone moves: hardware swizzles the sum.
LISSOM_HD constexpr uint64_t wgmma_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4)  // 16 bytes a unit, as all that follows
         | uint64_t{1} << 16          // of one column of swizzled tiles to the next: unused
         | uint64_t{1024 >> 4} << 32  // from eight rows to the next eight
         | uint64_t{1} << 62;         // 128-byte swizzle
}
static_assert(wgmma_descriptor(0x2400) == 0x4000004000010240ull, "fields of the PTX ISA's matrix descriptor");
static_assert(wgmma_descriptor(0x2420) - wgmma_descriptor(0x2400) == 2, "32 bytes further on");

// A place among the stages, and how often all of them were gone through: barriers tell odd from even.
template <int kStages>
struct Ring {
  int stage = 0, phase = 0;
  LISSOM_HD constexpr void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  LISSOM_HD constexpr void skip(int stages) {
    const unsigned all = static_cast<unsigned>(stage + stages);
    stage = static_cast<int>(all % kStages);
    phase ^= all / kStages & 1;
  }
};

}  // namespace lissom::cuda

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace lissom::cuda {

// ---- mbarrier: counts arrivals of threads and bytes of copies; waited for by phase (0, 1, 0, …)
// -------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// Shows initialised barriers to the copy engine and to the cluster; before the threads meet.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the place of `barrier` in block `rank` of the cluster. Without a scope of the cluster, which would be a
// fence for all of memory: enough where what the arrival tells of is that wgmma has read.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// One arrival that also announces bytes which copies will bring.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// ---- TMA
// ---------------------------------------------------------------------------------------------------

// A run of bytes (multiple of 16, addresses too) by the copy engine: one thread asks, no registers, no
// address arithmetic.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// A tile of a tensor map (CUtensorMap, a __grid_constant__ parameter); past the edges come zeros.
__device__ __forceinline__ void copy_tile(void* shared, const void* map, int column, int row,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// … to the same place in every block of the cluster that `blocks` has a bit for; each one's barrier, which
// lies at the same place too, counts the bytes that come there.
__device__ __forceinline__ void copy_tile_multicast(void* shared, const void* map, int column, int row,
                                                    uint64_t* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}
// What ordinary stores wrote to shared memory, for the copy engine and wgmma; before the threads meet.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- wgmma
// -------------------------------------------------------------------------------------------------

// Before the first wgmma and wherever registers of one were touched by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers move from the warps that copy to the warps that multiply.
template <int kRegisters>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The sums of a thread as an instruction's text names them, and as its operands: the compiler has no loop
// for either.
#define LISSOM_NAMES_32                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LISSOM_NAMES_64                                                                                    \
  LISSOM_NAMES_32                                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LISSOM_NAMES_128                                                                                   \
  LISSOM_NAMES_64                                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "     \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define LISSOM_SUMS_8(kind, d, i)                                                             \
  kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3]), kind(d[i + 4]), kind(d[i + 5]), \
      kind(d[i + 6]), kind(d[i + 7])
#define LISSOM_SUMS_32(kind, d, i)                                                          \
  LISSOM_SUMS_8(kind, d, i), LISSOM_SUMS_8(kind, d, i + 8), LISSOM_SUMS_8(kind, d, i + 16), \
      LISSOM_SUMS_8(kind, d, i + 24)
#define LISSOM_SUMS_64(kind, d, i) LISSOM_SUMS_32(kind, d, i), LISSOM_SUMS_32(kind, d, i + 32)
#define LISSOM_SUMS_128(kind, d, i) LISSOM_SUMS_64(kind, d, i), LISSOM_SUMS_64(kind, d, i + 64)

// D += A · Bᵀ of a warpgroup, A [64, 32 bytes] and B [n, 32 bytes] of T in shared memory, D in float32 or
// int32: rows 16 w … of warp w, in each of them as of mma_m16n8k16, element 4 j + i for columns 8 j ….
template <typename T>
__device__ void wgmma_m64n64(SumOf<T> (&d)[32], uint64_t a, uint64_t b);
template <typename T>
__device__ void wgmma_m64n128(SumOf<T> (&d)[64], uint64_t a, uint64_t b);

template <>
__device__ __forceinline__ void wgmma_m64n64<BFloat16>(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LISSOM_NAMES_32
               "}, "
               "%32, %33, 1, 1, 1, 0, 0;"
               : LISSOM_SUMS_32("+f", d, 0)
               : "l"(a), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma_m64n64<Float16>(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" LISSOM_NAMES_32
               "}, "
               "%32, %33, 1, 1, 1, 0, 0;"
               : LISSOM_SUMS_32("+f", d, 0)
               : "l"(a), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma_m64n64<int8_t>(int32_t (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" LISSOM_NAMES_32
               "}, "
               "%32, %33, 1;"
               : LISSOM_SUMS_32("+r", d, 0)
               : "l"(a), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma_m64n128<BFloat16>(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LISSOM_NAMES_64
               "}, "
               "%64, %65, 1, 1, 1, 0, 0;"
               : LISSOM_SUMS_64("+f", d, 0)
               : "l"(a), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma_m64n128<Float16>(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" LISSOM_NAMES_64
               "}, "
               "%64, %65, 1, 1, 1, 0, 0;"
               : LISSOM_SUMS_64("+f", d, 0)
               : "l"(a), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma_m64n128<int8_t>(int32_t (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" LISSOM_NAMES_64
               "}, "
               "%64, %65, 1;"
               : LISSOM_SUMS_64("+r", d, 0)
               : "l"(a), "l"(b));
}

// … with B [256, 32 bytes].
__device__ __forceinline__ void wgmma_m64n256(int32_t (&d)[128], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" LISSOM_NAMES_128
               "}, "
               "%128, %129, 1;\n"
               : LISSOM_SUMS_128("+r", d, 0)
               : "l"(a), "l"(b));
}

// D = A · Bᵀ, or D += A · Bᵀ, of a warpgroup, with A [64, 32 bytes] in registers: rows 16 w … of warp w, as
// of mma_m16n8k16 (int8: mma_m16n8k32). B [128, 32 bytes] and D as above.
template <typename T>
__device__ void wgmma_m64n128_of_registers(SumOf<T> (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                           int accumulate);

template <>
__device__ __forceinline__ void wgmma_m64n128_of_registers<BFloat16>(float (&d)[64], const uint32_t (&a)[4],
                                                                     uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LISSOM_NAMES_64
      "}, "
      "{%64, %65, %66, %67}, %68, accumulate, 1, 1, 0;\n"
      "}\n"
      : LISSOM_SUMS_64("+f", d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
template <>
__device__ __forceinline__ void wgmma_m64n128_of_registers<Float16>(float (&d)[64], const uint32_t (&a)[4],
                                                                    uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" LISSOM_NAMES_64
      "}, "
      "{%64, %65, %66, %67}, %68, accumulate, 1, 1, 0;\n"
      "}\n"
      : LISSOM_SUMS_64("+f", d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
template <>
__device__ __forceinline__ void wgmma_m64n128_of_registers<int8_t>(int32_t (&d)[64], const uint32_t (&a)[4],
                                                                   uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" LISSOM_NAMES_64
      "}, "
      "{%64, %65, %66, %67}, %68, accumulate;\n"
      "}\n"
      : LISSOM_SUMS_64("+r", d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#undef LISSOM_NAMES_32
#undef LISSOM_NAMES_64
#undef LISSOM_NAMES_128
#undef LISSOM_SUMS_8
#undef LISSOM_SUMS_32
#undef LISSOM_SUMS_64
#undef LISSOM_SUMS_128

// ---- clusters: blocks that see each other's shared memory
// ---------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// In two halves: what lies between them need not wait. Warps come as a whole.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// A float at the place of `mine` in the shared memory of block `rank`.
__device__ __forceinline__ float load_cluster(const float* mine, int rank) {
  float value;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [there];\n"
      "}\n"
      : "=f"(value)
      : "r"(shared_address(mine)), "r"(rank)
      : "memory");
  return value;
}
__device__ __forceinline__ double load_cluster(const double* mine, int rank) {
  double value;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %1, %2;\n"
      "ld.shared::cluster.f64 %0, [there];\n"
      "}\n"
      : "=d"(value)
      : "r"(shared_address(mine)), "r"(rank)
      : "memory");
  return value;
}

}  // namespace lissom::cuda

#endif
