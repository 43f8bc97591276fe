// CUDA's own names for g++: qualifiers, vector types, built-in variables, and the intrinsics that kernels of
// csrc/cuda use. What is missing here is added here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "runtime.h"

#define __global__ inline  // a header with a kernel may be included twice
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __align__(n) alignas(n)

#define threadIdx (::lissom::emulator::self().index)
#define blockIdx (::lissom::emulator::self().block->index)
#define blockDim (::lissom::emulator::machine().block)
#define gridDim (::lissom::emulator::machine().grid)
constexpr int warpSize = 32;

// ---- vector types ----------------------------------------------------------------------------------------

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- synchronisation -------------------------------------------------------------------------------------

inline void __syncthreads(LISSOM_SITE) { lissom::emulator::meet_block("__syncthreads", site, 0, 0, true); }

inline void __syncwarp(unsigned mask = 0xffffffffu, LISSOM_SITE) {
  int nothing = 0;
  lissom::emulator::meet_warp("__syncwarp", site, mask, nothing, [](int* const*) {});
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned, LISSOM_SITE) { lissom::emulator::spin("__nanosleep", site); }

namespace lissom::emulator {

// from(lane) says whose value a lane of a segment of `width` gets; outside of the segment it keeps its own.
template <typename T, typename From>
T shuffle(const char* what, Site site, unsigned mask, T value, int width, From from) {
  struct Bring {
    T value, result;
    int from;
  };
  const int lane = self().lane(), base = lane / width * width;
  const int source = from(lane - base);
  Bring bring{value, value, source < 0 || source >= width ? lane : base + source};
  meet_warp(what, site, mask, bring, [&](Bring* const* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      if (!lanes[i]) continue;
      if (!lanes[lanes[i]->from])
        error(what, " reads lane ", lanes[i]->from, " outside of its mask, ", site.file, ':', site.line);
      lanes[i]->result = lanes[lanes[i]->from]->value;
    }
  });
  return bring.result;
}

inline unsigned ballot(const char* what, Site site, unsigned mask, bool vote) {
  struct Bring {
    bool vote;
    unsigned result;
  } bring{vote, 0};
  meet_warp(what, site, mask, bring, [](Bring* const* lanes) {
    unsigned all = 0;
    for (int i = 0; i < kWarp; ++i) all |= lanes[i] && lanes[i]->vote ? 1u << i : 0u;
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i]) lanes[i]->result = all;
    }
  });
  return bring.result;
}

}  // namespace lissom::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, LISSOM_SITE) {
  return lissom::emulator::shuffle("__shfl_sync", site, mask, value, width,
                                   [=](int) { return lane & (width - 1); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, LISSOM_SITE) {
  return lissom::emulator::shuffle("__shfl_xor_sync", site, mask, value, width,
                                   [=](int me) { return me ^ bits; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, LISSOM_SITE) {
  return lissom::emulator::shuffle("__shfl_down_sync", site, mask, value, width,
                                   [=](int me) { return me + static_cast<int>(by); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, LISSOM_SITE) {
  return lissom::emulator::shuffle("__shfl_up_sync", site, mask, value, width,
                                   [=](int me) { return me - static_cast<int>(by); });
}
inline unsigned __ballot_sync(unsigned mask, int vote, LISSOM_SITE) {
  return lissom::emulator::ballot("__ballot_sync", site, mask, vote != 0);
}
inline int __any_sync(unsigned mask, int vote, LISSOM_SITE) {
  return lissom::emulator::ballot("__any_sync", site, mask, vote != 0) != 0;
}
inline int __all_sync(unsigned mask, int vote, LISSOM_SITE) {
  return lissom::emulator::ballot("__all_sync", site, mask, vote == 0) == 0;
}

// ---- memory ----------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}

template <typename T>
T atomicExch(T* p, T value) {
  return std::exchange(*p, value);
}
template <typename T>
T atomicAdd(T* p, T value) {
  return std::exchange(*p, static_cast<T>(*p + value));
}
template <typename T>
T atomicMax(T* p, T value) {
  return std::exchange(*p, *p < value ? value : *p);
}
template <typename T>
T atomicMin(T* p, T value) {
  return std::exchange(*p, value < *p ? value : *p);
}
template <typename T>
T atomicOr(T* p, T value) {
  return std::exchange(*p, *p | value);
}
template <typename T>
T atomicCAS(T* p, T compare, T value) {
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}

// ---- arithmetic ------------------------------------------------------------------------------------------

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __log2f(float a) { return std::log2(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }

inline uint32_t __float_as_uint(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  return bits;
}
inline int32_t __float_as_int(float a) { return static_cast<int32_t>(__float_as_uint(a)); }
inline float __uint_as_float(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, 4);
  return a;
}
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

// cvt.rni / cvt.rzi: NaN is 0, what does not fit is the nearest that does.
inline int __float2int_saturated(float a) {
  if (a != a) return 0;
  if (a >= 2147483648.0f) return std::numeric_limits<int>::max();
  if (a < -2147483648.0f) return std::numeric_limits<int>::min();
  return static_cast<int>(a);
}
inline int __float2int_rn(float a) { return __float2int_saturated(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return __float2int_saturated(std::trunc(a)); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }

inline int64_t __double_as_longlong(double a) {
  int64_t bits;
  std::memcpy(&bits, &a, 8);
  return bits;
}
inline double __longlong_as_double(int64_t bits) {
  double a;
  std::memcpy(&a, &bits, 8);
  return a;
}

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }

// Byte i of the result is byte (selector >> 4i & 7) of b:a; bit 3 of the selector repeats its sign.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> 4 * i & 15;
    uint32_t byte = both >> 8 * (pick & 7) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

inline int __dp4a(int a, int b, int c) {
  uint32_t sum = static_cast<uint32_t>(c);
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<uint32_t>(static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i));
  }
  return static_cast<int>(sum);
}
