// What the losses are made of, an element at a time: exponentials, the series that take over where
// probabilities nearly agree, and the terms of each divergence.
//
// Exponents are base 2: x = fma(z, rate, -base), rounded once, where rate = log2(e) / T times what scales the
// logits. ex2.approx is within 2^-22 of the result, which is too coarse for p - q where p and q nearly agree
// (a student near its teacher is what training leads to). With d = ln p - ln q, also a difference of
// exponents,
//
//   |d| < 1/2     p - q = q d (1 + d/2 + …), a polynomial: the error of q's exponential is a factor
//   elsewhere     p - q as it is: off by 4.8e-7 of the larger one, where p - q is at least 0.39 of that
//
// and the divergence's term q ln(q / p) = -q d is given p - q in addition, which sums to zero over the row:
// what is left is of second order in d, as the loss is, and d's own error is of first order in both and
// cancels.
#pragma once

#include "device.cuh"

namespace lissom::cuda {

constexpr float kLn2 = 0.69314718f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

// 2^x for x <= 0, off by little more than its rounding: for what a row has few of, where ex2 is too coarse.
__device__ __forceinline__ float exp2_precise(float x) {
  const float y = fmaxf(x, -126.0f), n = rintf(y), f = y - n;
  float p = 1.5403512e-4f;
  p = fmaf(p, f, 1.3390736e-3f);
  p = fmaf(p, f, 9.6182376e-3f);
  p = fmaf(p, f, 5.5503573e-2f);
  p = fmaf(p, f, 0.24022649f);
  p = fmaf(p, f, 0.69314718f);
  p = fmaf(p, f, 1.0f);
  return p * __int_as_float((__float2int_rn(n) + 127) << 23);
}

// (e^d - 1) / d for |d| <= 1/2; minimax, relative error 1.8e-7 with float32's roundings.
__device__ __forceinline__ float expm1_over(float d) {
  float p = 1.38888194e-3f;
  p = fmaf(p, d, 8.40768311e-3f);
  p = fmaf(p, d, 4.16687019e-2f);
  p = fmaf(p, d, 0.166659743f);
  p = fmaf(p, d, 0.499999821f);
  return fmaf(p, d, 1.00000012f);
}

// e^d - 1 - d for |d| <= 1; relative error below 2e-7. Minimax.
__device__ __forceinline__ float second_order(float d) {
  float p = 2.4960824e-5f;
  p = fmaf(p, d, 2.0325484e-4f);
  p = fmaf(p, d, 1.3891335e-3f);
  p = fmaf(p, d, 8.3309300e-3f);
  p = fmaf(p, d, 4.1666515e-2f);
  p = fmaf(p, d, 0.16666695f);
  p = fmaf(p, d, 0.5f);
  return (d * d) * p;
}

// Source: Cephes, tanhf.
__device__ __forceinline__ float tanh_approx(float x) {
  const float size = fabsf(x), z = x * x;
  float p = -5.70498872745e-3f;
  p = fmaf(p, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float small = fmaf(p * z, x, x);
  const float e = exp2_approx(size * -2.8853900817779268f);
  const float large = __fdiv_rn(1.0f - e, 1.0f + e);
  return size < 0.625f ? small : x < 0.0f ? -large : large;
}

// 1 - t^2 for t = tanh(x): 4 e / (1 + e)^2, in which nothing cancels, where that would.
__device__ __forceinline__ float tanh_slope(float x, float t) {
  const float e = exp2_approx(fabsf(x) * -2.8853900817779268f);
  const float large = __fdiv_rn(4.0f * e, (1.0f + e) * (1.0f + e));
  return fabsf(x) < 1.25f ? fmaf(-t, t, 1.0f) : large;
}

// (ln(1 + r) - r + r^2 / 2) / r^3. Source: Cephes, logf.
__device__ __forceinline__ float log_series(float r) {
  float p = 7.0376836292e-2f;
  p = fmaf(p, r, -1.1514610310e-1f);
  p = fmaf(p, r, 1.1676998740e-1f);
  p = fmaf(p, r, -1.2420140846e-1f);
  p = fmaf(p, r, 1.4249322787e-1f);
  p = fmaf(p, r, -1.6668057665e-1f);
  p = fmaf(p, r, 2.0000714765e-1f);
  p = fmaf(p, r, -2.4999993993e-1f);
  return fmaf(p, r, 3.3333331174e-1f);
}

// ln x for positive normal x. Source: Cephes, logf; the GPU's logarithm is off by 1.7e-7 near 1.
__device__ __forceinline__ float log_precise(float x) {
  const int bits = __float_as_int(x);
  float mantissa = __int_as_float((bits & 0x7fffff) | 0x3f000000);
  float exponent = static_cast<float>((bits >> 23) - 126);
  const bool low = mantissa < 0.70710678f;
  exponent = low ? exponent - 1.0f : exponent;
  const float r = (low ? mantissa + mantissa : mantissa) - 1.0f, z = r * r;
  float y = (r * z) * log_series(r);
  y = fmaf(exponent, -2.12194440e-4f, y);
  y = fmaf(-0.5f, z, y);
  return fmaf(exponent, 0.693359375f, r + y);
}

// y - ln(1 + y) for y in [-0.29, 0.41].
__device__ __forceinline__ float log1p_rest(float y) {
  const float z = y * y;
  return fmaf(0.5f, z, -((y * z) * log_series(y)));
}

// ---- forward and reverse KL -----------------------------------------------------------------------------

struct Comparison {
  float difference, linear;  // p - q, q d
};

// The term of KL(q || p) is difference - linear; that of KL(p || q) comes from p and q exchanged and -d.
// Where q is 0 so is linear, whatever is here: a logit of -inf is masked, and d then infinite or NaN.
__device__ __forceinline__ Comparison compare(float p, float q, float d) {
  const float linear = q * d, near = linear * expm1_over(d);
  return {fabsf(d) < 0.5f ? near : p - q, linear};
}

// The same for a gradient of 16 bits, whose own rounding (2^-12, 2^-9) hides more; of q without its factor
// `lift`, which is within 2^-20 of 1. p - q is off by 2^-21 of p: from |d| = 2^-8 on that is 2^-13 of it.
// Below, q d (1 + d/2) is within 2^-18. linear is short of the lift.
__device__ __forceinline__ Comparison compare_coarse(float p, float q, float d, float lift) {
  const float linear = q * d, near = linear * fmaf(d, 0.5f, 1.0f);
  return {fabsf(d) < 0x1p-8f ? near : fmaf(-q, lift, p), linear};
}

// ---- generalized Jensen-Shannon -------------------------------------------------------------------------

// ln(m / p); finite for p = 0.
__device__ __forceinline__ float log_mixture(float p, float mixture) {
  return log_precise(__fdiv_rn(mixture, fmaxf(p, 1.2e-38f)));
}

struct JsTerms {
  float student, teacher;  // p ln(p / m) + m - p, q ln(q / m) + m - q
};

// d = ln q - ln p
__device__ __forceinline__ JsTerms js_terms(float p, float q, float d, float beta) {
  const float mixture = beta * q + (1.0f - beta) * p;
  const float far_student = (mixture - p) - (p > 0.0f ? p * log_mixture(p, mixture) : 0.0f);
  const float far_teacher = (mixture - q) - (q > 0.0f ? q * log_mixture(q, mixture) : 0.0f);
  // Near: m = p (1 + y), q = p (1 + e); e^d d - e is the second-order part of -d, times e^d.
  const bool near = fabsf(d) < 0.3f;
  d = near ? d : 0.0f;
  const float e = d + second_order(d), y = beta * e, rest = log1p_rest(y);
  const float near_teacher = (1.0f + e) * rest - e * y + (1.0f + e) * second_order(-d);
  return {near ? p * rest : far_student, near ? p * near_teacher : far_teacher};
}

// p (ln(p / m) - mean)
__device__ __forceinline__ float js_deviation(float p, float q, float d, float beta, float mean_high,
                                              float mean_low) {
  const bool near = fabsf(d) < 0.3f;
  const float close = near ? d : 0.0f;
  const float y = beta * (close + second_order(close));
  const float of_p = near ? y - log1p_rest(y) : log_mixture(p, beta * q + (1.0f - beta) * p);
  return p > 0.0f ? p * ((-of_p - mean_high) - mean_low) : 0.0f;
}

// ---- once a row: float64 --------------------------------------------------------------------------------

// A step of Newton's from float32's: relative error below 1e-13, in a third of the instructions of a
// division.
__device__ __forceinline__ double reciprocal(double x) {
  const double r = static_cast<double>(__frcp_rn(static_cast<float>(x)));
  return r * (2.0 - x * r);
}

// Of a normal positive number, within 1e-10: what a row's sums need of it, in a quarter of the instructions.
__device__ __forceinline__ double log2_of_sum(double x) {
  const int64_t bits = __double_as_longlong(x);
  const double exponent = static_cast<double>(static_cast<int>(bits >> 52) - 1023);
  const double mantissa = __longlong_as_double((bits & 0x000fffffffffffffll) | 0x3ff0000000000000ll);
  // About the root of 2: log2 m = 1/2 + 2 artanh(s) / ln 2, |s| < 0.172
  const double s = (mantissa - 1.4142135623730951) * reciprocal(mantissa + 1.4142135623730951);
  const double z = s * s;
  double p = 0.262308189253 * z + 0.320598897975;
  p = p * z + 0.412198583111;
  p = p * z + 0.577078016356;
  p = p * z + 0.961796693926;
  p = p * z + 2.885390081778;
  return p * s + (exponent + 0.5);
}

}  // namespace lissom::cuda
