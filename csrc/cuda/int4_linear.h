// Linear with 4-bit weights on the GPU (the contract is python/lissom/reference/int4_linear.py).
#pragma once

#include <cstdint>

#include "../common/formats.h"
#include "launch.h"

namespace lissom::cuda {

// Zero-points; of integers they can be taken off the codes.
enum class Int4Zeros : int { kNone = 0, kInteger = 1, kFloat = 2 };

struct Int4Linear {
  const void* x;     // [m, k] of x_type; columns are neighbours, in the order of their groups
  DType x_type;      // of y too; weight-only float32 is not served
  int64_t x_stride;  // of rows, in elements
  int64_t m, n;
  Int4Fragments layout;  // of `packed`; says k
  Int4Zeros zeros;
  const uint8_t* packed;
  const void* bias;  // [n] of bias_type, or null
  DType bias_type;
  bool weight_only, rotated;
  Activation activation;
  int8_t* q;         // [m, q_stride] for x as int8, on a multiple of 16; not used if weight_only
  int64_t q_stride;  // multiple of 16
  float* x_scale;    // [m], likewise
  float* partial;    // workspace().floats
  int* counters;     // workspace().counters zeros, which the launch leaves zero
  void* y;           // [m, n] of x_type
};

struct Int4Workspace {
  int64_t floats, counters;  // both 0 where K is whole
};

// What a launch with these sizes and types on the current device needs; pointers are not read.
Int4Workspace int4_linear_workspace(const Int4Linear& args);

// y = act(x · Wᵀ + bias).
void int4_linear(const Int4Linear& args, Stream stream);

}  // namespace lissom::cuda
