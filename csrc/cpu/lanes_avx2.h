// Vectors whose lanes are rows of x: what the block-sparse kernels are written on. Meaning of each function:
// lanes_scalar.h. Included once per AVX2 file, inside namespace lissom::avx2, after tiles_avx2.h.

constexpr int kLanes = 8;
// 4 outputs * 3 vectors: 12 sums, 3 of x and 1 weight are the 16 registers; 7 loads for 12 multiply-adds.
constexpr int kVectors = 3, kGroup = 4;

using Lane = __m256;
inline Lane lane_load(const float* p) { return _mm256_loadu_ps(p); }
inline void lane_store(float* p, Lane v) { _mm256_storeu_ps(p, v); }
inline Lane lane_zero() { return _mm256_setzero_ps(); }
inline Lane lane_add(Lane a, Lane b) { return _mm256_add_ps(a, b); }
inline Lane lane_set1(const float* p) { return _mm256_broadcast_ss(p); }
inline Lane lane_set1(const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16(static_cast<int16_t>(p->bits)), 16));
}
inline Lane lane_set1(const Float16* p) {
  return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(p->bits)));
}
inline Lane lane_set1(const int8_t* p) { return _mm256_set1_ps(static_cast<float>(*p)); }
inline float lane_sum(Lane v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}
// acc += x * w, in assembly for the same reason as the other dots.
LISSOM_INLINE inline void dot(Lane& acc, Lane x, Lane w) {
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
}

inline I16 as_int(F16 v) { return {_mm256_castps_si256(v.lo), _mm256_castps_si256(v.hi)}; }

