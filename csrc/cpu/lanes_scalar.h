// Vectors whose lanes are rows of x: what the block-sparse kernels are written on. Included once, inside
// namespace lissom::scalar, after simd_scalar.h.

constexpr int kLanes = 8;    // rows of a vector
constexpr int kVectors = 1;  // most vectors of a tile
constexpr int kGroup = 4;    // most outputs of a tile

struct Lane {
  float v[kLanes];
};
inline Lane lane_load(const float* p) {
  Lane r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = p[i];
  return r;
}
inline void lane_store(float* p, Lane a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.v[i];
}
inline float lane_value(const float* p) { return *p; }
inline float lane_value(const BFloat16* p) { return widen(*p); }
inline float lane_value(const Float16* p) { return widen(*p); }
inline float lane_value(const int8_t* p) { return static_cast<float>(*p); }
template <typename W>
inline Lane lane_set1(const W* p) {
  Lane r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = lane_value(p);
  return r;
}
inline Lane lane_zero() { return Lane{}; }
inline Lane lane_add(Lane a, Lane b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
inline float lane_sum(Lane a) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += a.v[i];
  return sum;
}
inline void dot(Lane& acc, Lane x, Lane w) {
  for (int i = 0; i < kLanes; ++i) acc.v[i] += x.v[i] * w.v[i];
}

inline I16 as_int(F16 v) {
  I16 r;
  __builtin_memcpy(&r, &v, sizeof(r));
  return r;
}

// kLanes rows of 16 columns -> 16 columns of kLanes rows, `stride` apart; and back.
inline void transpose(const F16* rows, float* to, int64_t stride) {
  for (int j = 0; j < 16; ++j) {
    for (int i = 0; i < kLanes; ++i) to[j * stride + i] = rows[i].v[j];
  }
}
inline void transpose_back(const float* from, int64_t stride, F16* rows) {
  for (int j = 0; j < 16; ++j) {
    for (int i = 0; i < kLanes; ++i) rows[i].v[j] = from[j * stride + i];
  }
}

// What a tile multiplies: a unit is one column in float, a quad of columns in int8. kUnitVectors: vectors of
// x that a unit takes per vector of rows; kWeightStep: weights of an output in a unit.
template <typename W>
struct FloatLanes {
  using Weight = W;
  using Sum = Lane;
  static constexpr bool kInteger = false;
  static constexpr int kUnitVectors = 1, kWeightStep = 1;

  static Sum zero() { return lane_zero(); }
  static Sum add(Sum a, Sum b) { return lane_add(a, b); }
  static void store(float* p, Sum v) { lane_store(p, v); }

  // acc[r][v] += x[v] * w[r]
  template <int kOutputs, int kVecs>
  static void unit(Sum (*acc)[kVecs], const float* x, const W* w, int64_t row_stride) {
    for (int r = 0; r < kOutputs; ++r) {
      const float wr = lane_value(w + r * row_stride);
      for (int i = 0; i < kLanes; ++i) acc[r][0].v[i] += x[i] * wr;
    }
  }
};

struct ByteLanes {
  struct Sum {
    int32_t v[kLanes];
  };
  using Weight = int8_t;
  static constexpr bool kInteger = true;
  static constexpr int kUnitVectors = 1, kWeightStep = kQuad;

  static Sum zero() { return Sum{}; }
  static Sum add(Sum a, Sum b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  static void store(float* p, Sum a) { __builtin_memcpy(p, &a, sizeof(a)); }

  template <int kOutputs, int kVecs>
  static void unit(Sum (*acc)[kVecs], const float* x, const int8_t* w, int64_t row_stride) {
    const int8_t* bytes = reinterpret_cast<const int8_t*>(x);
    for (int r = 0; r < kOutputs; ++r) {
      for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < kQuad; ++j) acc[r][0].v[i] += bytes[i * kQuad + j] * w[r * row_stride + j];
      }
    }
  }
};

// Four columns anywhere, as a unit: panels are bytes, [columns][rows].
struct GatherLanes {
  static constexpr int kLeastVectors = 1, kMostVectors = 1, kBytes = 1;

  // Where a group of 4 rows is stored, in groups.
  static int place(int group, int) { return group; }

  template <int kOutputs, int kVecs>
  static void unit(ByteLanes::Sum (*acc)[kVecs], const float* panel, const int32_t* columns,
                   const int8_t* w) {
    const int8_t* bytes = reinterpret_cast<const int8_t*>(panel);
    for (int r = 0; r < kOutputs; ++r) {
      for (int j = 0; j < kQuad; ++j) {
        const int8_t* x = bytes + int64_t{columns[j]} * kLanes;
        for (int i = 0; i < kLanes; ++i) acc[r][0].v[i] += x[i] * w[r * kQuad + j];
      }
    }
  }
};
