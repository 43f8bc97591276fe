// int8 linear on the CPU: y = act(x · Wᵀ + b), whole call from float input to float output.
// The numbers are those of python/lissom/reference/int8_linear.py, bit for bit.
#pragma once

#include <cstdint>

#include "../common/formats.h"

namespace lissom {

struct Int8LinearArgs {
  const void* x;  // [m, k] of x_type, rows x_stride elements apart
  DType x_type;
  int64_t x_stride;
  int64_t m, n, k;
  const int8_t* packed;       // see formats.h
  const float* weight_scale;  // [n]
  const float* bias;          // [n] or null
  InputMode mode;
  float input_scale;  // kStatic only
  bool rotated;       // x is rotated before it is quantized (formats.py, rotate); not with kWeightOnly
  Activation activation;
  void* y;  // [m, n] of y_type, dense
  DType y_type;
};

// Buffers that one call shares between its threads.
struct Int8LinearWork {
  uint8_t* activations;  // row tiles of [quads][rows in the tile][4], in the ISA's storage type
  float* row_scale;      // [m]
  int row_tile;          // rows of a tile (the last may have fewer), at most the kernel's
};

// Rows that pass over a block of weights together: their activations of a block of K stay in L2. Rows given
// to one thread at once are at most these.
constexpr int kInt8SlabRows = 96;

// What one ISA provides. Ranges are half open; rows are given in row tiles, outputs in panels of 16.
struct Int8LinearKernel {
  int row_tile;          // most rows that the inner kernel handles at once
  int panel_tile;        // panels likewise; ranges of panels start at multiples of it
  int activation_bytes;  // of one stored activation (weight-only: one float)
  int64_t
      parallel_work;  // multiply-adds from which a second thread brings more than the microseconds it costs
  void (*quantize)(const Int8LinearArgs&, const Int8LinearWork&, int64_t tile_begin, int64_t tile_end);
  void (*multiply)(const Int8LinearArgs&, const Int8LinearWork&, int64_t tile_begin, int64_t tile_end,
                   int64_t panel_begin, int64_t panel_end);
};

// Two kernels per ISA: [0] quantized activations, [1] weight-only.
const Int8LinearKernel* int8_linear_scalar();
const Int8LinearKernel* int8_linear_avx2();
const Int8LinearKernel* int8_linear_avx512vnni();

// Computes with the selected ISA on up to `threads` threads. Throws std::invalid_argument on bad sizes.
void int8_linear(const Int8LinearArgs& args, int threads);

// Canonical int8 [n, k] to the packed layout.
void int8_pack(const int8_t* qweight, int64_t n, int64_t k, int8_t* packed);

}  // namespace lissom
