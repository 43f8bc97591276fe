// Distillation losses: the algorithm that every ISA shares, written once on 16 lanes. Included once per ISA,
// inside that ISA's namespace, after its simd_*.h and activation.h. Not a stand-alone header.
//
// A row is read twice: for the maxima and sums of exponentials (chunk by chunk, so that a chunk's maximum is
// found while it is in L1), and for terms and gradient, which need them; reverse KL, JS and entropy read it
// once more.
//
// Precision. With d = log q - log p, of teacher and student, a term such as q log(q / p) is given p - q in
// addition, which sums to zero over the row: what is left is of second order in d, as the loss is. Where
// student and teacher nearly agree even that would cancel in float; there terms and gradient come from series
// in d, which itself comes from the difference of the logits. Sums are float within a chunk, double beyond.

constexpr int kChunk = 2048;
// Elements of the chunk at `begin`. What does not fill a vector is a chunk of its own, so that all else is
// used where it is.
inline int chunk_size(int64_t begin, int64_t end) {
  const int64_t rest = end - begin;
  return static_cast<int>(rest >= kChunk ? kChunk : rest < 16 ? rest : rest / 16 * 16);
}

// Functions on V take vectors of 16, or Wide ones: as many as an ISA's registers allow at once (an alias in
// the ISA's file).
template <typename T>
inline void load_to(const T* p, F16* x) {
  *x = load(p);
}

// A rate r, for exp(r x): r / ln 2 as two floats.
template <typename V>
struct RateOf {
  V high, low, lowest;
};
constexpr float kLowestExponent = -127.0f;
struct Rate : RateOf<F16> {
  explicit Rate(double rate) {
    const double binary = rate * 1.4426950408889634, limit = kLowestExponent / binary;
    high = set1(static_cast<float>(binary));
    low = set1(static_cast<float>(binary - static_cast<double>(static_cast<float>(binary))));
    lowest = set1(limit > -3e38 ? static_cast<float>(limit) : -3e38f);
  }
};

// 1.5 * 2^23 + 127: adding it rounds x to an integer n in [-127, 0], and leaves n + 127, the exponent's field
// of 2^n, in the lowest bits. It is 0 for -127.
constexpr float kRounder = 12583039.0f;

// mantissa * scale
template <typename V>
struct Power {
  V mantissa, scale;
  V value() const { return mul(mantissa, scale); }
};
// exp(rate * x) for x <= 0, 0 where it would be denormal; NaN stays. Relative error below 2 * 2^-23 where x
// is exact (tested). Coefficients: minimax of 2^f on [-1/2, 1/2], 1 at 0.
template <typename V, typename R>
inline Power<V> exp_scaled(V x, const R& rate) {
  x = max(rate.lowest, x);
  const V shifted = fma(x, rate.high, set1(kRounder));
  const V f = fma(x, rate.low, fma(x, rate.high, sub(set1(kRounder), shifted)));
  V p = set1(1.3264727e-3f);
  p = fma(p, f, set1(9.6715130e-3f));
  p = fma(p, f, set1(5.5507336e-2f));
  p = fma(p, f, set1(2.4022242e-1f));
  p = fma(p, f, set1(6.9314700e-1f));
  p = fma(p, f, set1(1.0f));
  return {p, exponent_field(shifted)};
}
inline F16 exp_negative(F16 x) { return exp_scaled(x, Rate(1.0)).value(); }

// What a row's terms and gradient are made of: with x = log p - log q, of student and teacher, and y = -|x|,
// all follows from the larger of p and q, and from E = e^y - 1. E is 2^n (2^f - 1) + (2^n - 1), and 2^f - 1 =
// h + w, h = f ln 2, w of second order, so that nothing cancels where p and q nearly agree: n is 0 there.
template <typename V>
struct Comparison {
  V expm1;  // E: p - q is E where q is the larger, -E where p is, times the larger
  V term;   // of forward KL, q log(q / p) + p - q, where q is the larger; minus it where p is. With the other
            // sign, reverse KL's p log(p / q) + q - p.
};
// gap: x / unit, any number; per_unit: -unit / ln 2
template <bool kReverse, typename V>
inline Comparison<V> compare(V gap, F16 per_unit) {
  const V exact = mul(abs(gap), per_unit);  // y / ln 2; exp2's bounds would spoil y itself
  const V y = max(exact, set1(kLowestExponent));
  const V shifted = add(y, set1(kRounder));
  const V g = sub(sub(shifted, set1(kRounder)), y), scale = exponent_field(shifted);  // g: -f
  const V ln2 = set1(-6.9314718e-1f), h = mul(g, ln2), size = mul(y, ln2);            // ln2: -ln 2
  V w = set1(1.5417278e-4f);
  w = fma(w, g, set1(-1.3381250e-3f));
  w = fma(w, g, set1(9.6181724e-3f));
  w = fma(w, g, set1(-5.5503812e-2f));
  w = fma(w, g, set1(2.4022651e-1f));
  w = mul(mul(g, g), w);
  const V sum = add(h, w), below = sub(scale, set1(1.0f));
  // E - y, and E - (E + 1) y; what is of first order cancels exactly where n = 0.
  const V larger_q = fma(scale, w, fma(fma(scale, g, exact), ln2, below));
  const V larger_p = fma(scale, fma(sum, size, add(add(h, size), w)), below);
  return {fma(scale, sum, below),
          kReverse ? select_negative(gap, larger_p, larger_q) : select_negative(gap, larger_q, larger_p)};
}

