// int8 embedding, avx512vnni.
#include <cstdint>

#include "int8_embedding.h"
#include "intrinsics_avx512.h"

namespace lissom {
namespace avx512vnni {
namespace {

#include "simd_avx512.h"
// clang-format off
#include "int8_embedding_kernel.h"
// clang-format on

}  // namespace
}  // namespace avx512vnni

void int8_embedding_avx512vnni(const Int8EmbeddingArgs& args, int64_t begin, int64_t end) {
  avx512vnni::gather_rows(args, begin, end);
}

}  // namespace lissom
