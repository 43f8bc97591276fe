// Block-sparse linear with AVX-512 (VNNI for int8).
#include <cstdint>

#include "block_sparse_linear.h"
#include "intrinsics_avx512.h"

namespace lissom {
namespace avx512vnni {
namespace {

#include "simd_avx512.h"
// clang-format off
#include "activation.h"
#include "unroll.h"
#include "tiles_avx512.h"
#include "byte_quads.h"
#include "lanes_avx512.h"
// clang-format on

// Quantized rows as the tiles read them: [quad][rows of the panel][4], as unsigned q + 128.
struct QuadColumns {
  static constexpr int kRows = 4, kRowTile = kVectors * kLanes;

  template <int kCount>
  struct To {
    uint8_t* out;
    int64_t quad_bytes;
    void put(const I16* q, int64_t i, int quads) {
      __m128i bytes[kCount];
      for (int r = 0; r < kCount; ++r) bytes[r] = offset_bytes(q[r]);
      store_byte_quads<kCount>(bytes, out + i / kQuad * quad_bytes, quad_bytes, quads);
    }
    void end() {}
  };
  template <int kCount>
  static To<kCount> rows(const LinearArgs&, const RowBatch& batch, int64_t, int r) {
    return {batch.activations + r * kQuad, int64_t{batch.row_tile} * kQuad};
  }
  static __m128i offset_bytes(I16 q) {
    return _mm_xor_si128(_mm512_cvtepi32_epi8(q.v), _mm_set1_epi8(static_cast<char>(kInt8ActivationOffset)));
  }
};

constexpr bool kOffset = true;  // int8 sums lack the packed weights' offsets

// clang-format off
#include "linear_kernel.h"
#include "block_sparse_linear_kernel.h"
// clang-format on

}  // namespace
}  // namespace avx512vnni

const BlockSparseKernel& block_sparse_linear_avx512vnni() { return avx512vnni::kKernel; }

}  // namespace lissom