// (ln(1 + r) - r + r^2 / 2) / r^3. Source: Cephes, logf.
inline F16 log_series(F16 r) {
  F16 p = set1(7.0376836292e-2f);
  p = fma(p, r, set1(-1.1514610310e-1f));
  p = fma(p, r, set1(1.1676998740e-1f));
  p = fma(p, r, set1(-1.2420140846e-1f));
  p = fma(p, r, set1(1.4249322787e-1f));
  p = fma(p, r, set1(-1.6668057665e-1f));
  p = fma(p, r, set1(2.0000714765e-1f));
  p = fma(p, r, set1(-2.4999993993e-1f));
  return fma(p, r, set1(3.3333331174e-1f));
}

// ln x for positive normal x. Source: Cephes, logf.
inline F16 log(F16 x) {
  F16 mantissa;
  F16 exponent = split(x, &mantissa);  // mantissa in [0.5, 1)
  const F16 low = sub(mantissa, set1(0.70710678f));
  exponent = sub(exponent, select_negative(low, set1(1.0f), set1(0.0f)));
  const F16 r = sub(add(mantissa, select_negative(low, mantissa, set1(0.0f))), set1(1.0f));
  const F16 z = mul(r, r);
  F16 y = mul(mul(r, z), log_series(r));
  y = fma(exponent, set1(-2.12194440e-4f), y);
  y = fma(set1(-0.5f), z, y);
  y = add(r, y);
  return fma(exponent, set1(0.693359375f), y);
}

// tanh. Source: Cephes, tanhf; relative error below 2 ulp.
inline F16 tanh(F16 x) {
  const F16 size = abs(x), z = mul(x, x);
  F16 p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const F16 small = fma(mul(p, z), x, x);
  const F16 e = exp_negative(mul(size, set1(-2.0f)));
  const F16 large = div(sub(set1(1.0f), e), add(set1(1.0f), e));
  const F16 signed_large = select_negative(x, negate(large), large);
  return select_negative(sub(size, set1(0.625f)), small, signed_large);
}

// x, infinities as huge numbers; NaN stays.
template <typename V>
inline V finite(V x) {
  return max(set1(-1e30f), min(set1(1e30f), x));
}

// A factor in two floats.
struct Factor {
  explicit Factor(double value)
      : high(set1(static_cast<float>(value))),
        low(set1(static_cast<float>(value - static_cast<double>(static_cast<float>(value))))) {}
  F16 times(F16 x) const { return fma(x, high, mul(finite(x), low)); }
  F16 high, low;
};

// Below this |d| the series are used. Their last terms are below 2^-24 of the first.
constexpr float kSeries = 0.3f;
// e^d - 1 = d (1 + d / 2 + …)
inline F16 expm1_series(F16 d) {
  F16 p = set1(static_cast<float>(1.0 / 5040));
  p = fma(p, d, set1(static_cast<float>(1.0 / 720)));
  p = fma(p, d, set1(static_cast<float>(1.0 / 120)));
  p = fma(p, d, set1(static_cast<float>(1.0 / 24)));
  p = fma(p, d, set1(static_cast<float>(1.0 / 6)));
  p = fma(p, d, set1(0.5f));
  return fma(mul(d, d), p, d);
}
// e^d d - (e^d - 1) = sum over n >= 2 of d^n (n - 1) / n!: what q log(q / p) + p - q is, over p.
inline F16 forward_series(F16 d) {
  F16 p = set1(static_cast<float>(1.0 / 5760));
  p = fma(p, d, set1(static_cast<float>(1.0 / 840)));
  p = fma(p, d, set1(static_cast<float>(1.0 / 144)));
  p = fma(p, d, set1(static_cast<float>(1.0 / 30)));
  p = fma(p, d, set1(0.125f));
  p = fma(p, d, set1(static_cast<float>(1.0 / 3)));
  p = fma(p, d, set1(0.5f));
  return mul(mul(d, d), p);
}
// y - ln(1 + y) for y in [-0.29, 0.41]. Source: Cephes, logf.
inline F16 log1p_rest(F16 y) {
  const F16 z = mul(y, y);
  return fma(set1(0.5f), z, negate(mul(mul(y, z), log_series(y))));
}
inline F16 where_close(F16 d, F16 series, F16 otherwise) {
  return select_negative(sub(abs(d), set1(kSeries)), series, otherwise);
}

inline float minus_infinity() { return bits_to_float(0xff800000u); }

// ---- logits ---------------------------------------------------------------------------------------------

template <typename T>
void convert(const T* from, int count, const Logits& how, float softcap, float* to, float* slope) {
  const float scale = how.scale;
  const bool scaled = how.scaled_first(softcap);
  const F16 cap = set1(softcap), factor = set1(scale);
  const Factor per_cap(softcap != 0.0f ? static_cast<double>(scale) / softcap : 0.0);
  for (int i = 0; i < count; i += 16) {
    F16 z = count - i < 16 ? load_n(from + i, count - i) : load(from + i);
    if (softcap != 0.0f) {
      const F16 u = fma(z, per_cap.high, mul(finite(z), per_cap.low));
      const F16 t = tanh(u);
      z = mul(cap, t);
      if (slope) {  // 1 - tanh^2 = 4 e / (1 + e)^2, in which nothing cancels but more is rounded
        const F16 e = exp_negative(mul(abs(u), set1(-2.0f)));
        const F16 sum = add(set1(1.0f), e), large = div(mul(set1(4.0f), e), mul(sum, sum));
        const F16 small = fma(negate(t), t, set1(1.0f));
        store(slope + i, mul(factor, select_negative(sub(abs(u), set1(1.25f)), small, large)));
      }
    } else if (scaled) {
      z = mul(z, factor);
    }
    store(to + i, count - i < 16 ? fill_from(z, count - i, minus_infinity()) : z);
  }
}

