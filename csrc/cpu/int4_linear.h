// int4 linear on the CPU: y = act(x · Wᵀ + b), weights in 4 bits, whole call from float input to float
// output. The numbers are those of python/lissom/reference/int4_linear.py, bit for bit (weight-only: but for
// the order of the sum).
#pragma once

#include <cstdint>

#include "linear.h"

namespace lissom {

struct Int4LinearArgs : LinearArgs {  // rotated: not with weight_only
  const uint8_t* packed;              // panels, see formats.h
  Int4Layout layout;                  // of k, as in LinearArgs
  bool weight_only;
};

// Three kernels per ISA: [0] nibbles, [1] codebook, [2] weight-only.
const LinearKernel* int4_linear_scalar();
const LinearKernel* int4_linear_avx2();
const LinearKernel* int4_linear_avx512vnni();

// Computes with the selected ISA on up to `threads` threads. Throws std::invalid_argument on bad sizes.
void int4_linear(const Int4LinearArgs& args, int threads);

}  // namespace lissom
