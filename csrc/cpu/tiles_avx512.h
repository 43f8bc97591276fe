// Inner steps and tiles that several AVX-512 kernels use. Included once per AVX-512 file, inside namespace
// lissom::avx512vnni.

inline __m512i load_line(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i broadcast_quad(const uint8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return _mm512_set1_epi32(quad);
}

// sum += four products of u8 x and s8 w per lane. In assembly, because GCC 12 gives the intrinsic's result a
// register of its own: in a 12 x 2 tile it copied and spilled every sum on every step, at half the speed.
LISSOM_INLINE inline void dot(__m512i& sum, __m512i x, __m512i w) {
#ifdef LISSOM_SIMDE
  sum = _mm512_dpbusd_epi32(sum, x, w);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#endif
}

LISSOM_INLINE inline void dot(__m512& sum, __m512 x, __m512 w) {
#ifdef LISSOM_SIMDE
  sum = _mm512_fmadd_ps(x, w, sum);
#else
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#endif
}

// Sums of kPanels panels for kRows rows: += x * w over k, each a chain in order. a is [k][rows]; a panel of
// w is [k][16], panels lie `apart` floats from each other; rows of sums `stride`.
template <int kRows, int kPanels>
__attribute__((noinline)) void float_tile(const float* a, const float* w, int64_t apart, int64_t k,
                                          float* sums, int stride) {
  __m512 acc[kRows][kPanels];
  unroll<kRows>([&](auto r) LISSOM_INLINE {
    unroll<kPanels>([&](auto p) LISSOM_INLINE { acc[r][p] = _mm512_loadu_ps(sums + r * stride + p * 16); });
  });
  for (int64_t i = 0; i < k; ++i, a += kRows, w += 16) {
    __m512 v[kPanels];
    unroll<kPanels>([&](auto p) LISSOM_INLINE { v[p] = _mm512_load_ps(w + p * apart); });
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      const __m512 x = _mm512_set1_ps(a[r]);
      unroll<kPanels>([&](auto p) LISSOM_INLINE { dot(acc[r][p], x, v[p]); });
    });
  }
  unroll<kRows>([&](auto r) LISSOM_INLINE {
    unroll<kPanels>([&](auto p) LISSOM_INLINE { _mm512_storeu_ps(sums + r * stride + p * 16, acc[r][p]); });
  });
}

// The same for any rows and panels; sums are [rows][panels * 16].
inline void float_tiles(const float* a, int rows, const float* w, int64_t apart, int panels, int64_t k,
                        float* sums) {
  for (int p = 0; p < panels; p += 2) {
    with_count<12>(rows, [&](auto count) {
      if (panels - p >= 2) {
        float_tile<count, 2>(a, w + p * apart, apart, k, sums + p * 16, panels * 16);
      } else {
        float_tile<count, 1>(a, w + p * apart, apart, k, sums + p * 16, panels * 16);
      }
    });
  }
}
