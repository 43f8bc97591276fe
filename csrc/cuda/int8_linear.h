// int8 linear on the GPU: y = act(x · Wᵀ + b). The numbers are python/lissom/reference/int8_linear.py's: the
// same bits where x is quantized, float32 sums where it is not (weight-only).
#pragma once

#include <cstdint>

#include "../common/formats.h"
#include "launch.h"

namespace lissom::cuda {

// How a call is computed; int8_linear.cu chooses, tests may name one.
enum class Int8Form : int {
  kChoose = -1,
  kRows = 0,         // up to 16 rows, of which each block quantizes what it needs: one launch
  kTile64 = 1,       // tiles of the output on mma.sync, 64 x 64 …
  kTile128 = 2,      // 128 x 128
  kTile256 = 3,      // 128 x 256
  kHopper = 4,       // 128 x 256 on wgmma, fed by TMA
  kFloatRows = 5,    // float32 weight-only: up to 16 rows …
  kFloatTile64 = 6,  // any number
};

struct Int8Linear {
  const void* x;  // [m, k] of x_type
  DType x_type;
  int64_t x_stride;  // of rows, in elements; columns are neighbours
  int64_t m, k;
  const int8_t* weight;   // [n, k], canonical
  int64_t weight_stride;  // of rows; columns are neighbours
  int64_t n;
  const float* weight_scale;  // [n]
  const void* bias;           // [n] of bias_type, or null
  DType bias_type;
  InputMode mode;
  const float* input_scale;  // the static scale, on the device; null otherwise
  bool rotated;
  Activation activation;
  void* y;          // [m, n] of x_type
  void* workspace;  // as many bytes as int8_linear_workspace says, on a multiple of 16

  Int8Form form = Int8Form::kChoose;
  int splits = 0;  // parts of K that tiles are computed in; 0 chooses
};

// Bytes that a call needs besides its arguments (y and workspace may still be null).
int64_t int8_linear_workspace(const Int8Linear& args);

void int8_linear(const Int8Linear& args, Stream stream);

}  // namespace lissom::cuda
