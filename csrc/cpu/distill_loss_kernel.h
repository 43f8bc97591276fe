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

constexpr int kChunk = 1024;

// e^x for x in [kLowest, 0], 0 where it would be denormal. Relative error below 1.5 ulp (tested); source: as
// exp in activation.h.
constexpr float kLowest = -200.0f;
inline F16 exp_negative(F16 x) {
  const F16 n = round(mul(x, set1(static_cast<float>(1.4426950408889634))));
  F16 r = fma(n, set1(-0.693145751953125f), x);
  r = fma(n, set1(static_cast<float>(-1.428606765330187e-06)), r);
  F16 p = set1(static_cast<float>(1.0 / 5040));
  p = fma(p, r, set1(static_cast<float>(1.0 / 720)));
  p = fma(p, r, set1(static_cast<float>(1.0 / 120)));
  p = fma(p, r, set1(static_cast<float>(1.0 / 24)));
  p = fma(p, r, set1(static_cast<float>(1.0 / 6)));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale_exponent(p, n);
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
  const F16 e = exp_negative(max(set1(kLowest), mul(size, set1(-2.0f))));
  const F16 large = div(sub(set1(1.0f), e), add(set1(1.0f), e));
  const F16 signed_large = select_negative(x, negate(large), large);
  return select_negative(sub(size, set1(0.625f)), small, signed_large);
}

// x, infinities as huge numbers; NaN stays.
inline F16 finite(F16 x) { return max(set1(-1e30f), min(set1(1e30f), x)); }

