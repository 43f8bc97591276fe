// int4 embedding, scalar.
#include <cstdint>

#include "int4_embedding.h"

namespace lissom {
namespace scalar {
namespace {

#include "simd_scalar.h"

inline F16 load_codes(const uint8_t* p) {
  F16 x;
  for (int i = 0; i < 16; ++i) x.v[i] = static_cast<float>((p[i / 2] >> (i % 2 * 4) & 15) - kInt4Zero);
  return x;
}

#include "int4_embedding_kernel.h"

}  // namespace
}  // namespace scalar

void int4_embedding_scalar(const Int4EmbeddingArgs& args, int64_t begin, int64_t end) {
  scalar::gather_rows(args, begin, end);
}

}  // namespace lissom