// `count` elements of a row as floats, scaled and capped if need be; filled up with -infinity to a
// multiple of 16. Plain floats are used where they are. slope: dz / dlogit of capped logits.
const float* read(const Logits& logits, float softcap, int64_t row, int64_t begin, int count, float* buffer,
                  float* slope) {
  const int64_t at = row * logits.stride + begin;
  switch (logits.type) {
    case DType::kFloat32: {
      const float* from = static_cast<const float*>(logits.data) + at;
      if (count % 16 == 0 && !logits.scaled_first(softcap)) return from;
      convert(from, count, logits, softcap, buffer, slope);
      break;
    }
    case DType::kBFloat16:
      convert(static_cast<const BFloat16*>(logits.data) + at, count, logits, softcap, buffer, slope);
      break;
    case DType::kFloat16:
      convert(static_cast<const Float16*>(logits.data) + at, count, logits, softcap, buffer, slope);
      break;
  }
  return buffer;
}

// The last elements of a chunk, filled up with -infinity.
template <typename T>
inline F16 load_tail(const T* z, int count) {
  return fill_from(load_n(z, count), count, minus_infinity());
}

inline float chunk_max(const float* z, int count) {
  F16 m0 = set1(minus_infinity()), m1 = m0;
  int i = 0;
  for (; i + 32 <= count; i += 32) {
    m0 = max(m0, load(z + i));
    m1 = max(m1, load(z + i + 16));
  }
  for (; i + 16 <= count; i += 16) m0 = max(m0, load(z + i));
  if (i < count) m1 = max(m1, load_tail(z + i, count - i));
  return reduce_max(max(m0, m1));
}

// The chunk's maximum, and the chunk as floats: 16 bits are widened once, for maximum and exponentials
// (512 x 32000, bfloat16, one thread: 11.9 -> 11.4 ms).
inline const float* widen_and_max(const float* z, int count, float*, float* largest) {
  *largest = chunk_max(z, count);
  return z;
}
template <typename T>
const float* widen_and_max(const T* z, int count, float* buffer, float* largest) {
  F16 m0 = set1(minus_infinity()), m1 = m0;
  int i = 0;
  for (; i + 32 <= count; i += 32) {
    const F16 a = load(z + i), b = load(z + i + 16);
    store(buffer + i, a);
    store(buffer + i + 16, b);
    m0 = max(m0, a);
    m1 = max(m1, b);
  }
  for (; i < count; i += 16) {
    const F16 a = count - i < 16 ? load_tail(z + i, count - i) : load(z + i);
    store(buffer + i, a);
    m0 = max(m0, a);
  }
  *largest = reduce_max(max(m0, m1));
  return buffer;
}

// sum of exp((z - largest) * rate); 0, or NaN where there is one, if nothing was larger than -infinity so
// far.
inline float chunk_exp(const float* z, int count, float largest, Rate rate) {
  F16 s0 = set1(0.0f), s1 = s0;
  int i = 0;
  if (largest == minus_infinity()) {
    const auto zero = [](F16 x) { return mul(max(set1(-1.0f), x), set1(0.0f)); };
    for (; i + 16 <= count; i += 16) s0 = add(s0, zero(load(z + i)));
    if (i < count) s0 = add(s0, zero(load_tail(z + i, count - i)));
    return reduce_add(s0);
  }
  const F16 m = set1(largest);
  for (; i + 32 <= count; i += 32) {
    const Power<F16> e0 = exp_scaled(sub(load(z + i), m), rate),
                     e1 = exp_scaled(sub(load(z + i + 16), m), rate);
    s0 = fma(e0.mantissa, e0.scale, s0);
    s1 = fma(e1.mantissa, e1.scale, s1);
  }
  for (; i + 16 <= count; i += 16) s0 = add(s0, exp_scaled(sub(load(z + i), m), rate).value());
  if (i < count) s1 = add(s1, exp_scaled(sub(load_tail(z + i, count - i), m), rate).value());
  return reduce_add(add(s0, s1));
}

// body(logits from `begin` on, as they are stored, or as floats in the buffer, where they are to be scaled or
// capped first)
template <typename Body>
void with_logits(const Logits& logits, float softcap, int64_t row, int64_t begin, int count, float* buffer,
                 const Body& body) {
  if (logits.scaled_first(softcap)) return body(read(logits, softcap, row, begin, count, buffer, nullptr));
  const int64_t at = row * logits.stride + begin;
  switch (logits.type) {
    case DType::kFloat32: return body(static_cast<const float*>(logits.data) + at);
    case DType::kBFloat16: return body(static_cast<const BFloat16*>(logits.data) + at);
    case DType::kFloat16: return body(static_cast<const Float16*>(logits.data) + at);
  }
}

// Raises `largest` to the chunk's maximum, and lowers sums that are relative to it.
inline void raise(float* largest, float seen, double rate, double* sum, double plain_rate, double* plain) {
  if (!(seen > *largest)) return;
  const double step = static_cast<double>(*largest) - static_cast<double>(seen);
  if (*sum != 0.0) *sum *= __builtin_exp(step * rate);
  if (plain && *plain != 0.0) *plain *= __builtin_exp(step * plain_rate);
  *largest = seen;
}

// ---- first pass -----------------------------------------------------------------------------------------

