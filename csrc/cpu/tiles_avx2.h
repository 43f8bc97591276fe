// Inner steps and tiles that several AVX2 kernels use. Included once per AVX2 file, inside namespace
// lissom::avx2.

inline __m256i load_line(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i even_of(__m256i line) { return _mm256_srai_epi16(_mm256_slli_epi16(line, 8), 8); }
inline __m256i odd_of(__m256i line) { return _mm256_srai_epi16(line, 8); }

// A line of signed bytes, outputs 0-7 and 8-15, expanded to int16 pairs: even of outputs 0-7, even of 8-15,
// odd of 0-7, odd of 8-15.
inline void store_pairs(__m256i low, __m256i high, int16_t* to) {
  __m256i* out = reinterpret_cast<__m256i*>(to);
  _mm256_store_si256(out, even_of(low));
  _mm256_store_si256(out + 1, even_of(high));
  _mm256_store_si256(out + 2, odd_of(low));
  _mm256_store_si256(out + 3, odd_of(high));
}

// 16 int32 values within int16 -> int16, each quad in the order k0 k2 k1 k3.
inline __m256i pair_order(I16 q) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(q.lo, q.hi), 0xd8);
  const __m256i swap = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                        0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  return _mm256_shuffle_epi8(packed, swap);
}
// 16 int32 values within int8 -> bytes.
inline __m128i to_bytes(I16 q) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q.lo, q.hi), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// words[r] are the 4 quads of row r; stored are the first `quads`, a row's quad beside the next row's.
template <int kRows>
inline void store_word_quads(const __m256i* words, uint8_t* out, int64_t quad_bytes, int quads) {
  static_assert(kRows == 1 || kRows == 2, "one row, or two together");
  alignas(32) __m128i parts[4];
  const __m256i low = _mm256_unpacklo_epi64(words[0], words[kRows - 1]);
  const __m256i high = _mm256_unpackhi_epi64(words[0], words[kRows - 1]);
  parts[0] = _mm256_castsi256_si128(low);
  parts[1] = _mm256_castsi256_si128(high);
  parts[2] = _mm256_extracti128_si256(low, 1);
  parts[3] = _mm256_extracti128_si256(high, 1);
  for (int i = 0; i < quads; ++i) {
    __m128i* to = reinterpret_cast<__m128i*>(out + i * quad_bytes);
    if (kRows == 2) {
      _mm_storeu_si128(to, parts[i]);
    } else {
      _mm_storel_epi64(to, parts[i]);
    }
  }
}

// One row's step: low += x * low weights, high += x * high weights, x = the int16 pair at p for all lanes. In
// assembly, because GCC 12 otherwise computes many products ahead of their additions and spills every sum.
LISSOM_INLINE inline void dot(__m256i& low, __m256i& high, const int16_t* p, __m256i low_weights,
                              __m256i high_weights) {
  __m256i x, product;
  __asm__(
      "vpbroadcastd %[pair], %[x]\n\t"
      "vpmaddwd %[low_weights], %[x], %[product]\n\t"
      "vpmaddwd %[high_weights], %[x], %[x]\n\t"
      "vpaddd %[product], %[low], %[low]\n\t"
      "vpaddd %[x], %[high], %[high]"
      : [low] "+x"(low), [high] "+x"(high), [x] "=&x"(x), [product] "=&x"(product)
      : [low_weights] "x"(low_weights), [high_weights] "x"(high_weights),
        [pair] "m"(*reinterpret_cast<const int16_t (*)[2]>(p)));
}

// The same in floating point: sums += x * weights, x = *p for all lanes.
LISSOM_INLINE inline void dot(__m256& low, __m256& high, const float* p, __m256 low_weights,
                              __m256 high_weights) {
  __m256 x;
  __asm__(
      "vbroadcastss %[value], %[x]\n\t"
      "vfmadd231ps %[low_weights], %[x], %[low]\n\t"
      "vfmadd231ps %[high_weights], %[x], %[high]"
      : [low] "+x"(low), [high] "+x"(high), [x] "=&x"(x)
      : [low_weights] "x"(low_weights), [high_weights] "x"(high_weights), [value] "m"(*p));
}

// Sums of 16 outputs for kRows rows: += x * w over k, each a chain in order. a is [k][rows], w [k][16].
template <int kRows>
__attribute__((noinline)) void float_tile(const float* a, const float* w, int64_t k, float* sums,
                                          int stride) {
  __m256 acc[kRows][2];
  unroll<kRows>([&](auto r) LISSOM_INLINE {
    acc[r][0] = _mm256_loadu_ps(sums + r * stride);
    acc[r][1] = _mm256_loadu_ps(sums + r * stride + 8);
  });
  for (int64_t i = 0; i < k; ++i, a += kRows, w += 16) {
    const __m256 low = _mm256_load_ps(w), high = _mm256_load_ps(w + 8);
    unroll<kRows>([&](auto r) LISSOM_INLINE { dot(acc[r][0], acc[r][1], a + r, low, high); });
  }
  unroll<kRows>([&](auto r) LISSOM_INLINE {
    _mm256_storeu_ps(sums + r * stride, acc[r][0]);
    _mm256_storeu_ps(sums + r * stride + 8, acc[r][1]);
  });
}

// The same for any rows, and for panels of prepared floats that lie `apart` floats from each other; sums are
// [rows][panels * 16].
inline void float_tiles(const float* a, int rows, const float* w, int64_t apart, int panels, int64_t k,
                        float* sums) {
  for (int p = 0; p < panels; ++p) {
    with_count<6>(rows,
                  [&](auto count) { float_tile<count>(a, w + p * apart, k, sums + p * 16, panels * 16); });
  }
}
