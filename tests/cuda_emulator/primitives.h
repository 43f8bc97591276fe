// The instructions of csrc/cuda/device.cuh, in C++: layouts of lanes and fragments as the PTX ISA has them
// (sections "Matrix fragments for mma.m16n8k16", "… mma.m16n8k32" and "ldmatrix").
#pragma once

#include "../../csrc/common/formats.h"
#include "cuda_names.h"

namespace lissom::cuda {

// ---- the two 16-bit formats ------------------------------------------------------------------------------

inline float to_float(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }

inline float to_float(Float16 v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float sign = v.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? __uint_as_float(0x7fffffffu) : sign * __uint_as_float(0x7f800000u);
  return sign * (exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                          : std::ldexp(static_cast<float>(fraction), -24));
}

template <typename T>
T from_float(float v);

template <>
inline float from_float<float>(float v) {
  return v;
}

template <>
inline BFloat16 from_float<BFloat16>(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float v) {
  const uint16_t sign = __float_as_uint(v) >> 16 & 0x8000;
  const float size = std::fabs(v);
  if (v != v) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 0x1p-14f)
    return {static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(size * 0x1p24f)))};
  const uint32_t bits = __float_as_uint(size) - (112u << 23);
  return {static_cast<uint16_t>(sign | (bits + 0xfffu + (bits >> 13 & 1)) >> 13)};
}