DistillSums sums(const DistillArgs& args, int64_t row, int64_t begin, int64_t end) {
  DistillSums out{minus_infinity(), minus_infinity(), 0.0, 0.0, 0.0, 0.0};
  const double student_rate = args.student_rate(), teacher_rate = args.teacher_rate();
  const double plain_rate = args.plain_rate();
  const Rate of_student(student_rate), of_teacher(teacher_rate), of_plain(plain_rate);
  const bool plain = args.has_ce() && args.temperature != 1.0f;
  const bool smooth = args.has_ce() && args.label_smoothing != 0.0f;
  alignas(64) float buffer[kChunk];
  for (int64_t j = begin; j < end; j += kChunk) {
    const int count = end - j < kChunk ? static_cast<int>(end - j) : kChunk;
    with_logits(args.student, args.softcap, row, j, count, buffer, [&](const auto* stored) {
      float seen;
      const float* z = widen_and_max(stored, count, buffer, &seen);
      raise(&out.student_max, seen, student_rate, &out.student, plain_rate, plain ? &out.plain : nullptr);
      out.student += chunk_exp(z, count, out.student_max, of_student);
      if (plain) out.plain += chunk_exp(z, count, out.student_max, of_plain);
      if (smooth) {
        F16 total = set1(0.0f);
        for (int i = 0; i < count; i += 16)
          total = add(total, load_n(z + i, count - i < 16 ? count - i : 16));
        out.z += reduce_add(total);
      }
    });
    if (args.has_teacher()) {
      with_logits(args.teacher, args.softcap, row, j, count, buffer, [&](const auto* stored) {
        float seen;
        const float* t = widen_and_max(stored, count, buffer, &seen);
        raise(&out.teacher_max, seen, teacher_rate, &out.teacher, 0.0, nullptr);
        out.teacher += chunk_exp(t, count, out.teacher_max, of_teacher);
      });
    }
  }
  return out;
}

// ---- terms and gradient ---------------------------------------------------------------------------------

// What all rows have in common.
struct Rates {
  explicit Rates(const DistillArgs& args)
      : per_student_rate(1.0 / args.student_rate()),
        student_rate(args.student_rate()),
        teacher_rate(args.teacher_rate()),
        of_student(args.student_rate()),
        of_teacher(args.teacher_rate()),
        of_plain(args.plain_rate()) {}

  double per_student_rate;
  Factor student_rate, teacher_rate;
  Rate of_student, of_teacher, of_plain;
};

// What a row's chunks have in common.
struct RowFactors : Rates {
  RowFactors(const DistillArgs& args, const DistillRow& stats) : RowFactors(args, Rates(args), stats) {}
  RowFactors(const DistillArgs& args, const Rates& rates, const DistillRow& stats)
      : Rates(rates),
        shift(stats.shift),
        gap_shift(stats.close ? -stats.shift * per_student_rate : 0.0),
        student_max(set1(stats.student_max)),
        teacher_max(set1(stats.teacher_max)),
        per_student(set1(static_cast<float>(1.0 / stats.student_sum))),
        per_teacher(set1(static_cast<float>(1.0 / stats.teacher_sum))),
        per_plain(set1(static_cast<float>(1.0 / stats.plain_sum))),
        student_log(set1(static_cast<float>(stats.student_log))),
        per_gap(set1(static_cast<float>(-1.4426950408889634 * (stats.close ? args.student_rate() : 1.0)))),
        kl(set1(static_cast<float>(args.term_scale * args.temperature) * args.kl_weight +
                0.0f * static_cast<float>(stats.shift))) {}

  // log p, up to the row's constant
  F16 exponent(F16 z) const { return student_rate.times(sub(z, student_max)); }
  F16 student(F16 z) const { return mul(exp_scaled(sub(z, student_max), of_student).value(), per_student); }
  F16 teacher(F16 t) const { return mul(exp_scaled(sub(t, teacher_max), of_teacher).value(), per_teacher); }
  F16 plain(F16 z) const { return mul(exp_scaled(sub(z, student_max), of_plain).value(), per_plain); }
  // log p - log q, times -ln 2 * per_gap
  template <bool kClose, typename V>
  V gap(V z, V t) const {
    return kClose ? add(add(sub(z, t), gap_shift.high), gap_shift.low) : negate(log_ratio<false>(z, t));
  }
  // log q - log p
  template <bool kClose, typename V>
  V log_ratio(V z, V t) const {
    return log_ratio<kClose>(z, t, shift);
  }
  // … with another shift: plus a constant, before anything is rounded.
  template <bool kClose, typename V>
  V log_ratio(V z, V t, const Factor& shift) const {
    if (kClose) {
      const V u = sub(t, z);
      return add(fma(u, student_rate.high, shift.high), fma(finite(u), student_rate.low, shift.low));
    }
    t = sub(t, teacher_max);
    z = negate(sub(z, student_max));
    const V low = fma(finite(t), teacher_rate.low, fma(finite(z), student_rate.low, shift.low));
    return add(fma(z, student_rate.high, fma(t, teacher_rate.high, shift.high)), low);
  }

  Factor shift, gap_shift;
  F16 student_max, teacher_max, per_student, per_teacher, per_plain, student_log, per_gap;
  F16 kl;  // factor of the gradient; NaN where the row has one, in student or teacher
};

// How a row's loss is put together.
template <Divergence kOf, bool kHasTeacher, bool kIsClose>
struct Form {
  static constexpr Divergence kDivergence = kOf;
  static constexpr bool kTeacher = kHasTeacher, kClose = kIsClose;
};
template <typename Body>
void with_form(const DistillArgs& args, const DistillRow& stats, const Body& body) {
  if (!args.has_teacher()) return body(Form<Divergence::kForward, false, true>{});
  const auto either = [&](auto close, auto other) { stats.close ? body(close) : body(other); };
  switch (args.divergence) {
    case Divergence::kForward:
      return either(Form<Divergence::kForward, true, true>{}, Form<Divergence::kForward, true, false>{});
    case Divergence::kReverse:
      return either(Form<Divergence::kReverse, true, true>{}, Form<Divergence::kReverse, true, false>{});
    case Divergence::kJs:
      return either(Form<Divergence::kJs, true, true>{}, Form<Divergence::kJs, true, false>{});
  }
}

