// int8 embedding on the GPU: gather rows of the table and dequantize them in one pass.
#pragma once

#include <cstdint>

#include "../common/formats.h"
#include "launch.h"

namespace lissom::cuda {

struct Int8Embedding {
  const void* indices;  // [count], int64 or int32
  bool wide_indices;    // int64
  int64_t count;
  const int8_t* table;  // [rows, width]
  int64_t row_stride;   // in elements; columns are neighbours
  int64_t rows, width;
  const float* scale;  // [rows]
  void* y;             // [count, width] of y_type
  DType y_type;
};

// y[i] = scale[index[i]] * table[index[i]]; NaN where index[i] is no row: nobody waits for a GPU to raise.
void int8_embedding(const Int8Embedding& args, Stream stream);

}  // namespace lissom::cuda
