// Rows of activations to int8, as every op with int8 activations does it first (the contract is
// python/lissom/reference/int8_linear.py, quantize_rows, and formats.py, rotate).
#pragma once

#include <cstdint>

#include "../common/formats.h"
#include "launch.h"

namespace lissom::cuda {

struct QuantizeRows {
  const void* x;  // [m, k] of x_type
  DType x_type;
  int64_t x_stride;  // of rows, in elements; columns are neighbours
  int64_t m, k;
  const float* input_scale;  // the static scale, on the device; null: each row's own
  bool rotated;              // blocks of 16 are multiplied by H/16 first
  int8_t* q;                 // [m, q_stride] on a multiple of 16; columns past k become 0
  int64_t q_stride;          // multiple of 16
  float* scale;              // [m]; NaN where a row has NaN or infinity
  int* counters =
      nullptr;  // [counter_count] become 0, which spares whoever counts next a launch; where m > 0
  int64_t counter_count = 0;
};

void quantize_rows(const QuantizeRows& args, Stream stream);

}  // namespace lissom::cuda
