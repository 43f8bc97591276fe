// 16 lanes as two 256-bit registers (AVX2, FMA, F16C). Meaning of each function: simd_scalar.h.
// Included once per AVX2 file, inside namespace lissom::avx2.

struct F16 {
  __m256 lo, hi;
};
struct I16 {
  __m256i lo, hi;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline F16 set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F16 load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(bits));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(bits, 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
inline F16 load(const Float16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}

// bfloat16 bits, rounded to even, NaN kept quiet, in the low half of each 32-bit lane.
inline __m256i bfloat16_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}

inline void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline void store(BFloat16* p, F16 x) {
  const __m256i packed = _mm256_packus_epi32(bfloat16_bits(x.lo), bfloat16_bits(x.hi));  // lanes interleaved
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store(Float16* p, F16 x) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Edges go through a small buffer: nothing outside the n elements is touched.
template <typename T>
inline F16 load_n(const T* p, int n) {
  if (n == 16) return load(p);
  T buffer[16] = {};
  __builtin_memcpy(buffer, p, sizeof(T) * n);
  return load(buffer);
}
template <typename T>
inline void store_n(T* p, F16 x, int n) {
  if (n == 16) return store(p, x);
  T buffer[16];
  store(buffer, x);
  __builtin_memcpy(p, buffer, sizeof(T) * n);
}

inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 round(F16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
inline F16 abs(F16 a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
inline F16 negate(F16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}
inline F16 select_negative(F16 x, F16 a, F16 b) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, zero, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, zero, _CMP_LT_OQ))};
}

inline I16 to_int(F16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline F16 power_of_two(I16 n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.lo, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.hi, bias), 23))};
}
inline __m256 fill_from8(__m256 a, int n, float value) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 kept = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  return _mm256_blendv_ps(_mm256_set1_ps(value), a, kept);
}
inline F16 fill_from(F16 a, int n, float value) {
  return {fill_from8(a.lo, n, value), fill_from8(a.hi, n - 8, value)};
}
inline F16 where_positive(F16 where, F16 value) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_and_ps(_mm256_cmp_ps(where.lo, zero, _CMP_GT_OQ), value.lo),
          _mm256_and_ps(_mm256_cmp_ps(where.hi, zero, _CMP_GT_OQ), value.hi)};
}
inline F16 fma_where_positive(F16 where, F16 a, F16 b, F16 c) { return fma(a, where_positive(where, b), c); }
inline __m256 exponent_field8(__m256 a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23));
}
inline F16 exponent_field(F16 a) { return {exponent_field8(a.lo), exponent_field8(a.hi)}; }
inline float reduce_add(F16 a) {
  const __m256 both = _mm256_add_ps(a.lo, a.hi);
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}
inline float reduce_max(F16 a) {
  const __m256 both = _mm256_max_ps(a.lo, a.hi);
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
inline __m256 split8(__m256 x, __m256* mantissa) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0x807fffffu)));
  *mantissa = _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f000000)));
  const __m256i exponent = _mm256_and_si256(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(255));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(exponent, _mm256_set1_epi32(126)));
}
inline F16 split(F16 x, F16* mantissa) { return {split8(x.lo, &mantissa->lo), split8(x.hi, &mantissa->hi)}; }
inline I16 load_int(const int32_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline I16 load_int8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
inline I16 load_int8_n(const int8_t* p, int n) {
  int8_t buffer[16] = {};
  __builtin_memcpy(buffer, p, n);
  return load_int8(buffer);
}

inline I16 magnitude_bits(F16 a) {
  const F16 m = abs(a);
  return {_mm256_castps_si256(m.lo), _mm256_castps_si256(m.hi)};
}
inline I16 zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I16 max_int(I16 a, I16 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
inline I16 add_int(I16 a, I16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline int32_t reduce_add(I16 a) {
  const __m256i both = _mm256_add_epi32(a.lo, a.hi);
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  return _mm_cvtsi128_si32(sum);
}
inline int32_t reduce_max(I16 a) {
  const __m256i both = _mm256_max_epi32(a.lo, a.hi);
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}

// A butterfly: lanes whose sign is +1 become own + other, those with -1 other - own. The product is exact, so
// the fused multiply-add rounds as an addition does.
inline __m256 butterfly(__m256 own, __m256 other, __m256 sign) { return _mm256_fmadd_ps(own, sign, other); }
inline __m256 hadamard8(__m256 x) {
  x = butterfly(x, _mm256_permute_ps(x, 0xb1), _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1));
  x = butterfly(x, _mm256_permute_ps(x, 0x4e), _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1));
  return butterfly(x, _mm256_permute2f128_ps(x, x, 1), _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1));
}
inline F16 hadamard(F16 x) {
  const __m256 lo = hadamard8(x.lo), hi = hadamard8(x.hi);
  return {_mm256_add_ps(lo, hi), _mm256_sub_ps(lo, hi)};
}
