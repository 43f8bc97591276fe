// What the linear ops share: y = act(x · Wᵀ + b), whole call from float input to float output, whatever form
// the weights have. An op's own header adds its weights; linear.cpp spreads the work over threads.
#pragma once

#include <cstdint>

#include "../common/formats.h"

namespace lissom {

struct LinearArgs {
  const void* x;  // [m, k] of x_type, rows x_stride elements apart
  DType x_type;
  int64_t x_stride;
  int64_t m, n, k;
  const float* bias;  // [n] or null
  bool rotated;       // x is rotated before it is quantized (formats.py, rotate)
  Activation activation;
  void* y;  // [m, n] of y_type, dense
  DType y_type;
};

// Rows that are worked on together, and the buffers for them.
struct RowBatch {
  const void* x;
  void* y;
  int64_t m;
  int row_tile;          // rows of a tile (the last may have fewer)
  uint8_t* activations;  // row tiles; what a tile holds is the kernel's business
  float* row_scale;      // [m]
};

// Rows that pass over a block of weights together: their activations of a block of K stay in L2. Rows given
// to one thread at once are at most these.
constexpr int kSlabRows = 96;

// What one ISA provides for one form of an op. Ranges are half open; rows are given in row tiles, outputs in
// panels of 16. The functions know which args they really get.
struct LinearKernel {
  int row_tile;    // rows that the inner kernel handles best at once
  int most_rows;   // … and at most: so few rows are one tile
  int panel_tile;  // panels likewise; ranges of panels start at multiples of it
  int64_t
      parallel_work;  // multiply-adds from which a second thread brings more than the microseconds it costs
  int64_t (*row_bytes)(const LinearArgs&);  // of one row's stored activations
  void (*quantize)(const LinearArgs&, const RowBatch&, int64_t tile_begin, int64_t tile_end);
  void (*multiply)(const LinearArgs&, const RowBatch&, int64_t tile_begin, int64_t tile_end,
                   int64_t panel_begin, int64_t panel_end);
};

// What every op checks before it chooses a kernel: throws std::invalid_argument, naming `op`.
void check_linear(const char* op, const LinearArgs& args, int threads);

// Computes on up to `threads` threads.
void run_linear(const LinearKernel& kernel, const LinearArgs& args, int threads);

}  // namespace lissom