LISSOM_INLINE inline void transpose8(__m256* v) {
  __m256 t[8];
  unroll<4>([&](auto i) LISSOM_INLINE {
    t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  });
  unroll<2>([&](auto i) LISSOM_INLINE {
    unroll<2>([&](auto j) LISSOM_INLINE {
      v[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0x44);
      v[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0xee);
    });
  });
  unroll<4>([&](auto j) LISSOM_INLINE {
    t[j] = _mm256_permute2f128_ps(v[j], v[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(v[j], v[4 + j], 0x31);
  });
  unroll<8>([&](auto j) LISSOM_INLINE { v[j] = t[j]; });
}

inline void transpose(const F16* rows, float* to, int64_t stride) {
  __m256 v[8];
  unroll<8>([&](auto i) LISSOM_INLINE { v[i] = rows[i].lo; });
  transpose8(v);
  unroll<8>([&](auto i) LISSOM_INLINE { _mm256_storeu_ps(to + i * stride, v[i]); });
  unroll<8>([&](auto i) LISSOM_INLINE { v[i] = rows[i].hi; });
  transpose8(v);
  unroll<8>([&](auto i) LISSOM_INLINE { _mm256_storeu_ps(to + (8 + i) * stride, v[i]); });
}
inline void transpose_back(const float* from, int64_t stride, F16* rows) {
  __m256 v[8];
  unroll<8>([&](auto i) LISSOM_INLINE { v[i] = _mm256_loadu_ps(from + i * stride); });
  transpose8(v);
  unroll<8>([&](auto i) LISSOM_INLINE { rows[i].lo = v[i]; });
  unroll<8>([&](auto i) LISSOM_INLINE { v[i] = _mm256_loadu_ps(from + (8 + i) * stride); });
  transpose8(v);
  unroll<8>([&](auto i) LISSOM_INLINE { rows[i].hi = v[i]; });
}

template <typename W>
struct FloatLanes {
  using Weight = W;
  using Sum = __m256;
  static constexpr bool kInteger = false;
  static constexpr int kUnitVectors = 1, kWeightStep = 1;

  static Sum zero() { return lane_zero(); }
  static Sum add(Sum a, Sum b) { return lane_add(a, b); }
  static void store(float* p, Sum v) { lane_store(p, v); }

  template <int kOutputs, int kVecs>
  LISSOM_INLINE static void unit(Sum (*acc)[kVecs], const float* x, const W* w, int64_t row_stride) {
    Sum xv[kVecs];
    unroll<kVecs>([&](auto v) LISSOM_INLINE { xv[v] = lane_load(x + v * kLanes); });
    unroll<kOutputs>([&](auto r) LISSOM_INLINE {
      const Sum wr = lane_set1(w + r * row_stride);
      unroll<kVecs>([&](auto v) LISSOM_INLINE { dot(acc[r][v], xv[v], wr); });
    });
  }
};

// Rows of x as int16 pairs (k0, k2) of all vectors, then (k1, k3); weights are widened as they are broadcast:
// 3 instructions for 4 * kVecs that multiply and add, on ports that those leave free.
struct ByteLanes {
  using Weight = int8_t;
  using Sum = __m256i;
  static constexpr bool kInteger = true;
  static constexpr int kUnitVectors = 2, kWeightStep = kQuad;

  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static void store(float* p, Sum v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

  // acc += x * w over pairs.
  LISSOM_INLINE static void pairs(Sum& acc, const float* x, Sum w) {
    Sum product;
    __asm__("vpmaddwd %[x], %[w], %[product]\n\tvpaddd %[product], %[acc], %[acc]"
            : [acc] "+x"(acc), [product] "=&x"(product)
            : [w] "x"(w), [x] "m"(*reinterpret_cast<const __m256i_u*>(x)));
  }
  template <int kOutputs, int kVecs>
  LISSOM_INLINE static void unit(Sum (*acc)[kVecs], const float* x, const int8_t* w, int64_t row_stride) {
    unroll<kOutputs>([&](auto r) LISSOM_INLINE {
      int32_t quad;
      __builtin_memcpy(&quad, w + r * row_stride, 4);
      const Sum bytes = _mm256_set1_epi32(quad), even = even_of(bytes), odd = odd_of(bytes);
      unroll<kVecs>([&](auto v) LISSOM_INLINE { pairs(acc[r][v], x + v * kLanes, even); });
      unroll<kVecs>([&](auto v) LISSOM_INLINE { pairs(acc[r][v], x + (kVecs + v) * kLanes, odd); });
    });
  }
};

// Four columns anywhere, as a unit: panels are int16, [columns][16 rows], and become pairs of columns as they
// are read. Unpacking leaves groups of 4 rows in another order, in which they are stored.
struct GatherLanes {
  static constexpr int kLeastVectors = 2, kMostVectors = 2, kBytes = 2;

  // Where a group of 4 rows is stored, in groups.
  static int place(int group, int) { return group == 1 || group == 2 ? 3 - group : group; }

  template <int kOutputs, int kVecs>
  LISSOM_INLINE static void unit(__m256i (*acc)[kVecs], const float* panel, const int32_t* columns,
                                 const int8_t* w) {
    const char* bytes = reinterpret_cast<const char*>(panel);
    const auto row = [&](int i) LISSOM_INLINE { return load_line(bytes + int64_t{columns[i]} * 32); };
    const __m256i a = row(0), b = row(1), c = row(2), d = row(3);
    const __m256i even[2] = {_mm256_unpacklo_epi16(a, c), _mm256_unpackhi_epi16(a, c)};
    const __m256i odd[2] = {_mm256_unpacklo_epi16(b, d), _mm256_unpackhi_epi16(b, d)};
    unroll<kOutputs>([&](auto r) LISSOM_INLINE {
      int32_t quad;
      __builtin_memcpy(&quad, w + r * kQuad, 4);
      const __m256i weights = _mm256_set1_epi32(quad), w_even = even_of(weights), w_odd = odd_of(weights);
      unroll<2>([&](auto v) LISSOM_INLINE {
        pairs(acc[r][v], even[v], w_even);
        pairs(acc[r][v], odd[v], w_odd);
      });
    });
  }
  LISSOM_INLINE static void pairs(__m256i& acc, __m256i x, __m256i w) {
    __m256i product;
    __asm__("vpmaddwd %[x], %[w], %[product]\n\tvpaddd %[product], %[acc], %[acc]"
            : [acc] "+x"(acc), [product] "=&x"(product)
            : [w] "x"(w), [x] "x"(x));
  }
};

// ---- few rows: lanes are outputs, or columns -----------------------------------------------------------

#define LISSOM_FEW_ROWS
constexpr int kMostFewRows = 8;

inline Lane lane_load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Lane lane_load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Four floats in each 128-bit part; and the sum of each part, in its first lane at least.
inline Lane lane_quad(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
inline Lane lane_quad_sums(Lane v) {
  v = _mm256_add_ps(v, _mm256_permute_ps(v, 0xb1));
  return _mm256_add_ps(v, _mm256_permute_ps(v, 0x4e));
}

// sum += x * weights: what a tile of kWidth outputs multiplies. kInputs: words of x per row and unit.
template <typename W, int kOutputs>
struct FloatOutputs {  // 8
  using Weight = W;
  using Sum = __m256;
  static constexpr bool kInteger = false;
  static constexpr int kWidth = 8, kInputs = 1;
  static Sum zero() { return lane_zero(); }
  static Sum add(Sum a, Sum b) { return lane_add(a, b); }
  static void store(float* p, Sum v) { lane_store(p, v); }
  static Sum weights(const W* p) { return lane_load(p); }
  template <int kRows>
  LISSOM_INLINE static void multiply(Sum& sum, const float* x, Sum w) {
    dot(sum, lane_set1(x), w);
  }
};
struct ByteOutputs {
  using Weight = int8_t;
  using Sum = __m256i;
  struct Pairs {
    Sum even, odd;
  };
  static constexpr bool kInteger = true;
  static constexpr int kWidth = 8, kInputs = 2;
  static Sum zero() { return ByteLanes::zero(); }
  static Sum add(Sum a, Sum b) { return ByteLanes::add(a, b); }
  static void store(float* p, Sum v) { ByteLanes::store(p, v); }
  static Pairs weights(const int8_t* p) { return {even_of(load_line(p)), odd_of(load_line(p))}; }
  template <int kRows>
  LISSOM_INLINE static void multiply(Sum& sum, const float* x, const Pairs& w) {
    GatherLanes::pairs(sum, _mm256_castps_si256(_mm256_broadcast_ss(x)), w.even);
    GatherLanes::pairs(sum, _mm256_castps_si256(_mm256_broadcast_ss(x + kRows)), w.odd);
  }
};
