// Vectors whose lanes are rows of x: what the block-sparse kernels are written on. Meaning of each function:
// lanes_scalar.h. Included once per AVX-512 file, inside namespace lissom::avx512vnni, after tiles_avx512.h.

constexpr int kLanes = 16;
// 8 outputs * 3 vectors: 24 sums, 3 of x and 1 weight of the 32 registers; 11 loads for 24 multiply-adds.
constexpr int kVectors = 3, kGroup = 8;

using Lane = __m512;
inline Lane lane_load(const float* p) { return _mm512_loadu_ps(p); }
inline void lane_store(float* p, Lane v) { _mm512_storeu_ps(p, v); }
inline Lane lane_zero() { return _mm512_setzero_ps(); }
inline Lane lane_add(Lane a, Lane b) { return _mm512_add_ps(a, b); }
inline Lane lane_set1(const float* p) { return _mm512_set1_ps(*p); }
inline Lane lane_set1(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(static_cast<int16_t>(p->bits)), 16));
}
inline Lane lane_set1(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(p->bits)));
}
inline Lane lane_set1(const int8_t* p) { return _mm512_set1_ps(static_cast<float>(*p)); }
inline float lane_sum(Lane v) {
  const __m256 half = _mm256_add_ps(
      _mm512_castps512_ps256(v), _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(v), 1)));
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

inline I16 as_int(F16 v) { return {_mm512_castps_si512(v.v)}; }

LISSOM_INLINE inline void transpose16(__m512* v) {
  __m512 t[16];
  unroll<8>([&](auto i) LISSOM_INLINE {
    t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  });
  unroll<4>([&](auto i) LISSOM_INLINE {
    unroll<2>([&](auto j) LISSOM_INLINE {
      const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + 2 + j]);
      v[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      v[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    });
  });
  // v[4 i + j] holds column 4 l + j of rows 4 i … 4 i + 3 in its 128-bit part l.
  unroll<2>([&](auto i) LISSOM_INLINE {
    unroll<4>([&](auto j) LISSOM_INLINE {
      t[8 * i + j] = _mm512_shuffle_f32x4(v[8 * i + j], v[8 * i + 4 + j], 0x88);
      t[8 * i + 4 + j] = _mm512_shuffle_f32x4(v[8 * i + j], v[8 * i + 4 + j], 0xdd);
    });
  });
  unroll<8>([&](auto j) LISSOM_INLINE {
    // j < 4: columns j and 8 + j; else 4 + (j - 4) and 12 + (j - 4)
    v[j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88);
    v[8 + j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd);
  });
}

inline void transpose(const F16* rows, float* to, int64_t stride) {
  __m512 v[16];
  unroll<16>([&](auto i) LISSOM_INLINE { v[i] = rows[i].v; });
  transpose16(v);
  unroll<16>([&](auto i) LISSOM_INLINE { _mm512_storeu_ps(to + i * stride, v[i]); });
}
inline void transpose_back(const float* from, int64_t stride, F16* rows) {
  __m512 v[16];
  unroll<16>([&](auto i) LISSOM_INLINE { v[i] = _mm512_loadu_ps(from + i * stride); });
  transpose16(v);
  unroll<16>([&](auto i) LISSOM_INLINE { rows[i].v = v[i]; });
}

// Float: a unit is one column; a quad of int8: a unit is 4 columns as u8 (q + 128) and s8.
template <typename W>
struct FloatLanes {
  using Weight = W;
  using Sum = __m512;
  static constexpr bool kInteger = false;
  static constexpr int kUnitVectors = 1, kWeightStep = 1;

  static Sum zero() { return lane_zero(); }
  static Sum add(Sum a, Sum b) { return lane_add(a, b); }
  static void store(float* p, Sum v) { lane_store(p, v); }

  // acc[r][v] += x[v] * w[r]
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

struct ByteLanes {
  using Weight = int8_t;
  using Sum = __m512i;
  static constexpr bool kInteger = true;
  static constexpr int kUnitVectors = 1, kWeightStep = kQuad;

  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static void store(float* p, Sum v) { _mm512_storeu_si512(p, v); }

  template <int kOutputs, int kVecs>
  LISSOM_INLINE static void unit(Sum (*acc)[kVecs], const float* x, const int8_t* w, int64_t row_stride) {
    Sum xv[kVecs];
    unroll<kVecs>([&](auto v) LISSOM_INLINE { xv[v] = load_line(x + v * kLanes); });
    unroll<kOutputs>([&](auto r) LISSOM_INLINE {
      const Sum wr = broadcast_quad(reinterpret_cast<const uint8_t*>(w + r * row_stride));
      unroll<kVecs>([&](auto v) LISSOM_INLINE { dot(acc[r][v], xv[v], wr); });
    });
  }
};

// Four columns anywhere, as a unit: panels are bytes (q + 128), [columns][rows], and become quads of rows as
// they are read. Unpacking 32 rows leaves groups of 4 rows in another order, in which they are stored.
struct GatherLanes {
  static constexpr int kLeastVectors = 1, kMostVectors = 2, kBytes = 1;

