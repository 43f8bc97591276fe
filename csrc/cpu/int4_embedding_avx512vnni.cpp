// int4 embedding, avx512vnni.
#include <cstdint>

#include "int4_embedding.h"
#include "intrinsics_avx512.h"

namespace lissom {
namespace avx512vnni {
namespace {

#include "simd_avx512.h"

inline F16 load_codes(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m128i codes =
      _mm_unpacklo_epi8(_mm_and_si128(bytes, mask), _mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_sub_epi8(codes, _mm_set1_epi8(kInt4Zero))))};
}

#include "int4_embedding_kernel.h"

}  // namespace
}  // namespace avx512vnni

void int4_embedding_avx512vnni(const Int4EmbeddingArgs& args, int64_t begin, int64_t end) {
  avx512vnni::gather_rows(args, begin, end);
}

}  // namespace lissom
