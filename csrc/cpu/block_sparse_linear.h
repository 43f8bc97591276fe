// Block-sparse linear on the CPU: y = act(x · Wᵀ + b) and its gradients, W [n, k] stored in blocks as torch's
// BSR. The numbers are those of python/lissom/reference/block_sparse_linear.py: int8 bit for bit, float
// within its tolerance.
#pragma once

#include <cstdint>

#include "../common/formats.h"
#include "linear.h"

namespace lissom {

// A matrix [n, k] in blocks. Indices are trusted here: block_sparse_check is what makes them so.
struct BlockSparse {
  int64_t n, k;
  int64_t height, width;  // of a block; blocks at the edges are padded
  const int32_t* crow;    // [block_rows() + 1]: where the blocks of a block row begin
  const int32_t* col;     // [blocks]
  const void* values;     // [blocks][height][width]
  ValueType type;
  int64_t blocks;

  int64_t block_rows() const { return ceil_div(n, height); }
  int64_t block_columns() const { return ceil_div(k, width); }
  int64_t padded_n() const { return block_rows() * height; }
  int64_t padded_k() const { return block_columns() * width; }
};

struct BlockSparseLinearArgs : LinearArgs {  // never rotated
  BlockSparse weight;
  const float* weight_scale;  // [n], kInt8 only
  const uint8_t* packed;      // see formats.h, kInt8 only
};

// A dense matrix, rows `stride` elements apart.
struct Rows {
  const void* data;
  DType type;
  int64_t stride;
};

// grad_x [m, k] = grad [m, n] · W.
struct BlockSparseGradInputArgs {
  BlockSparse weight;
  const float* weight_scale;  // [n], kInt8 only
  Rows grad;
  int64_t m;
  void* grad_x;  // [m, k] of grad_x_type, dense
  DType grad_x_type;
};

// grad_values [blocks][height][width] float = gradᵀ · x where W has blocks; 0 in their padding.
struct BlockSparseGradValuesArgs {
  BlockSparse weight;  // without values
  Rows grad, x;
  int64_t m;
  float* grad_values;
};

// Rows that are worked on together, as the kernels lay them out.
struct RowPanel {
  int64_t row0;
  int rows;          // real ones
  int stride;        // rows with padding: elements from one column (or quad) to the next
  float* columns;    // [columns or quads][stride]
  float* row_scale;  // [rows], int8 only
  bool few;          // so few rows that lanes are something else; then no padding
};

// Panels are at most `most` vectors of `lanes` rows.
struct PanelShape {
  int lanes, most;
  bool few;  // one panel of `lanes` rows, see RowPanel
};

// What one ISA provides. Ranges are half open; `begin` and `end` are block rows where nothing else is said.
struct BlockSparseKernel {
  PanelShape gradients;
  PanelShape (*panel_shape)(const BlockSparse& weight, int64_t m);  // forward
  int64_t (*panel_floats)(const BlockSparse& weight, int stride);
  // x to panel: columns [begin, end), multiples of 16 but the last; int8: vectors of rows [begin, end).
  void (*fill)(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end);
  void (*multiply)(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end);

  // `from` [rows][columns) to panel [columns][stride], times scale [columns] where that is not null.
  void (*transpose)(const Rows& from, const RowPanel& panel, int64_t columns, const float* scale,
                    int64_t begin, int64_t end);
  // grad_x panel [padded_k][stride] from grad panel [padded_n][stride]; then written to its rows.
  void (*grad_input)(const BlockSparseGradInputArgs& args, const RowPanel& grad, const RowPanel& grad_x);
  // grad_values += over the panels' rows.
  void (*grad_values)(const BlockSparseGradValuesArgs& args, const RowPanel& grad, const RowPanel& x,
                      int64_t begin, int64_t end);
};

const BlockSparseKernel& block_sparse_linear_scalar();
const BlockSparseKernel& block_sparse_linear_avx2();
const BlockSparseKernel& block_sparse_linear_avx512vnni();

// All compute with the selected ISA on up to `threads` threads. Throw std::invalid_argument on bad sizes.
void block_sparse_linear(const BlockSparseLinearArgs& args, int threads);
void block_sparse_grad_input(const BlockSparseGradInputArgs& args, int threads);
void block_sparse_grad_values(const BlockSparseGradValuesArgs& args, int threads);

// Where things lie in the packed copy of int8 values.
BlockSparsePacked packed_layout(const BlockSparse& weight);

// -1 where crow rises from 0 to `blocks` and the columns of each block row rise and are in range; otherwise
// the place of the first fault: i for crow[i], block_rows + 1 + j for col[j].
int64_t block_sparse_check(const int32_t* crow, const int32_t* col, int64_t block_rows, int64_t block_columns,
                           int64_t blocks);

}  // namespace lissom
