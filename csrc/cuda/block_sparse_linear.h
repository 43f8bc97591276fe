// Block-sparse linear on the GPU: y = act(x · Wᵀ + b) over the stored blocks of W
// (python/lissom/reference/block_sparse_linear.py has the numbers, formats.py the layout).
#pragma once

#include <cstdint>

#include "../common/formats.h"
#include "launch.h"

namespace lissom::cuda {

// Consecutive stored blocks of one row of blocks ("line"), of which there may be others: what one tile of
// sums goes over. python/lissom/_block_sparse_pieces.py cuts them, longest first.
struct alignas(16) BlockSparsePiece {
  int32_t line;         // -1: there is no such piece
  int32_t begin, end;   // blocks
  int32_t part, parts;  // this one, of the line's
  int32_t slot;         // of the line's first partial sums; parts follow each other
  int32_t unused[2];
};
static_assert(sizeof(BlockSparsePiece) == 32, "as python/lissom/_block_sparse_pieces.py writes it");

// How a product is computed: rows x outputs of a tile of sums.
enum class BlockSparseForm : int { kFewRows, kSmall, kTall, kSquare, kHopperTall, kHopperSquare };

struct BlockSparsePlan {
  BlockSparseForm form;
  int64_t most_blocks;  // of a piece
  int64_t tiles;        // of a line
  int64_t tile_elements;
};

struct BlockSparseLinear {
  const void* x;  // [m, columns] of the values' type, int8 as quantize_rows makes it
  int64_t m, columns;
  int64_t x_stride;      // in elements; rows lie on multiples of 16 bytes
  const float* x_scale;  // [m]; int8 only
  const void* values;    // [blocks, height, width] on a multiple of 16 bytes
  ValueType value_type;  // kBFloat16, kFloat16 or kInt8
  int64_t blocks;
  int height, width;             // rows of a block are multiples of 16 bytes
  const int32_t* block_columns;  // [blocks]
  const BlockSparsePiece* pieces;
  int64_t piece_count;
  const float* weight_scale;  // [n]; int8 only
  const void* bias;           // [n] of bias_type, or null
  DType bias_type;
  Activation activation;
  int64_t n;
  void* y;  // [m, n] of y_type
  DType y_type;
  void* partial;     // float32 or int32 [slots, tiles, tile_elements], for lines of several pieces
  int32_t* arrived;  // [slots, tiles], zeros; left so
  BlockSparseForm form;
};

// The best form for these sizes on the current device. `lines`: rows of blocks.
BlockSparsePlan block_sparse_plan(ValueType value_type, int64_t m, int64_t lines, int64_t blocks, int height,
                                  int width);

// Sums of pieces are added in their order, so that results do not change from run to run.
void block_sparse_linear(const BlockSparseLinear& args, Stream stream);

}  // namespace lissom::cuda
