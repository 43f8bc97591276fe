// Fused activation functions. The sequence of operations is the contract (csrc/cpu/activation.h and
// python/lissom/reference/numerics.py repeat it, so bits agree); sources and error bounds are given there.
#pragma once

#include "device.cuh"

namespace lissom::cuda {

// Not expf: the same bits everywhere.
__device__ __forceinline__ float exp_same(float x) {
  x = x < -87.0f ? -87.0f : x;  // NaN stays
  x = x > 88.0f ? 88.0f : x;
  const float n = rintf(__fmul_rn(x, static_cast<float>(1.4426950408889634)));
  float r = __fmaf_rn(n, -0.693145751953125f, x);
  r = __fmaf_rn(n, static_cast<float>(-1.428606765330187e-06), r);
  float p = static_cast<float>(1.0 / 5040);
  p = __fmaf_rn(p, r, static_cast<float>(1.0 / 720));
  p = __fmaf_rn(p, r, static_cast<float>(1.0 / 120));
  p = __fmaf_rn(p, r, static_cast<float>(1.0 / 24));
  p = __fmaf_rn(p, r, static_cast<float>(1.0 / 6));
  p = __fmaf_rn(p, r, 0.5f);
  p = __fmaf_rn(p, r, 1.0f);
  p = __fmaf_rn(p, r, 1.0f);
  return __fmul_rn(p, __int_as_float((__float2int_rn(n) + 127) << 23));
}

// x * sigmoid(u)
__device__ __forceinline__ float sigmoid_times(float x, float u) {
  return __fdiv_rn(x, __fadd_rn(1.0f, exp_same(-u)));
}

__device__ __forceinline__ float gelu(float x) {
  const float z = __fmul_rn(fabsf(x), static_cast<float>(0.7071067811865476));
  const float t = __fdiv_rn(1.0f, __fmaf_rn(0.5f, z, 1.0f));
  float p = static_cast<float>(0.17087277);
  p = __fmaf_rn(p, t, static_cast<float>(-0.82215223));
  p = __fmaf_rn(p, t, static_cast<float>(1.48851587));
  p = __fmaf_rn(p, t, static_cast<float>(-1.13520398));
  p = __fmaf_rn(p, t, static_cast<float>(0.27886807));
  p = __fmaf_rn(p, t, static_cast<float>(-0.18628806));
  p = __fmaf_rn(p, t, static_cast<float>(0.09678418));
  p = __fmaf_rn(p, t, static_cast<float>(0.37409196));
  p = __fmaf_rn(p, t, static_cast<float>(1.00002368));
  p = __fmaf_rn(p, t, static_cast<float>(-1.26551223));
  const float half_erfc = __fmul_rn(__fmul_rn(t, exp_same(__fmaf_rn(-z, z, p))), 0.5f);
  return __fmul_rn(x, x < 0.0f ? half_erfc : __fsub_rn(1.0f, half_erfc));
}

__device__ __forceinline__ float gelu_tanh(float x) {
  const float inner = __fmaf_rn(__fmul_rn(__fmul_rn(x, x), static_cast<float>(0.044715)), x, x);
  return sigmoid_times(x, __fmul_rn(inner, static_cast<float>(1.5957691216057308)));
}

// By an argument that is the same for the whole grid: a branch costs an epilogue nothing, a template
// parameter would cost five times the code.
__device__ __forceinline__ float activate(Activation function, float x) {
  switch (function) {
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;  // NaN stays
    case Activation::kGelu: return gelu(x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kSilu: return sigmoid_times(x, x);
    default: return x;
  }
}

}  // namespace lissom::cuda
