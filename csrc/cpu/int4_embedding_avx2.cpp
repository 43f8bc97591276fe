// int4 embedding, avx2.
#include <immintrin.h>

#include <cstdint>

#include "int4_embedding.h"

namespace lissom {
namespace avx2 {
namespace {

#include "simd_avx2.h"

inline F16 load_codes(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m128i codes =
      _mm_unpacklo_epi8(_mm_and_si128(bytes, mask), _mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
  const __m128i values = _mm_sub_epi8(codes, _mm_set1_epi8(kInt4Zero));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(values, 8)))};
}

#include "int4_embedding_kernel.h"

}  // namespace
}  // namespace avx2

void int4_embedding_avx2(const Int4EmbeddingArgs& args, int64_t begin, int64_t end) {
  avx2::gather_rows(args, begin, end);
}

}  // namespace lissom
