// int4 embedding on the CPU: gather rows of the table and dequantize them in one pass.
#pragma once

#include <cstdint>

#include "../common/formats.h"

namespace lissom {

struct Int4EmbeddingArgs {
  const void* indices;  // [count], int64 or int32
  bool wide_indices;    // int64
  int64_t count;
  const uint8_t* table;  // [rows, ceil(width / 2)]: low nibble first
  int64_t rows, width;
  int64_t group;      // elements that share a scale; width where a row has one
  const void* scale;  // [rows, groups] of scale_type
  DType scale_type;
  const void* zero;  // [rows, groups] of zero_type, or null: 8
  int zero_type;     // a DType, or kUint8
  void* y;           // [count, width] of y_type
  DType y_type;
};
constexpr int kUint8 = 3;

// y[i] = fma(code - 8, scale, scale * (8 - zero)) of row index[i] for i in [begin, end); indices were
// checked.
using Int4EmbeddingKernel = void (*)(const Int4EmbeddingArgs&, int64_t begin, int64_t end);
void int4_embedding_scalar(const Int4EmbeddingArgs&, int64_t begin, int64_t end);
void int4_embedding_avx2(const Int4EmbeddingArgs&, int64_t begin, int64_t end);
void int4_embedding_avx512vnni(const Int4EmbeddingArgs&, int64_t begin, int64_t end);

// Returns -1, or the position of the first index out of range, in which case nothing is written.
int64_t int4_embedding(const Int4EmbeddingArgs& args, int threads);

}  // namespace lissom
