// int8 linear on the CPU: y = act(x · Wᵀ + b), whole call from float input to float output.
// The numbers are those of python/lissom/reference/int8_linear.py, bit for bit.
#pragma once

#include <cstdint>

#include "linear.h"

namespace lissom {

struct Int8LinearArgs : LinearArgs {  // rotated: not with kWeightOnly
  const int8_t* packed;               // see formats.h
  const float* weight_scale;          // [n]
  InputMode mode;
  float input_scale;  // kStatic only
};

// Two kernels per ISA: [0] quantized activations, [1] weight-only.
const LinearKernel* int8_linear_scalar();
const LinearKernel* int8_linear_avx2();
const LinearKernel* int8_linear_avx512vnni();

// Computes with the selected ISA on up to `threads` threads. Throws std::invalid_argument on bad sizes.
void int8_linear(const Int8LinearArgs& args, int threads);

// Canonical int8 [n, k] to the packed layout.
void int8_pack(const int8_t* qweight, int64_t n, int64_t k, int8_t* packed);

}  // namespace lissom