template <typename T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
float2 unpack2(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

template <typename T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const float2 x = unpack2<T>(a), y = unpack2<T>(b), z = unpack2<T>(c);
  return pack2<T>(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}

template <typename T>
uint32_t max2(uint32_t a, uint32_t b) {
  const float2 x = unpack2<T>(a), y = unpack2<T>(b);
  return pack2<T>(std::fmax(x.x, y.x), std::fmax(x.y, y.y));
}

// Off by as much as a GPU's may be, up or down by the bits of the exponent: what is within its bounds here is
// so with every exp2 that a GPU may have. Near 0 a GPU's is exact, too.
inline float exp2_approx(float x) {
  const double exact = std::exp2(static_cast<double>(x));
  if (!(exact >= 0x1p-126)) return x != x ? x : 0.0f;
  const uint32_t bits = __float_as_uint(x);
  const double error = std::fabs(x) > 0x1p-20f ? ((bits ^ bits >> 7) & 1 ? 0x1p-22 : -0x1p-22) : 0.0;
  return static_cast<float>(exact * (1.0 + error));
}
inline void keep(int&) {}

template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if (kTable >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

// ---- memory ----------------------------------------------------------------------------------------------

inline unsigned char* dynamic_shared() { return emulator::dynamic_shared(); }
#define LISSOM_SHARED(type, name, dims) \
  using name##_type = type dims;        \
  static const char name##_key = 0;     \
  name##_type& name = ::lissom::emulator::static_shared<name##_type>(&name##_key)

inline void order_memory() {}
inline const void* keep_address(const void* p) { return p; }

template <typename T>
T load_stream(const T* p, LISSOM_SITE) {
  emulator::check_aligned("load_stream", site, p, sizeof(T));
  return *p;
}

inline void wait_for_previous_grid() {}
// Read, so that an address that is none shows under ASan.
inline void prefetch_sector(const void* p) { (void)*static_cast<const volatile unsigned char*>(p); }
inline void prefetch_l2(const void* p, uint32_t bytes, LISSOM_SITE) {
  emulator::check_aligned("prefetch_l2", site, p, 16);
  // All of it must be there.
  volatile const char* at = static_cast<const char*>(p);
  for (uint32_t i = 0; i < bytes; i += 16) (void)at[i], (void)at[i + 15];
}

inline uint64_t evict_first_policy() { return 1; }
inline uint64_t evict_last_policy() { return 2; }

inline void cp_async_16(void* shared, const void* global, bool valid = true, LISSOM_SITE) {
  emulator::start_copy(site, shared, global, 16, valid ? 16 : 0);
}
inline void cp_async_16(void* shared, const void* global, bool valid, uint64_t, LISSOM_SITE) {
  emulator::start_copy(site, shared, global, 16, valid ? 16 : 0);
}
inline void cp_async_4(void* shared, const void* global, bool valid = true, LISSOM_SITE) {
  emulator::start_copy(site, shared, global, 4, valid ? 4 : 0);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulator::finish_copies(kPending);
}

inline int atomic_add_acq_rel(int* p, int value) { return atomicAdd(p, value); }
inline void add_release(int* p, int value) { *p += value; }
inline int load_acquire(const int* p, LISSOM_SITE) {
  emulator::spin("load_acquire", site);
  return *p;
}

inline void named_barrier_sync(int id, int threads, LISSOM_SITE) {
  emulator::meet_block("named_barrier_sync", site, id, threads, true);
}
inline void named_barrier_arrive(int id, int threads, LISSOM_SITE) {
  emulator::meet_block("named_barrier_arrive", site, id, threads, false);
}

// ---- ldmatrix --------------------------------------------------------------------------------------------

// Matrix i is made of the rows at the addresses of lanes 8i … 8i+7. Lane t gets of it the pair of 16-bit
// elements (row t / 4, columns 2 (t % 4) and + 1); transposed: (rows 2 (t % 4) and + 1, column t / 4).
template <int kCount, bool kTranspose>
void ldmatrix(const char* what, emulator::Site site, uint32_t (&r)[kCount], const void* row) {
  struct Bring {
    const void* row;
    uint32_t* r;
  } bring{row, r};
  emulator::meet_warp(what, site, 0xffffffffu, bring, [&](Bring* const* lanes) {
    for (int i = 0; i < kCount; ++i) {
      const uint16_t* rows[8];
      for (int j = 0; j < 8; ++j) {
        rows[j] = static_cast<const uint16_t*>(lanes[8 * i + j]->row);
        emulator::check_aligned(what, site, rows[j], 16);
        emulator::check_shared(what, site, rows[j], 16);
      }
      for (int t = 0; t < 32; ++t) {
        const int across = t / 4, along = t % 4 * 2;
        const uint32_t low = kTranspose ? rows[along][across] : rows[across][along];
        const uint32_t high = kTranspose ? rows[along + 1][across] : rows[across][along + 1];
        lanes[t]->r[i] = low | high << 16;
      }
    }
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, LISSOM_SITE) {
  ldmatrix<4, false>("ldmatrix_x4", site, r, row);
}
using SharedAddress = const unsigned char*;
inline SharedAddress shared_address_of(const void* p) { return static_cast<SharedAddress>(p); }
inline void ldmatrix_x4_at(uint32_t (&r)[4], SharedAddress row, LISSOM_SITE) {
  ldmatrix<4, false>("ldmatrix_x4_at", site, r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, LISSOM_SITE) {
  ldmatrix<2, false>("ldmatrix_x2", site, r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, LISSOM_SITE) {
  ldmatrix<4, true>("ldmatrix_x4_trans", site, r, row);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, LISSOM_SITE) {
  ldmatrix<2, true>("ldmatrix_x2_trans", site, r, row);
}

// ---- mma.sync --------------------------------------------------------------------------------------------

// D += A · B of a warp, 16 x 8 outputs. With g = lane / 4, t = lane % 4, and e elements to a register:
//   A [16, 8e]   register i: row g + 8 (i % 2),  columns  te + 4e (i / 2) …
//   B [8e, 8]    register i: column g,           rows     te + 4e i …
//   D [16, 8]    element i:  row g + 8 (i / 2),  column   2t + i % 2
template <int kElements, typename Sum, typename Element>
void mma_warp(const char* what, emulator::Site site, Sum (&d)[4], const uint32_t (&a)[4],
              const uint32_t (&b)[2], Element element) {
  struct Bring {
    Sum* d;
    const uint32_t *a, *b;
  } bring{d, a, b};
  emulator::meet_warp(what, site, 0xffffffffu, bring, [&](Bring* const* lanes) {
    constexpr int kDepth = 8 * kElements;
    decltype(element(0u, 0)) left[16][kDepth], right[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < kElements; ++e) {
        for (int i = 0; i < 4; ++i) {
          left[g + 8 * (i % 2)][(t + i / 2 * 4) * kElements + e] = element(lanes[lane]->a[i], e);
        }
        for (int i = 0; i < 2; ++i) right[(t + i * 4) * kElements + e][g] = element(lanes[lane]->b[i], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        // Sums of products are exact here (float64, int32); a GPU's order and truncation are its own.
        decltype(element(0u, 0)) sum = 0;
        for (int k = 0; k < kDepth; ++k) sum += left[g + i / 2 * 8][k] * right[k][2 * t + i % 2];
        lanes[lane]->d[i] = static_cast<Sum>(lanes[lane]->d[i] + sum);
      }
    }
  });
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], LISSOM_SITE) {
  mma_warp<2>("mma_m16n8k16", site, d, a, b, [](uint32_t bits, int e) {
    return static_cast<double>(to_float(T{static_cast<uint16_t>(bits >> 16 * e)}));
  });
}

inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], LISSOM_SITE) {
  mma_warp<4>("mma_m16n8k32", site, d, a, b,
              [](uint32_t bits, int e) { return static_cast<int32_t>(static_cast<int8_t>(bits >> 8 * e)); });
}

}  // namespace lissom::cuda
