// Block-sparse linear with AVX2 and FMA.
#include <immintrin.h>

#include <cstdint>

#include "block_sparse_linear.h"

namespace lissom {
namespace avx2 {
namespace {

#include "simd_avx2.h"
// clang-format off
#include "activation.h"
#include "unroll.h"
#include "tiles_avx2.h"
#include "lanes_avx2.h"
// clang-format on

// Quantized rows as the tiles read them: [quad][pairs (k0, k2), then (k1, k3)][rows of the panel][2].
struct QuadColumns {
  static constexpr int kRows = 8, kRowTile = kVectors * kLanes;

  template <int kCount>
  struct To {
    uint8_t* out;
    int64_t pair_bytes;
    // Eight rows: their 8 pairs are transposed together, so that each pair of the rows is one store.
    void put(const I16* q, int64_t i, int quads) {
      uint8_t* to = out + i / 2 * pair_bytes;
      if constexpr (kCount == 8) {
        __m256 v[8];
        unroll<8>([&](auto r) LISSOM_INLINE { v[r] = _mm256_castsi256_ps(pair_order(q[r])); });
        transpose8(v);
        for (int j = 0; j < 2 * quads; ++j) {
          _mm256_storeu_ps(reinterpret_cast<float*>(to + j * pair_bytes), v[j]);
        }
      } else {
        alignas(32) int32_t pairs[8];
        for (int r = 0; r < kCount; ++r) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), pair_order(q[r]));
          for (int j = 0; j < 2 * quads; ++j) __builtin_memcpy(to + j * pair_bytes + r * 4, pairs + j, 4);
        }
      }
    }
    void end() {}
  };
  template <int kCount>
  static To<kCount> rows(const LinearArgs&, const RowBatch& batch, int64_t, int r) {
    return {batch.activations + r * 4, int64_t{batch.row_tile} * 4};
  }
};

constexpr bool kOffset = false;  // int8 sums lack the packed weights' offsets

// clang-format off
#include "linear_kernel.h"
#include "block_sparse_linear_kernel.h"
// clang-format on

}  // namespace
}  // namespace avx2

const BlockSparseKernel& block_sparse_linear_avx2() { return avx2::kKernel; }

}  // namespace lissom
