// int8 embedding, avx2.
#include <immintrin.h>

#include <cstdint>

#include "int8_embedding.h"

namespace lissom {
namespace avx2 {
namespace {

#include "simd_avx2.h"
// clang-format off
#include "int8_embedding_kernel.h"
// clang-format on

}  // namespace
}  // namespace avx2

void int8_embedding_avx2(const Int8EmbeddingArgs& args, int64_t begin, int64_t end) {
  avx2::gather_rows(args, begin, end);
}

}  // namespace lissom