  // Where a group of 4 rows is stored, in groups.
  static int place(int group, int stride) { return stride == 32 ? group / 2 + 4 * (group & 1) : group; }

  template <int kOutputs, int kVecs>
  LISSOM_INLINE static void unit(__m512i (*acc)[kVecs], const float* panel, const int32_t* columns,
                                 const int8_t* w) {
    const char* bytes = reinterpret_cast<const char*>(panel);
    __m512i x[kVecs];
    if constexpr (kVecs == 1) {
      const auto row = [&](int i) LISSOM_INLINE {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + int64_t{columns[i]} * 16));
      };
      const __m128i a = row(0), b = row(1), c = row(2), d = row(3);
      const __m128i ab0 = _mm_unpacklo_epi8(a, b), ab1 = _mm_unpackhi_epi8(a, b);
      const __m128i cd0 = _mm_unpacklo_epi8(c, d), cd1 = _mm_unpackhi_epi8(c, d);
      const __m256i low = _mm256_setr_m128i(_mm_unpacklo_epi16(ab0, cd0), _mm_unpackhi_epi16(ab0, cd0));
      const __m256i high = _mm256_setr_m128i(_mm_unpacklo_epi16(ab1, cd1), _mm_unpackhi_epi16(ab1, cd1));
      x[0] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    } else {
      const auto row = [&](int i) LISSOM_INLINE {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + int64_t{columns[i]} * 32));
      };
      const __m256i a = row(0), b = row(1), c = row(2), d = row(3);
      const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
      const __m256i cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
      const auto join = [&](__m256i low, __m256i high) LISSOM_INLINE {
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      };
      x[0] = join(_mm256_unpacklo_epi16(ab0, cd0), _mm256_unpackhi_epi16(ab0, cd0));
      x[1] = join(_mm256_unpacklo_epi16(ab1, cd1), _mm256_unpackhi_epi16(ab1, cd1));
    }
    unroll<kOutputs>([&](auto r) LISSOM_INLINE {
      const __m512i wr = broadcast_quad(reinterpret_cast<const uint8_t*>(w + r * kQuad));
      unroll<kVecs>([&](auto v) LISSOM_INLINE { dot(acc[r][v], x[v], wr); });
    });
  }
};

// ---- few rows: lanes are outputs, or columns -----------------------------------------------------------

#define LISSOM_FEW_ROWS
constexpr int kMostFewRows = 8;

inline Lane lane_load(const BFloat16* p) { return load(p).v; }
inline Lane lane_load(const Float16* p) { return load(p).v; }
// Four floats in each 128-bit part; and the sum of each part, in its first lane at least.
inline Lane lane_quad(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
inline Lane lane_quad_sums(Lane v) {
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
  return _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
}

// sum += x * weights: what a tile of kWidth outputs multiplies. kInputs: words of x per row and unit.
template <typename W, int kOutputs>
struct FloatOutputs {  // 16
  using Weight = W;
  using Sum = __m512;
  static constexpr bool kInteger = false;
  static constexpr int kWidth = 16, kInputs = 1;
  static Sum zero() { return lane_zero(); }
  static Sum add(Sum a, Sum b) { return lane_add(a, b); }
  static void store(float* p, Sum v) { lane_store(p, v); }
  static Sum weights(const W* p) { return lane_load(p); }
  template <int kRows>
  LISSOM_INLINE static void multiply(Sum& sum, const float* x, Sum w) {
    dot(sum, lane_set1(x), w);
  }
};
template <typename W>
struct FloatOutputs<W, 8> {
  using Weight = W;
  using Sum = __m256;
  static constexpr bool kInteger = false;
  static constexpr int kWidth = 8, kInputs = 1;
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum add(Sum a, Sum b) { return _mm256_add_ps(a, b); }
  static void store(float* p, Sum v) { _mm256_storeu_ps(p, v); }
  static Sum weights(const float* p) { return _mm256_loadu_ps(p); }
  static Sum weights(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Sum weights(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int kRows>
  LISSOM_INLINE static void multiply(Sum& sum, const float* x, Sum w) {
    const Sum value = _mm256_broadcast_ss(x);
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(value), "v"(w));
  }
};
struct ByteOutputs {
  using Weight = int8_t;
  using Sum = __m512i;
  static constexpr bool kInteger = true;
  static constexpr int kWidth = 16, kInputs = 1;
  static Sum zero() { return ByteLanes::zero(); }
  static Sum add(Sum a, Sum b) { return ByteLanes::add(a, b); }
  static void store(float* p, Sum v) { ByteLanes::store(p, v); }
  static Sum weights(const int8_t* p) { return load_line(p); }
  template <int kRows>
  LISSOM_INLINE static void multiply(Sum& sum, const float* x, Sum w) {
    dot(sum, broadcast_quad(reinterpret_cast<const uint8_t*>(x)), w);
  }
};