// log(m / p) of the mixture m = beta q + (1 - beta) p.
inline F16 log_mixture(F16 p, F16 mixture) { return log(div(mixture, max(p, set1(1.2e-38f)))); }

// q where student and teacher compare by a negative gap, -p elsewhere: the larger one, signed as `compare`
// has it. `size` is it without its normalizer.
template <typename V>
struct Larger {
  V size, value;
};
template <bool kClose, typename V>
inline Larger<V> larger(const RowFactors& row, V gap, V z, V t) {
  const V x = select_negative(gap, sub(t, row.teacher_max), sub(z, row.student_max));
  V size;
  if (kClose) {  // rates are the same
    size = exp_scaled(x, row.of_student).value();
  } else {
    const RateOf<V> rate{select_negative(gap, row.of_teacher.high, row.of_student.high),
                         select_negative(gap, row.of_teacher.low, row.of_student.low),
                         select_negative(gap, row.of_teacher.lowest, row.of_student.lowest)};
    size = exp_scaled(x, rate).value();
  }
  return {size, mul(size, select_negative(gap, row.per_teacher, negate(row.per_student)))};
}

// The next row's logits, fetched into L2 while this row's are computed with: the first pass over a row would
// otherwise wait for memory, and the second, which does not, would leave it idle. 512 x 32000: 1.26 -> 0.68
// ns an element.
struct Ahead {
  Ahead(const DistillArgs& args, int64_t row, int64_t begin) {
    const bool last = row + 1 == args.rows;
    const auto at = [&](const Logits& logits, int* step) -> const char* {
      *step = 0;
      if (logits.data == nullptr || last) return reinterpret_cast<const char*>(args.row_loss);
      *step = logits.type == DType::kFloat32 ? 4 : 2;
      return static_cast<const char*>(logits.data) + ((row + 1) * logits.stride + begin) * *step;
    };
    z = at(args.student, &z_step);
    t = at(args.teacher, &t_step);
  }
  void fetch(int i) const {
    __builtin_prefetch(z + i * z_step, 0, 2);
    __builtin_prefetch(t + i * t_step, 0, 2);
  }
  const char *z, *t;
  int z_step, t_step;
};

// Adds forward KL's terms, or minus reverse KL's, to a sum. Returns forward KL's gradient.
template <typename F, typename V>
inline V step(const RowFactors& row, V z, V t, F16* sum) {
  const V gap = row.template gap<F::kClose>(z, t);
  const Comparison<V> both = compare<F::kDivergence == Divergence::kReverse>(gap, row.per_gap);
  const Larger<V> base = larger<F::kClose>(row, gap, z, t);
  *sum = fma_where_positive(base.size, base.value, both.term, *sum);
  return mul(mul(base.value, both.expm1), row.kl);
}
// The same for a chunk; the gradient may be where z is.
template <typename F, bool kGrad, typename T>
F16 chunk_steps(RowFactors row, const T* z, const T* t, int count, T* grad, Ahead ahead) {
  constexpr int kWide = 16 * sizeof(Wide) / sizeof(F16);
  F16 sum = set1(0.0f);
  int i = 0;
  for (; i + kWide <= count; i += kWide) {
    for (int k = 0; k < kWide; k += 16) ahead.fetch(i + k);
    Wide at_z, at_t;
    load_to(z + i, &at_z);
    load_to(t + i, &at_t);
    const Wide g = step<F>(row, at_z, at_t, &sum);
    if (kGrad) store(grad + i, g);
  }
  for (; i < count; i += 16) {
    const int n = count - i < 16 ? count - i : 16;
    const F16 g = step<F>(row, load_tail(z + i, n), load_tail(t + i, n), &sum);
    if (kGrad) store_n(grad + i, g, n);
  }
  return sum;
}

// Loss terms of a chunk, and its gradient with respect to z where it needs no second pass.
template <typename F, bool kEntropy, bool kGrad>
void chunk_terms(const DistillArgs& args, RowFactors row, const float* z, const float* t, int count,
                 DistillTerms* out, float* grad, Ahead ahead) {
  constexpr bool kSteps = F::kTeacher && F::kDivergence != Divergence::kJs;
  if (kSteps) {
    const double sum = reduce_add(chunk_steps<F, kGrad>(row, z, t, count, grad, ahead));
    out->divergence += F::kDivergence == Divergence::kReverse ? -sum : sum;
    if (!kEntropy) return;
  }
  const F16 beta = set1(args.js_beta), rest = set1(1.0f - args.js_beta);
  F16 divergence = set1(0.0f), student_divergence = divergence, entropy = divergence;
  for (int i = 0; i < count; i += 16) {
    const F16 at_z = load(z + i);
    if (F::kDivergence == Divergence::kJs) {
      const F16 p = row.student(at_z), q = row.teacher(load(t + i));
      const F16 d = row.template log_ratio<F::kClose>(at_z, load(t + i));
      const F16 mixture = fma(beta, q, mul(rest, p));
      const F16 far_student = sub(sub(mixture, p), where_positive(p, mul(p, log_mixture(p, mixture))));
      const F16 far_teacher = sub(sub(mixture, q), where_positive(q, mul(q, log_mixture(q, mixture))));
      // m = p (1 + y), q = p (1 + e)
      const F16 e = expm1_series(d), y = mul(beta, e), y_rest = log1p_rest(y);
      const F16 close_teacher = fma(add(set1(1.0f), e), y_rest, fma(negate(e), y, forward_series(d)));
      const F16 student = where_close(d, mul(p, y_rest), far_student);
      const F16 teacher = where_close(d, mul(p, close_teacher), far_teacher);
      student_divergence = add(student_divergence, student);
      divergence = add(divergence, fma(beta, teacher, mul(rest, student)));
    }
    if (kEntropy) {
      const F16 p = row.student(at_z);
      entropy = add(entropy, where_positive(p, mul(p, sub(row.student_log, row.exponent(at_z)))));
    }
  }
  if (F::kDivergence == Divergence::kJs) {
    out->divergence += reduce_add(divergence);
    out->student_divergence += reduce_add(student_divergence);
  }
  if (kEntropy) out->entropy += reduce_add(entropy);
}

