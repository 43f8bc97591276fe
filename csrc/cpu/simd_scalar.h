// 16 lanes in plain C++: the definition that simd_avx2.h and simd_avx512.h repeat with intrinsics.
// Included once, inside namespace lissom::scalar. Functions carry no state; names are the same in all three.

struct F16 {
  float v[16];
};
struct I16 {
  int32_t v[16];
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }
inline float widen(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu, mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 is exact
    return bits_to_float(float_to_bits(static_cast<float>(mantissa) * 5.9604644775390625e-08f) | sign);
  }
  if (exponent == 31)
    return bits_to_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
inline void narrow(float value, Float16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves mantissa * 2^-24, rounded to even, in the low bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

inline F16 set1(float value) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = value;
  return r;
}
template <typename T>
inline F16 load_n(const T* p, int n) {
  F16 r = set1(0.0f);
  for (int i = 0; i < n; ++i) r.v[i] = widen(p[i]);
  return r;
}
template <typename T>
inline F16 load(const T* p) {
  return load_n(p, 16);
}
template <typename T>
inline void store_n(T* p, F16 x, int n) {
  for (int i = 0; i < n; ++i) narrow(x.v[i], p + i);
}
template <typename T>
inline void store(T* p, F16 x) {
  store_n(p, x, 16);
}

#define LISSOM_LANES(type, expression)              \
  type r;                                           \
  for (int i = 0; i < 16; ++i) r.v[i] = expression; \
  return r

inline F16 add(F16 a, F16 b) { LISSOM_LANES(F16, a.v[i] + b.v[i]); }
inline F16 sub(F16 a, F16 b) { LISSOM_LANES(F16, a.v[i] - b.v[i]); }
inline F16 mul(F16 a, F16 b) { LISSOM_LANES(F16, a.v[i] * b.v[i]); }
inline F16 div(F16 a, F16 b) { LISSOM_LANES(F16, a.v[i] / b.v[i]); }
inline F16 fma(F16 a, F16 b, F16 c) { LISSOM_LANES(F16, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
// As the SSE instructions: the second operand wins where either is NaN.
inline F16 max(F16 a, F16 b) { LISSOM_LANES(F16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F16 min(F16 a, F16 b) { LISSOM_LANES(F16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F16 round(F16 a) { LISSOM_LANES(F16, __builtin_nearbyintf(a.v[i])); }  // half to even
inline F16 abs(F16 a) { LISSOM_LANES(F16, bits_to_float(float_to_bits(a.v[i]) & 0x7fffffffu)); }
inline F16 negate(F16 a) { LISSOM_LANES(F16, bits_to_float(float_to_bits(a.v[i]) ^ 0x80000000u)); }
inline F16 select_negative(F16 x, F16 a, F16 b) { LISSOM_LANES(F16, x.v[i] < 0 ? a.v[i] : b.v[i]); }

// Lanes from n on become `value`.
inline F16 fill_from(F16 a, int n, float value) { LISSOM_LANES(F16, i < n ? a.v[i] : value); }
// where > 0 ? value : 0; NaN in `where` gives 0.
inline F16 where_positive(F16 where, F16 value) { LISSOM_LANES(F16, where.v[i] > 0 ? value.v[i] : 0.0f); }
// c + (where > 0 ? a * b : 0); NaN in `where` gives c, or NaN.
inline F16 fma_where_positive(F16 where, F16 a, F16 b, F16 c) {
  LISSOM_LANES(F16, where.v[i] > 0 ? __builtin_fmaf(a.v[i], b.v[i], c.v[i]) : c.v[i]);
}
// The lowest nine bits as sign and exponent of a float.
inline F16 exponent_field(F16 a) { LISSOM_LANES(F16, bits_to_float(float_to_bits(a.v[i]) << 23)); }
// In halves: lane i takes lane i + 8, then i + 4, i + 2, i + 1.
inline float reduce_add(F16 a) {
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) a.v[i] += a.v[i + step];
  }
  return a.v[0];
}
inline float reduce_max(F16 a) {
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) a.v[i] = a.v[i] > a.v[i + step] ? a.v[i] : a.v[i + step];
  }
  return a.v[0];
}

// Half to even. NaN gives 0 here and INT_MIN in the vector ISAs: rows with NaN never use the result.
inline I16 to_int(F16 a) {
  LISSOM_LANES(I16, a.v[i] == a.v[i] ? static_cast<int32_t>(__builtin_nearbyintf(a.v[i])) : 0);
}
inline F16 to_float(I16 a) { LISSOM_LANES(F16, static_cast<float>(a.v[i])); }
inline F16 power_of_two(I16 n) {
  LISSOM_LANES(F16, bits_to_float(static_cast<uint32_t>(n.v[i] + 127) << 23));
}
// x = mantissa * 2^exponent with the mantissa in [0.5, 1), for positive normal x; returns the exponent.
inline F16 split(F16 x, F16* mantissa) {
  F16 exponent;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = float_to_bits(x.v[i]);
    exponent.v[i] = static_cast<float>(static_cast<int32_t>(bits >> 23 & 255) - 126);
    mantissa->v[i] = bits_to_float((bits & 0x807fffffu) | 0x3f000000u);
  }
  return exponent;
}
inline I16 load_int(const int32_t* p) { LISSOM_LANES(I16, p[i]); }
inline I16 load_int8(const int8_t* p) { LISSOM_LANES(I16, p[i]); }
inline I16 load_int8_n(const int8_t* p, int n) { LISSOM_LANES(I16, i < n ? p[i] : 0); }

// Bits of |x|: as integers they order like the numbers, with infinity and NaN on top.
inline I16 magnitude_bits(F16 a) {
  LISSOM_LANES(I16, static_cast<int32_t>(float_to_bits(a.v[i]) & 0x7fffffffu));
}
inline I16 zero_int() { LISSOM_LANES(I16, 0); }
inline I16 max_int(I16 a, I16 b) { LISSOM_LANES(I16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline I16 add_int(I16 a, I16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline int32_t reduce_add(I16 a) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += a.v[i];
  return sum;
}
inline int32_t reduce_max(I16 a) {
  int32_t r = a.v[0];
  for (int i = 1; i < 16; ++i) r = a.v[i] > r ? a.v[i] : r;
  return r;
}

// Times the 16 x 16 Hadamard matrix: butterflies at distance 1, 2, 4, 8, as formats.py's rotate.
inline F16 hadamard(F16 x) {
  for (int distance = 1; distance < 16; distance *= 2) {
    F16 y;
    for (int i = 0; i < 16; ++i) {
      y.v[i] = i & distance ? x.v[i ^ distance] - x.v[i] : x.v[i] + x.v[i ^ distance];
    }
    x = y;
  }
  return x;
}

#undef LISSOM_LANES
