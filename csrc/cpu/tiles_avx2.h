// Inner steps and tiles that several AVX2 kernels use. Included once per AVX2 file, inside namespace
// lissom::avx2.

inline __m256i load_line(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

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