// p (log(p / m) - mean)
inline F16 js_deviation(const DistillArgs& args, F16 p, F16 q, F16 d, const Factor& mean) {
  const F16 beta = set1(args.js_beta), rest = set1(1.0f - args.js_beta);
  const F16 y = mul(beta, expm1_series(d));
  const F16 of_p = where_close(d, sub(y, log1p_rest(y)), log_mixture(p, fma(beta, q, mul(rest, p))));
  return where_positive(p, mul(p, sub(sub(negate(of_p), mean.high), mean.low)));
}

// The gradient with respect to z that needs the row's terms: of reverse KL, JS and entropy.
template <typename F>
void chunk_gradient(const DistillArgs& args, RowFactors row, const DistillRow& stats, const float* z,
                    const float* t, int count, float entropy_rate, float* grad) {
  const F16 rest = set1(1.0f - args.js_beta);
  const F16 of_entropy = set1(entropy_rate);
  const Factor shift(stats.shift + stats.divergence);  // reverse KL: the mean of log p - log q
  const Factor student_mean(stats.student_divergence);
  const F16 above = set1(static_cast<float>(stats.entropy - stats.student_log));
  for (int i = 0; i < count; i += 16) {
    const F16 at_z = load(z + i), p = row.student(at_z);
    F16 g = set1(0.0f);
    if (F::kTeacher) {
      const F16 at_t = load(t + i);
      if (F::kDivergence == Divergence::kForward) {
        const F16 gap = row.template gap<F::kClose>(at_z, at_t);
        const F16 difference =
            mul(larger<F::kClose>(row, gap, at_z, at_t).value, compare<false>(gap, row.per_gap).expm1);
        g = mul(difference, row.kl);
      } else if (F::kDivergence == Divergence::kReverse) {
        const F16 above_mean = row.template log_ratio<F::kClose>(at_z, at_t, shift);
        g = mul(where_positive(p, mul(p, negate(above_mean))), row.kl);
      } else {
        const F16 d = row.template log_ratio<F::kClose>(at_z, at_t);
        g = mul(mul(rest, js_deviation(args, p, row.teacher(at_t), d, student_mean)), row.kl);
      }
    }
    // dH / da = -p (log p + H)
    g = fma(where_positive(p, mul(p, negate(add(row.exponent(at_z), above)))), of_entropy, g);
    // A row with NaN is NaN everywhere: p is, and masks above would hide it.
    store(grad + i, add(g, mul(p, set1(0.0f))));
  }
}

// Adds what CE and a top-k teacher give, follows scale and cap back to the logits, and stores.
void finish_gradient(const DistillArgs& args, const RowFactors& factors, int64_t row, int64_t begin,
                     int count, const float* z, const float* slope, float* grad) {
  const float rate = static_cast<float>(args.term_scale * args.temperature) * args.kl_weight;
  if (args.has_topk()) {
    // Q p - q, Q the mass that was kept
    const float* log_probs = args.topk.log_probs + row * args.topk.k;
    const int64_t* indices = args.topk.indices + row * args.topk.k;
    double mass = 0.0;
    for (int64_t i = 0; i < args.topk.k; ++i) mass += __builtin_exp(static_cast<double>(log_probs[i]));
    const F16 factor = set1(static_cast<float>(mass) * rate);
    for (int i = 0; i < count; i += 16) {
      store(grad + i, fma(factors.student(load(z + i)), factor, load(grad + i)));
    }
    for (int64_t i = 0; i < args.topk.k; ++i) {
      const int64_t at = indices[i] - begin;
      if (at >= 0 && at < count)
        grad[at] -= rate * static_cast<float>(__builtin_exp(static_cast<double>(log_probs[i])));
    }
  }
  if (args.has_ce()) {
    const float ce = static_cast<float>(args.ce_scale) * args.ce_weight;
    const F16 weight = set1(ce), smooth = set1(ce * args.label_smoothing / static_cast<float>(args.vocab));
    for (int i = 0; i < count; i += 16) {
      store(grad + i, sub(fma(factors.plain(load(z + i)), weight, load(grad + i)), smooth));
    }
    const int64_t at = args.labels[row] - begin;
    if (at >= 0 && at < count) grad[at] -= ce * (1.0f - args.label_smoothing);
  }
  if (args.softcap != 0.0f) {
    for (int i = 0; i < count; i += 16) store(grad + i, mul(load(grad + i), load(slope + i)));
  } else if (args.student.scale != 1.0f) {
    for (int i = 0; i < count; i += 16) store(grad + i, mul(load(grad + i), set1(args.student.scale)));
  }
  const int64_t at = row * args.grad_stride + begin;
  const auto write = [&](auto* to) {
    for (int i = 0; i < count; i += 16) store_n(to + i, load(grad + i), count - i < 16 ? count - i : 16);
  };
  switch (args.grad_type) {
    case DType::kFloat32: return write(static_cast<float*>(args.grad) + at);
    case DType::kBFloat16: return write(static_cast<BFloat16*>(args.grad) + at);
    case DType::kFloat16: return write(static_cast<Float16*>(args.grad) + at);
  }
}

