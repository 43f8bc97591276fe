// int8 embedding on the CPU: gather rows of the table and dequantize them in one pass.
#pragma once

#include <cstdint>

#include "../common/formats.h"

namespace lissom {

struct Int8EmbeddingArgs {
  const void* indices;  // [count], int64 or int32
  bool wide_indices;    // int64
  int64_t count;
  const int8_t* table;  // [rows, width]
  int64_t rows, width;
  const float* scale;  // [rows]
  void* y;             // [count, width] of y_type
  DType y_type;
};

// y[i] = scale[index[i]] * table[index[i]] for i in [begin, end); indices were checked.
using Int8EmbeddingKernel = void (*)(const Int8EmbeddingArgs&, int64_t begin, int64_t end);
void int8_embedding_scalar(const Int8EmbeddingArgs&, int64_t begin, int64_t end);
void int8_embedding_avx2(const Int8EmbeddingArgs&, int64_t begin, int64_t end);
void int8_embedding_avx512vnni(const Int8EmbeddingArgs&, int64_t begin, int64_t end);

// Returns -1, or the position of the first index out of range, in which case nothing is written.
int64_t int8_embedding(const Int8EmbeddingArgs& args, int threads);

}  // namespace lissom
