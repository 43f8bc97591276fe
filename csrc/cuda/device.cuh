// What kernels are made of besides C++: the instructions that CUDA has no C++ name for. One function per
// instruction, each with the reason to use it. Tests compile the same kernels with g++, where
// tests/cuda_emulator stands in for this hardware. Hopper's own instructions are in hopper.cuh.
#pragma once

#include <type_traits>

#include "../common/formats.h"

namespace lissom::cuda {

// What tensor cores add up products of T in.
template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

}  // namespace lissom::cuda

#if defined(LISSOM_CUDA_EMULATOR)
#include "primitives.h"
#else

namespace lissom::cuda {

// Many instructions take 32-bit addresses within shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- the two 16-bit formats: bits only (common/formats.h), so that cuda_bf16.h's 10000 lines stay out
// ------

__device__ __forceinline__ float to_float(BFloat16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}

__device__ __forceinline__ float to_float(Float16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}

// Rounds to nearest even.
template <typename T>
__device__ T from_float(float v);

template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float v) {
  BFloat16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
  return r;
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float v) {
  Float16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
  return r;
}

// Two values in a register: one instruction for both where sm_80 converts single ones in three.
template <typename T>
__device__ uint32_t pack2(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack2<BFloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack2<Float16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

template <typename T>
__device__ float2 unpack2(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack2<BFloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack2<Float16>(uint32_t pair) {
  return make_float2(to_float(Float16{static_cast<uint16_t>(pair)}),
                     to_float(Float16{static_cast<uint16_t>(pair >> 16)}));
}

// a * b + c of two pairs: dequantizes two weights at once.
template <typename T>
__device__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);

template <>
__device__ __forceinline__ uint32_t fma2<BFloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
template <>
__device__ __forceinline__ uint32_t fma2<Float16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// The larger of each of two pairs, in one instruction; a number where the other one is NaN.
template <typename T>
__device__ uint32_t max2(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t max2<BFloat16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
__device__ __forceinline__ uint32_t max2<Float16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// 2^x in one instruction, within 2^-22 of the result (CUDA's programming guide has 2 units in the last place
// for what is made of it); below 2^-126 it is 0. exp2f() takes four for what lies there.
__device__ __forceinline__ float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// A value of a thread that a loop needs again and again: kept, where the compiler would rather compute it
// anew.
__device__ __forceinline__ void keep(int& value) { asm volatile("" : "+r"(value)); }

// Any function of three bits, by its truth table ((0xf0, 0xcc, 0xaa) are a, b, c): masks nibbles and sets an
// exponent in one instruction. The compiler finds it only sometimes.
template <int kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return r;
}

// The compiler moves no access to memory past this.
__device__ __forceinline__ void order_memory() { asm volatile("" ::: "memory"); }

// ---- memory
// ------------------------------------------------------------------------------------------------

// The shared memory that the launch asked for. 1024: what TMA's widest swizzle repeats after.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char lissom_dynamic_shared[];
  return lissom_dynamic_shared;
}

// Shared memory of fixed size: LISSOM_SHARED(float, partial, [4][33]);
#define LISSOM_SHARED(type, name, dims) __shared__ __align__(16) type name dims

// An address in global memory that is worked out once. To save registers the compiler does it anew in every
// step of a loop, which may take more instructions than the step's loads are.
__device__ __forceinline__ const void* keep_address(const void* p) {
  size_t at = __cvta_generic_to_global(p);
  asm("" : "+l"(at));
  return __cvta_global_to_generic(at);
}

// For what is read once, such as weights: through the read-only path, without a place in L1.
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_stream(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t load_stream(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// A kernel that overlaps the one before it in the stream (Launch::overlaps) begins while that ends: its
// blocks take the places that become free, and wait here. Before, nothing may be read or written that the
// other may write or read; to ask for it with prefetch_l2 is harmless, since L2 is where both see the same.
// Behind, the next kernel may begin likewise. Without the launch's attribute, and before sm_90, this does
// nothing.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// So many bytes, a multiple of 16 like the address, from memory to L2, while the thread goes on.
__device__ __forceinline__ void prefetch_l2(const void* p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  if (bytes > 0) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(bytes));
  }
#endif
}

// The 32 bytes around an address of global memory to L2, likewise; of any alignment.
__device__ __forceinline__ void prefetch_sector(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// What L2 should drop first (weights, read once a call) or last (activations, read by every block).
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t evict_last_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes from global to shared memory past the registers and L1, while the thread goes on; zeros where not
// valid (`global` must be a good address all the same). Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid, uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
      "l"(global), "r"(valid ? 16 : 0), "l"(policy)
      : "memory");
}
// 4 bytes, for rows that lie on no 16-byte boundary.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}
// A group: this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups are unfinished. A barrier shows them to the other threads.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Counters between blocks. Threads of a block first meet at __syncthreads(), then one of them counts: what
// the block wrote is seen by whoever sees the count. Fences would wait for all memory traffic; these do not.
__device__ __forceinline__ int atomic_add_acq_rel(int* p, int value) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}
__device__ __forceinline__ void add_release(int* p, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ int load_acquire(const int* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// Barriers 1 … 15 for some warps of a block (`threads` of them, those that only arrive included), so that
// producers and consumers do not wait for the rest.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- tensor cores
// ------------------------------------------------------------------------------------------

// Loads 8 x 8 matrices of 16-bit elements (or 8 x 16 bytes) from shared memory as mma wants them: lane i
// names row i % 8 of matrix i / 8, 16 bytes on a multiple of 16. Of each matrix lane t gets the 4 bytes (row
// t / 4, bytes 4 (t % 4) …); transposed the elements (rows 2 (t % 4) and + 1, column t / 4).
// ldmatrix_x4_at: of an address that was worked out before, where a loop would do so again for each load.
using SharedAddress = uint32_t;  // in the emulator a pointer
__device__ __forceinline__ SharedAddress shared_address_of(const void* p) { return shared_address(p); }
__device__ __forceinline__ void ldmatrix_x4_at(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  ldmatrix_x4_at(r, shared_address_of(row));
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// D += A · B of a warp, D [16, 8] in float32 or int32. With g = lane / 4, t = lane % 4, e = 2 (16-bit) or
// 4 (int8) elements to a register:
//   A [16, 8e]   register i: row g + 8 (i % 2),  columns  te + 4e (i / 2) …
//   B [8e, 8]    register i: column g,           rows     te + 4e i …
//   D [16, 8]    element i:  row g + 8 (i / 2),  column   2t + i % 2
template <typename T>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// int8; sums wrap, they do not saturate.
__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace lissom::cuda

#endif

// ---- written once on the above
// -----------------------------------------------------------------------------

namespace lissom::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float v) { return v; }

// Every lane of the warp gets the result, the same bits.
__device__ __forceinline__ int warp_max(int v) {
#pragma unroll
  for (int bit = kWarp / 2; bit; bit /= 2) v = max(v, __shfl_xor_sync(kAllLanes, v, bit));
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int bit = kWarp / 2; bit; bit /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, bit));
  return v;
}
template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int bit = kWarp / 2; bit; bit /= 2) v += __shfl_xor_sync(kAllLanes, v, bit);
  return v;
}

}  // namespace lissom::cuda