// body(chunk's begin, count, padded count, student, teacher or null, slope)
template <typename Body>
void each_chunk(const DistillArgs& args, int64_t row, int64_t begin, int64_t end, const Body& body) {
  alignas(64) float students[kChunk], teachers[kChunk], slope[kChunk];
  for (int64_t j = begin, count; j < end; j += count) {
    count = chunk_size(j, end);
    const float* z = read(args.student, args.softcap, row, j, count, students, slope);
    const float* t =
        args.has_teacher() ? read(args.teacher, args.softcap, row, j, count, teachers, nullptr) : nullptr;
    body(j, count, (count + 15) / 16 * 16, z, t, slope);
  }
}

template <bool kGrad>
void terms_of(const DistillArgs& args, const RowFactors& factors, const DistillRow& stats, const float* z,
              const float* t, int count, DistillTerms* out, float* grad, const Ahead& ahead) {
  with_form(args, stats, [&](auto form) {
    using F = decltype(form);
    if (args.entropy_weight != 0.0f) {
      chunk_terms<F, true, false>(args, factors, z, t, count, out, grad, ahead);
    } else {
      chunk_terms<F, false, kGrad>(args, factors, z, t, count, out, grad, ahead);
    }
  });
}

// Forward KL alone, from logits to gradient without a buffer between.
template <typename T>
double plain_forward(const DistillArgs& args, const RowFactors& factors, const DistillRow& stats, int64_t row,
                     int64_t begin, int64_t end) {
  const T* z = static_cast<const T*>(args.student.data) + row * args.student.stride;
  const T* t = static_cast<const T*>(args.teacher.data) + row * args.teacher.stride;
  T* grad = static_cast<T*>(args.grad) + row * args.grad_stride;
  double sum = 0.0;
  for (int64_t j = begin; j < end; j += kChunk) {
    const int count = end - j < kChunk ? static_cast<int>(end - j) : kChunk;
    const Ahead ahead(args, row, j);
    const auto add_chunk = [&](auto form) {
      sum += reduce_add(chunk_steps<decltype(form), true>(factors, z + j, t + j, count, grad + j, ahead));
    };
    if (stats.close) {
      add_chunk(Form<Divergence::kForward, true, true>{});
    } else {
      add_chunk(Form<Divergence::kForward, true, false>{});
    }
  }
  return sum;
}

DistillTerms terms(const DistillArgs& args, int64_t row, const DistillRow& stats, int64_t begin,
                   int64_t end) {
  DistillTerms out{0.0, 0.0, 0.0};
  const RowFactors factors(args, stats);
  const bool write = args.grad != nullptr && !args.second_pass();
  if (write && args.plain_forward()) {
    switch (args.grad_type) {
      case DType::kFloat32:
        out.divergence = plain_forward<float>(args, factors, stats, row, begin, end);
        break;
      case DType::kBFloat16:
        out.divergence = plain_forward<BFloat16>(args, factors, stats, row, begin, end);
        break;
      case DType::kFloat16:
        out.divergence = plain_forward<Float16>(args, factors, stats, row, begin, end);
        break;
    }
    return out;
  }
  each_chunk(args, row, begin, end,
             [&](int64_t j, int count, int padded, const float* z, const float* t, const float* slope) {
               alignas(64) float grad[kChunk];
               const Ahead ahead(args, row, j);
               if (!write) {
                 if (args.has_teacher() || args.entropy_weight != 0.0f) {
                   terms_of<false>(args, factors, stats, z, t, padded, &out, grad, ahead);
                 }
                 return;
               }
               if (args.has_teacher()) {
                 terms_of<true>(args, factors, stats, z, t, padded, &out, grad, ahead);
               } else {
                 __builtin_memset(grad, 0, sizeof(float) * padded);
               }
               finish_gradient(args, factors, row, j, count, z, slope, grad);
             });
  return out;
}

DistillMean residue(const DistillArgs& args, int64_t row, const DistillRow& stats, int64_t begin,
                    int64_t end) {
  const RowFactors factors(args, stats);
  const Factor shift(stats.shift + stats.divergence), student_mean(stats.student_divergence);
  DistillMean out{0.0, 0.0};
  each_chunk(args, row, begin, end,
             [&](int64_t, int, int padded, const float* z, const float* t, const float*) {
               with_form(args, stats, [&](auto form) {
                 using F = decltype(form);
                 F16 sum = set1(0.0f), mass = sum;
                 for (int i = 0; i < padded; i += 16) {
                   const F16 p = factors.student(load(z + i));
                   if (F::kDivergence == Divergence::kReverse) {
                     const F16 d = factors.template log_ratio<F::kClose>(load(z + i), load(t + i), shift);
                     sum = add(sum, where_positive(p, mul(p, negate(d))));
                   } else {
                     const F16 d = factors.template log_ratio<F::kClose>(load(z + i), load(t + i));
                     sum = add(sum, js_deviation(args, p, factors.teacher(load(t + i)), d, student_mean));
                   }
                   mass = add(mass, p);
                 }
                 out.sum += reduce_add(sum);
                 out.mass += reduce_add(mass);
               });
             });
  return out;
}

void gradient(const DistillArgs& args, int64_t row, const DistillRow& stats, int64_t begin, int64_t end) {
  const RowFactors factors(args, stats);
  const float entropy_rate = static_cast<float>(args.term_scale * args.temperature) * args.entropy_weight;
  each_chunk(args, row, begin, end,
             [&](int64_t j, int count, int padded, const float* z, const float* t, const float* slope) {
               alignas(64) float grad[kChunk];
               with_form(args, stats, [&](auto form) {
                 chunk_gradient<decltype(form)>(args, factors, stats, z, t, padded, entropy_rate, grad);
               });
               finish_gradient(args, factors, row, j, count, z, slope, grad);
             });
}