// A factor in two floats.
struct Factor {
  explicit Factor(double value)
      : high(set1(static_cast<float>(value))),
        low(set1(static_cast<float>(value - static_cast<double>(static_cast<float>(value))))),
        lowest(set1(value > 1e-30 ? kLowest / static_cast<float>(value) : kLowest)) {}
  // For x <= 0 and a positive factor, at least about kLowest; NaN stays (operand order: NaN in x wins).
  F16 times(F16 x) const {
    x = max(lowest, x);
    return fma(x, high, mul(x, low));
  }
  F16 high, low, lowest;
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
// e^d - 1 - d: what p log(p / q) + q - p is, over p.
inline F16 reverse_series(F16 d) {
  F16 p = set1(static_cast<float>(1.0 / 40320));
  p = fma(p, d, set1(static_cast<float>(1.0 / 5040)));
  p = fma(p, d, set1(static_cast<float>(1.0 / 720)));
  p = fma(p, d, set1(static_cast<float>(1.0 / 120)));
  p = fma(p, d, set1(static_cast<float>(1.0 / 24)));
  p = fma(p, d, set1(static_cast<float>(1.0 / 6)));
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
void convert(const T* from, int count, float scale, float softcap, float* to, float* slope) {
  const F16 cap = set1(softcap), factor = set1(scale);
  const Factor per_cap(softcap != 0.0f ? static_cast<double>(scale) / softcap : 0.0);
  for (int i = 0; i < count; i += 16) {
    F16 z = count - i < 16 ? load_n(from + i, count - i) : load(from + i);
    if (softcap != 0.0f) {
      const F16 u = fma(z, per_cap.high, mul(finite(z), per_cap.low));
      const F16 t = tanh(u);
      z = mul(cap, t);
      if (slope) {  // 1 - tanh^2 = 4 e / (1 + e)^2, in which nothing cancels but more is rounded
        const F16 e = exp_negative(max(set1(kLowest), mul(abs(u), set1(-2.0f))));
        const F16 sum = add(set1(1.0f), e), large = div(mul(set1(4.0f), e), mul(sum, sum));
        const F16 small = fma(negate(t), t, set1(1.0f));
        store(slope + i, mul(factor, select_negative(sub(abs(u), set1(1.25f)), small, large)));
      }
    } else if (scale < 0.0f) {
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
      convert(from, count, logits.scale, softcap, buffer, slope);
      break;
    }
    case DType::kBFloat16:
      convert(static_cast<const BFloat16*>(logits.data) + at, count, logits.scale, softcap, buffer, slope);
      break;
    case DType::kFloat16:
      convert(static_cast<const Float16*>(logits.data) + at, count, logits.scale, softcap, buffer, slope);
      break;
  }
  return buffer;
}

inline float chunk_max(const float* z, int count) {
  F16 m0 = load(z), m1 = m0;
  int i = 16;
  for (; i + 32 <= count; i += 32) {
    m0 = max(m0, load(z + i));
    m1 = max(m1, load(z + i + 16));
  }
  for (; i < count; i += 16) m0 = max(m0, load(z + i));
  return reduce_max(max(m0, m1));
}

// sum of exp((z - largest) * rate); 0, or NaN where there is one, if nothing was larger than -infinity so
// far.
inline float chunk_exp(const float* z, int count, float largest, const Factor& rate) {
  if (largest == minus_infinity()) {
    F16 sum = set1(0.0f);
    for (int i = 0; i < count; i += 16) sum = add(sum, mul(max(set1(-1.0f), load(z + i)), set1(0.0f)));
    return reduce_add(sum);
  }
  const F16 m = set1(largest);
  F16 s0 = set1(0.0f), s1 = s0;
  int i = 0;
  for (; i + 32 <= count; i += 32) {
    s0 = add(s0, exp_negative(rate.times(sub(load(z + i), m))));
    s1 = add(s1, exp_negative(rate.times(sub(load(z + i + 16), m))));
  }
  if (i < count) s0 = add(s0, exp_negative(rate.times(sub(load(z + i), m))));
  return reduce_add(add(s0, s1));
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
  const Factor of_student(student_rate), of_teacher(teacher_rate), of_plain(plain_rate);
  const bool plain = args.has_ce() && args.temperature != 1.0f;
  const bool smooth = args.has_ce() && args.label_smoothing != 0.0f;
  alignas(64) float buffer[kChunk];
  for (int64_t j = begin; j < end; j += kChunk) {
    const int count = end - j < kChunk ? static_cast<int>(end - j) : kChunk;
    const int padded = (count + 15) / 16 * 16;
    const float* z = read(args.student, args.softcap, row, j, count, buffer, nullptr);
    raise(&out.student_max, chunk_max(z, padded), student_rate, &out.student, plain_rate,
          plain ? &out.plain : nullptr);
    out.student += chunk_exp(z, padded, out.student_max, of_student);
    if (plain) out.plain += chunk_exp(z, padded, out.student_max, of_plain);
    if (smooth) {
      F16 total = set1(0.0f);
      for (int i = 0; i < count; i += 16) total = add(total, load_n(z + i, count - i < 16 ? count - i : 16));
      out.z += reduce_add(total);
    }
    if (args.has_teacher()) {
      const float* t = read(args.teacher, args.softcap, row, j, count, buffer, nullptr);
      raise(&out.teacher_max, chunk_max(t, padded), teacher_rate, &out.teacher, 0.0, nullptr);
      out.teacher += chunk_exp(t, padded, out.teacher_max, of_teacher);
    }
  }
  return out;
}

// ---- terms and gradient ---------------------------------------------------------------------------------

// What a row's chunks have in common.
struct RowFactors {
  RowFactors(const DistillArgs& args, const DistillRow& stats)
      : student_rate(args.student_rate()),
        teacher_rate(args.teacher_rate()),
        plain_rate(args.plain_rate()),
        shift(stats.shift),
        student_max(set1(stats.student_max)),
        teacher_max(set1(stats.teacher_max)),
        per_student(set1(static_cast<float>(1.0 / stats.student_sum))),
        per_teacher(set1(static_cast<float>(1.0 / stats.teacher_sum))),
        per_plain(set1(static_cast<float>(1.0 / stats.plain_sum))),
        student_log(set1(static_cast<float>(stats.student_log))) {}

  F16 exponent(F16 z) const { return student_rate.times(sub(z, student_max)); }
  F16 student(F16 z) const { return mul(exp_negative(exponent(z)), per_student); }
  F16 teacher(F16 t) const { return mul(exp_negative(teacher_rate.times(sub(t, teacher_max))), per_teacher); }
  // log q - log p
  template <bool kClose>
  F16 log_ratio(F16 z, F16 t) const {
    return log_ratio<kClose>(z, t, shift);
  }
  // … with another shift: plus a constant, before anything is rounded.
  template <bool kClose>
  F16 log_ratio(F16 z, F16 t, const Factor& shift) const {
    if (kClose) {
      const F16 u = sub(t, z);
      return add(fma(u, student_rate.high, shift.high), fma(finite(u), student_rate.low, shift.low));
    }
    t = sub(t, teacher_max);
    z = negate(sub(z, student_max));
    const F16 low = fma(finite(t), teacher_rate.low, fma(finite(z), student_rate.low, shift.low));
    return add(fma(z, student_rate.high, fma(t, teacher_rate.high, shift.high)), low);
  }

  Factor student_rate, teacher_rate, plain_rate, shift;
  F16 student_max, teacher_max, per_student, per_teacher, per_plain, student_log;
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

// Loss terms of a chunk, and its gradient with respect to z where it needs no second pass.
template <typename F, bool kEntropy, bool kGrad>
void chunk_terms(const DistillArgs& args, const RowFactors& row, const float* z, const float* t, int count,
                 float kl_rate, DistillTerms* out, float* grad) {
  const F16 beta = set1(args.js_beta), rest = set1(1.0f - args.js_beta), kl = set1(kl_rate);
  F16 divergence = set1(0.0f), student_divergence = divergence, entropy = divergence;
  for (int i = 0; i < count; i += 16) {
    const F16 a = row.exponent(load(z + i));
    const F16 p = mul(exp_negative(a), row.per_student);
    if (F::kTeacher) {
      const F16 q = row.teacher(load(t + i));
      const F16 d = row.log_ratio<F::kClose>(load(z + i), load(t + i));
      if (F::kDivergence == Divergence::kForward) {
        const F16 term = add(where_positive(q, mul(q, d)), sub(p, q));
        divergence = add(divergence, where_close(d, mul(p, forward_series(d)), term));
        if (kGrad) {
          const F16 difference = where_close(d, negate(mul(p, expm1_series(d))), sub(p, q));
          store(grad + i, mul(difference, kl));
        }
      } else if (F::kDivergence == Divergence::kReverse) {
        const F16 term = add(where_positive(p, mul(p, negate(d))), sub(q, p));
        divergence = add(divergence, where_close(d, mul(p, reverse_series(d)), term));
      } else {
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
    }
    if (kEntropy) entropy = add(entropy, where_positive(p, mul(p, sub(row.student_log, a))));
  }
  if (F::kTeacher) out->divergence += reduce_add(divergence);
  if (F::kTeacher && F::kDivergence == Divergence::kJs)
    out->student_divergence += reduce_add(student_divergence);
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
void chunk_gradient(const DistillArgs& args, const RowFactors& row, const DistillRow& stats, const float* z,
                    const float* t, int count, float kl_rate, float entropy_rate, float* grad) {
  const F16 rest = set1(1.0f - args.js_beta);
  const F16 kl = set1(kl_rate), of_entropy = set1(entropy_rate);
  const Factor shift(stats.shift + stats.divergence);  // reverse KL: the mean of log p - log q
  const Factor student_mean(stats.student_divergence);
  const F16 above = set1(static_cast<float>(stats.entropy - stats.student_log));
  for (int i = 0; i < count; i += 16) {
    const F16 a = row.exponent(load(z + i));
    const F16 p = mul(exp_negative(a), row.per_student);
    F16 g = set1(0.0f);
    if (F::kTeacher) {
      const F16 q = row.teacher(load(t + i));
      const F16 d = row.log_ratio<F::kClose>(load(z + i), load(t + i));
      if (F::kDivergence == Divergence::kForward) {
        g = mul(where_close(d, negate(mul(p, expm1_series(d))), sub(p, q)), kl);
      } else if (F::kDivergence == Divergence::kReverse) {
        const F16 above_mean = row.log_ratio<F::kClose>(load(z + i), load(t + i), shift);
        g = mul(where_positive(p, mul(p, negate(above_mean))), kl);
      } else {
        g = mul(mul(rest, js_deviation(args, p, q, d, student_mean)), kl);
      }
    }
    // dH / da = -p (log p + H)
    g = fma(where_positive(p, mul(p, negate(add(a, above)))), of_entropy, g);
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
      const F16 a = factors.plain_rate.times(sub(load(z + i), factors.student_max));
      store(grad + i, sub(fma(mul(exp_negative(a), factors.per_plain), weight, load(grad + i)), smooth));
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
  for (int64_t j = begin; j < end; j += kChunk) {
    const int count = end - j < kChunk ? static_cast<int>(end - j) : kChunk;
    const float* z = read(args.student, args.softcap, row, j, count, students, slope);
    const float* t =
        args.has_teacher() ? read(args.teacher, args.softcap, row, j, count, teachers, nullptr) : nullptr;
    body(j, count, (count + 15) / 16 * 16, z, t, slope);
  }
}

template <bool kGrad>
void terms_of(const DistillArgs& args, const RowFactors& factors, const DistillRow& stats, const float* z,
              const float* t, int count, float kl_rate, DistillTerms* out, float* grad) {
  with_form(args, stats, [&](auto form) {
    using F = decltype(form);
    if (args.entropy_weight != 0.0f) {
      chunk_terms<F, true, false>(args, factors, z, t, count, kl_rate, out, grad);
    } else {
      chunk_terms<F, false, kGrad>(args, factors, z, t, count, kl_rate, out, grad);
    }
  });
}

DistillTerms terms(const DistillArgs& args, int64_t row, const DistillRow& stats, int64_t begin,
                   int64_t end) {
  DistillTerms out{0.0, 0.0, 0.0};
  const RowFactors factors(args, stats);
  const bool write = args.grad != nullptr && !args.second_pass();
  const float kl_rate = static_cast<float>(args.term_scale * args.temperature) * args.kl_weight;
  each_chunk(args, row, begin, end,
             [&](int64_t j, int count, int padded, const float* z, const float* t, const float* slope) {
               alignas(64) float grad[kChunk];
               if (!write) {
                 if (args.has_teacher() || args.entropy_weight != 0.0f) {
                   terms_of<false>(args, factors, stats, z, t, padded, kl_rate, &out, grad);
                 }
                 return;
               }
               if (args.has_teacher()) {
                 terms_of<true>(args, factors, stats, z, t, padded, kl_rate, &out, grad);
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
                     const F16 d = factors.log_ratio<F::kClose>(load(z + i), load(t + i), shift);
                     sum = add(sum, where_positive(p, mul(p, negate(d))));
                   } else {
                     const F16 d = factors.log_ratio<F::kClose>(load(z + i), load(t + i));
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
  const float kl_rate = static_cast<float>(args.term_scale * args.temperature) * args.kl_weight;
  const float entropy_rate = static_cast<float>(args.term_scale * args.temperature) * args.entropy_weight;
  each_chunk(args, row, begin, end,
             [&](int64_t j, int count, int padded, const float* z, const float* t, const float* slope) {
               alignas(64) float grad[kChunk];
               with_form(args, stats, [&](auto form) {
                 chunk_gradient<decltype(form)>(args, factors, stats, z, t, padded, kl_rate, entropy_rate,
                                                grad);
               });
               finish_gradient(args, factors, row, j, count, z, slope, grad);
             });
}

// ---- rows of one vector ---------------------------------------------------------------------------------

// What sums, terms and the driver do to a row of at most 16 elements, without passes: the same operations on
// what stays in registers. 4096 x 10 takes a third of the time.
template <bool kTeacher, bool kClose>
double short_row_terms(const DistillArgs& args, const RowFactors& row, F16 z, F16 t, F16 p, F16 q,
                       F16* grad) {
  if (!kTeacher) return 0.0;
  const F16 d = row.log_ratio<kClose>(z, t);
  const F16 term = add(where_positive(q, mul(q, d)), sub(p, q));
  const float kl_rate = static_cast<float>(args.term_scale * args.temperature) * args.kl_weight;
  *grad = mul(where_close(d, negate(mul(p, expm1_series(d))), sub(p, q)), set1(kl_rate));
  return reduce_add(where_close(d, mul(p, forward_series(d)), term));
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

double short_row(const DistillArgs& args, int64_t row) {
  const int count = static_cast<int>(args.vocab);
  const F16 z = read_short(args.student, row, count);
  const F16 t = args.has_teacher() ? read_short(args.teacher, row, count) : z;
  DistillRow stats{};
  stats.student_max = reduce_max(z);
  stats.teacher_max = args.has_teacher() ? reduce_max(t) : stats.student_max;
  const Factor of_student(args.student_rate());
  const F16 x = sub(z, set1(stats.student_max)), e = exp_negative(of_student.times(x));
  stats.student_sum = reduce_add(e);
  stats.teacher_sum = 1.0;
  F16 of_teacher = set1(0.0f);
  if (args.has_teacher()) {
    of_teacher = exp_negative(Factor(args.teacher_rate()).times(sub(t, set1(stats.teacher_max))));
    stats.teacher_sum = reduce_add(of_teacher);
  }
  F16 plain = e;
  stats.plain_sum = stats.student_sum;
  if (args.has_ce() && args.temperature != 1.0f) {
    plain = exp_negative(Factor(args.plain_rate()).times(x));
    stats.plain_sum = reduce_add(plain);
  }
  complete(args, &stats);
  const double sum = stats.student_sum + stats.teacher_sum;
  const bool valid = sum == sum && stats.student_sum != 0.0 && stats.teacher_sum != 0.0;
  const RowFactors factors(args, stats);
  const F16 p = mul(e, factors.per_student), q = mul(of_teacher, factors.per_teacher);
  F16 g = set1(0.0f);
  double loss = valid ? 0.0 : static_cast<double>(bits_to_float(0x7fc00000u));
  if (args.has_teacher()) {
    const double square = static_cast<double>(args.temperature) * args.temperature;
    const double divergence = stats.close ? short_row_terms<true, true>(args, factors, z, t, p, q, &g)
                                          : short_row_terms<true, false>(args, factors, z, t, p, q, &g);
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

const DistillKernel kKernel = {sums, terms, residue, gradient, short_row};
