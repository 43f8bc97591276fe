// 16 lanes as one 512-bit register (AVX-512 F, BW, DQ, VL). Meaning of each function: simd_scalar.h.
// Included once per AVX-512 file, inside namespace lissom::avx512vnni.

struct F16 {
  __m512 v;
};
struct I16 {
  __m512i v;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline F16 set1(float value) { return {_mm512_set1_ps(value)}; }

inline F16 widen_bfloat16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F16 load(const BFloat16* p) {
  return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F16 load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline F16 load_n(const BFloat16* p, int n) { return widen_bfloat16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline F16 load_n(const Float16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}

// Rounded to bfloat16, in the upper halves of the lanes; the lower ones hold anything.
inline __m512i round_bfloat16(F16 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
inline __m256i narrow_bfloat16(F16 x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bfloat16(x), 16));
}
inline __m256i narrow_float16(F16 x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(float* p, F16 x) { _mm512_storeu_ps(p, x.v); }
inline void store(BFloat16* p, F16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(x));
}
inline void store(Float16* p, F16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_float16(x));
}
// Two vectors, one after the other.
inline void store_two(float* p, F16 x, F16 y) {
  store(p, x);
  store(p + 16, y);
}
inline void store_two(BFloat16* p, F16 x, F16 y) {  // one shuffle gathers the upper halves of both
  alignas(64) static const uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                  23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                  45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(
      p, _mm512_permutex2var_epi16(round_bfloat16(x), _mm512_load_si512(kUpper), round_bfloat16(y)));
}
inline void store_two(Float16* p, F16 x, F16 y) {
  store(p, x);
  store(p + 16, y);
}
inline void store_n(float* p, F16 x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline void store_n(BFloat16* p, F16 x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bfloat16(x)); }
inline void store_n(Float16* p, F16 x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_float16(x)); }

inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F16 abs(F16 a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))};
}
inline F16 negate(F16 a) {
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)))};
}
inline F16 select_negative(F16 x, F16 a, F16 b) {
  return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ), a.v)};
}

inline I16 to_int(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline F16 power_of_two(I16 n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
inline F16 fill_from(F16 a, int n, float value) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(value), first(n), a.v)};
}
inline F16 where_positive(F16 where, F16 value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(where.v, _mm512_setzero_ps(), _CMP_GT_OQ), value.v)};
}
inline F16 fma_where_positive(F16 where, F16 a, F16 b, F16 c) {
  return {_mm512_mask3_fmadd_ps(a.v, b.v, c.v, _mm512_cmp_ps_mask(where.v, _mm512_setzero_ps(), _CMP_GT_OQ))};
}
inline F16 exponent_field(F16 a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
inline __m256 lower_half(F16 a) { return _mm512_castps512_ps256(a.v); }
inline __m256 upper_half(F16 a) {
  return _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(a.v), 1));
}
inline float reduce_add(F16 a) {
  const __m256 both = _mm256_add_ps(lower_half(a), upper_half(a));
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}
inline float reduce_max(F16 a) {
  const __m256 both = _mm256_max_ps(lower_half(a), upper_half(a));
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
inline F16 split(F16 x, F16* mantissa) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i fraction = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0x807fffffu)));
  mantissa->v = _mm512_castsi512_ps(_mm512_or_si512(fraction, _mm512_set1_epi32(0x3f000000)));
  const __m512i exponent = _mm512_and_si512(_mm512_srli_epi32(bits, 23), _mm512_set1_epi32(255));
  return to_float(I16{_mm512_sub_epi32(exponent, _mm512_set1_epi32(126))});
}
inline I16 load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline I16 load_int8(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I16 load_int8_n(const int8_t* p, int n) {
  return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p))};
}

inline I16 magnitude_bits(F16 a) { return {_mm512_castps_si512(abs(a).v)}; }
inline I16 zero_int() { return {_mm512_setzero_si512()}; }
inline I16 max_int(I16 a, I16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline I16 add_int(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline int32_t reduce_add(I16 a) {
  const __m256i both = _mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  return _mm_cvtsi128_si32(sum);
}
inline int32_t reduce_max(I16 a) {
  const __m256i both = _mm256_max_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}

// A butterfly: lanes whose sign is +1 become own + other, those with -1 other - own. The product is exact, so
// the fused multiply-add rounds as an addition does.
inline __m512 butterfly(__m512 own, __m512 other, __m512 sign) { return _mm512_fmadd_ps(own, sign, other); }
inline F16 hadamard(F16 x) {
  const __m512 sign1 = _mm512_setr_ps(1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
  const __m512 sign2 = _mm512_setr_ps(1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1);
  const __m512 sign4 = _mm512_setr_ps(1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1);
  const __m512 sign8 = _mm512_setr_ps(1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1);
  x.v = butterfly(x.v, _mm512_permute_ps(x.v, 0xb1), sign1);
  x.v = butterfly(x.v, _mm512_permute_ps(x.v, 0x4e), sign2);
  x.v = butterfly(x.v, _mm512_shuffle_f32x4(x.v, x.v, 0xb1), sign4);
  x.v = butterfly(x.v, _mm512_shuffle_f32x4(x.v, x.v, 0x4e), sign8);
  return x;
}