// ---- rows of one vector ---------------------------------------------------------------------------------

// What sums, terms and the driver do to a row of at most 16 elements, without passes: the same operations on
// what stays in registers. 4096 x 10 takes a third of the time.
template <bool kClose>
double short_row_terms(const RowFactors& row, F16 z, F16 t, F16 of_student, F16 of_teacher, F16* grad) {
  const F16 gap = row.gap<kClose>(z, t), size = select_negative(gap, of_teacher, of_student);
  const F16 value = mul(size, select_negative(gap, row.per_teacher, negate(row.per_student)));
  const Comparison<F16> both = compare<false>(gap, row.per_gap);
  *grad = mul(mul(value, both.expm1), row.kl);
  return reduce_add(fma_where_positive(size, value, both.term, set1(0.0f)));
}

template <typename T>
inline F16 load_short(const Logits& logits, int64_t row, int count) {
  return fill_from(load_n(static_cast<const T*>(logits.data) + row * logits.stride, count), count,
                   minus_infinity());
}
inline F16 read_short(const Logits& logits, int64_t row, int count) {
  switch (logits.type) {
    case DType::kBFloat16: return load_short<BFloat16>(logits, row, count);
    case DType::kFloat16: return load_short<Float16>(logits, row, count);
    default: return load_short<float>(logits, row, count);
  }
}

double short_row(const DistillArgs& args, const Rates& rates, int64_t row) {
  const int count = static_cast<int>(args.vocab);
  const F16 z = read_short(args.student, row, count);
  const F16 t = args.has_teacher() ? read_short(args.teacher, row, count) : z;
  DistillRow stats{};
  stats.student_max = reduce_max(z);
  stats.teacher_max = args.has_teacher() ? reduce_max(t) : stats.student_max;
  const F16 x = sub(z, set1(stats.student_max)), e = exp_scaled(x, rates.of_student).value();
  stats.student_sum = reduce_add(e);
  stats.teacher_sum = 1.0;
  F16 of_teacher = set1(0.0f);
  if (args.has_teacher()) {
    of_teacher = exp_scaled(sub(t, set1(stats.teacher_max)), rates.of_teacher).value();
    stats.teacher_sum = reduce_add(of_teacher);
  }
  F16 plain = e;
  stats.plain_sum = stats.student_sum;
  if (args.has_ce() && args.temperature != 1.0f) {
    plain = exp_scaled(x, rates.of_plain).value();
    stats.plain_sum = reduce_add(plain);
  }
  complete(args, &stats);
  const double sum = stats.student_sum + stats.teacher_sum;
  const bool valid = sum == sum && stats.student_sum != 0.0 && stats.teacher_sum != 0.0;
  const RowFactors factors(args, rates, stats);
  F16 g = set1(0.0f);
  double loss = valid ? 0.0 : static_cast<double>(bits_to_float(0x7fc00000u));
  if (args.has_teacher()) {
    const double square = static_cast<double>(args.temperature) * args.temperature;
    const double divergence = stats.close ? short_row_terms<true>(factors, z, t, e, of_teacher, &g)
                                          : short_row_terms<false>(factors, z, t, e, of_teacher, &g);
    loss += args.kl_weight * divergence * args.term_scale * square;
  }
  alignas(64) float buffer[16];
  if (args.has_ce()) {
    store(buffer, z);
    const double smoothing = args.label_smoothing;
    double ce = stats.plain_log + stats.student_max * args.plain_rate() -
                (1.0 - smoothing) * buffer[args.labels[row]] * args.plain_rate();
    if (smoothing != 0.0) {
      ce -=
          smoothing * reduce_add(fill_from(z, count, 0.0f)) * args.plain_rate() / static_cast<double>(count);
    }
    loss += args.ce_scale * args.ce_weight * ce;
  }
  if (args.grad == nullptr) return loss;
  if (args.has_ce()) {
    const float ce = static_cast<float>(args.ce_scale) * args.ce_weight;
    const F16 smooth = set1(ce * args.label_smoothing / static_cast<float>(args.vocab));
    g = sub(fma(mul(plain, factors.per_plain), set1(ce), g), smooth);
    store(buffer, g);
    buffer[args.labels[row]] -= ce * (1.0f - args.label_smoothing);
    g = load(buffer);
  }
  if (args.student.scale != 1.0f) g = mul(g, set1(args.student.scale));
  const int64_t at = row * args.grad_stride;
  switch (args.grad_type) {
    case DType::kFloat32: store_n(static_cast<float*>(args.grad) + at, g, count); break;
    case DType::kBFloat16: store_n(static_cast<BFloat16*>(args.grad) + at, g, count); break;
    case DType::kFloat16: store_n(static_cast<Float16*>(args.grad) + at, g, count); break;
  }
  return loss;
}

void short_rows(const DistillArgs& args, int64_t begin, int64_t end) {
  const Rates rates(args);
  for (int64_t row = begin; row < end; ++row) {
    if (!args.ignored(row)) args.row_loss[row] = short_row(args, rates, row);
  }
}

void exps(const float* x, int64_t count, double rate, float* result) {
  const Rate of_x(rate);
  for (int64_t i = 0; i < count; i += 16) {
    const int n = count - i < 16 ? static_cast<int>(count - i) : 16;
    store_n(result + i, exp_scaled(load_n(x + i, n), of_x).value(), n);
  }
}

const DistillKernel kKernel = {sums, terms, residue, gradient, short_rows, exps};
