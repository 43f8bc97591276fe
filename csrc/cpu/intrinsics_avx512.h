// AVX-512 intrinsics: the CPU's, or with LISSOM_SIMDE those of SIMDe, which run on any x86-64 with AVX2
// (tests of the AVX-512 kernels on machines that lack it). Below: what SIMDe 0.7.4 has no alias for, as plain
// loops.
#pragma once

#ifndef LISSOM_SIMDE
#include <immintrin.h>
#else

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <cstring>

namespace lissom_simde {

template <typename To, typename From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
template <typename T, int kCount>
struct Lanes {
  T v[kCount];
};
using I32 = Lanes<int32_t, 16>;
using Halves = Lanes<__m256i, 2>;
using FloatHalves = Lanes<__m256, 2>;

inline __m512i join(__m256i low, __m256i high) { return bits<__m512i>(Halves{{low, high}}); }
inline __m512 join(__m256 low, __m256 high) { return bits<__m512>(FloatHalves{{low, high}}); }

inline __m512i cvtepi8_epi32(__m128i x) {
  return join(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)));
}
inline __m512i cvtepu16_epi32(__m256i x) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
              _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}
inline __m512 cvtepi32_ps(__m512i x) {
  const auto h = bits<Halves>(x);
  return join(_mm256_cvtepi32_ps(h.v[0]), _mm256_cvtepi32_ps(h.v[1]));
}
inline __m512i cvtps_epi32(__m512 x) {
  const auto h = bits<FloatHalves>(x);
  return join(_mm256_cvtps_epi32(h.v[0]), _mm256_cvtps_epi32(h.v[1]));
}
inline __m512 cvtph_ps(__m256i x) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
inline __m256i cvtps_ph(__m512 x) {
  const auto h = bits<FloatHalves>(x);
  return _mm256_setr_m128i(_mm256_cvtps_ph(h.v[0], 0), _mm256_cvtps_ph(h.v[1], 0));
}
inline __m512i srai_epi32(__m512i x, int count) {
  const auto h = bits<Halves>(x);
  return join(_mm256_srai_epi32(h.v[0], count), _mm256_srai_epi32(h.v[1], count));
}
inline __m512 permute_ps(__m512 x, int control) {
  const auto from = bits<Lanes<float, 16>>(x);
  Lanes<float, 16> to;
  for (int i = 0; i < 16; ++i) to.v[i] = from.v[(i & ~3) + (control >> (2 * (i & 3)) & 3)];
  return bits<__m512>(to);
}
inline __m512 shuffle_f32x4(__m512 a, __m512 b, int control) {
  const auto from_a = bits<Lanes<__m128, 4>>(a), from_b = bits<Lanes<__m128, 4>>(b);
  Lanes<__m128, 4> to;
  for (int i = 0; i < 4; ++i) to.v[i] = (i < 2 ? from_a : from_b).v[control >> (2 * i) & 3];
  return bits<__m512>(to);
}
template <typename To, typename Narrow>
inline To narrow(__m512i x) {
  const auto from = bits<I32>(x);
  Lanes<Narrow, 16> to;
  for (int i = 0; i < 16; ++i) to.v[i] = static_cast<Narrow>(from.v[i]);
  return bits<To>(to);
}
template <typename To, typename T>
inline To masked_load(unsigned mask, const void* p) {
  Lanes<T, 16> to{};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(&to.v[i], static_cast<const T*>(p) + i, sizeof(T));
  }
  return bits<To>(to);
}
template <typename T, typename From>
inline void masked_store(void* p, unsigned mask, From x) {
  const auto from = bits<Lanes<T, 16>>(x);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<T*>(p) + i, &from.v[i], sizeof(T));
  }
}

}  // namespace lissom_simde

#define _mm512_cvtepi8_epi32(x) lissom_simde::cvtepi8_epi32(x)
#define _mm512_cvtepu16_epi32(x) lissom_simde::cvtepu16_epi32(x)
#define _mm512_cvtepi32_ps(x) lissom_simde::cvtepi32_ps(x)
#define _mm512_cvtps_epi32(x) lissom_simde::cvtps_epi32(x)
#define _mm512_cvtph_ps(x) lissom_simde::cvtph_ps(x)
#define _mm512_cvtps_ph(x, rounding) lissom_simde::cvtps_ph(x)
#define _mm512_srai_epi32(x, count) lissom_simde::srai_epi32(x, count)
#define _mm512_permute_ps(x, control) lissom_simde::permute_ps(x, control)
#define _mm512_shuffle_f32x4(a, b, control) lissom_simde::shuffle_f32x4(a, b, control)
#define _mm512_cvtepi32_epi16(x) (lissom_simde::narrow<__m256i, int16_t>(x))
#define _mm512_cvtepi32_epi8(x) (lissom_simde::narrow<__m128i, int8_t>(x))
#define _mm512_maskz_loadu_ps(mask, p) (lissom_simde::masked_load<__m512, float>(mask, p))
#define _mm256_maskz_loadu_epi16(mask, p) (lissom_simde::masked_load<__m256i, int16_t>(mask, p))
#define _mm_maskz_loadu_epi8(mask, p) (lissom_simde::masked_load<__m128i, int8_t>(mask, p))
#define _mm512_mask_storeu_ps(p, mask, x) lissom_simde::masked_store<float>(p, mask, x)
#define _mm512_mask3_fmadd_ps(a, b, c, mask) _mm512_mask_mov_ps(c, mask, _mm512_fmadd_ps(a, b, c))
#define _mm256_mask_storeu_epi16(p, mask, x) lissom_simde::masked_store<int16_t>(p, mask, x)

#endif
