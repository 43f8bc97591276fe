// int8 embedding, scalar.

#include <cstdint>

#include "int8_embedding.h"

namespace lissom {
namespace scalar {
namespace {

#include "simd_scalar.h"
// clang-format off
#include "int8_embedding_kernel.h"
// clang-format on

}  // namespace
}  // namespace scalar

void int8_embedding_scalar(const Int8EmbeddingArgs& args, int64_t begin, int64_t end) {
  scalar::gather_rows(args, begin, end);
}

}  // namespace lissom
