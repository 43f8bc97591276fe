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

// … and for gathered columns: [column][rows of the panel, in GatherLanes' order].
struct GatherColumns {
  static constexpr int kRows = 4, kRowTile = GatherLanes::kMostVectors * kLanes;

  // The batch's rows are those of the panel from `row` on, a multiple of the panels' lanes.
  static void begin_at(RowBatch& batch, const RowPanel& panel, int64_t row) {
    const int64_t place = GatherLanes::place(static_cast<int>(row / 4), panel.stride) * 4;
    batch.activations = reinterpret_cast<uint8_t*>(panel.columns) + place * GatherLanes::kBytes;
  }
  template <int kCount>
  struct To {
    uint8_t* out;
    int64_t column_bytes;
    static __m256i words(I16 q) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(q.lo, q.hi), 0xd8); }
    // Four rows: each column of theirs is one store of 8 bytes.
    void put(const I16* q, int64_t i, int quads) {
      alignas(32) int16_t columns[16 * kCount];
      __m256i* store = reinterpret_cast<__m256i*>(columns);
      if constexpr (kCount == 4) {
        const __m256i a = words(q[0]), b = words(q[1]), c = words(q[2]), d = words(q[3]);
        const __m256i ab0 = _mm256_unpacklo_epi16(a, b), ab1 = _mm256_unpackhi_epi16(a, b);
        const __m256i cd0 = _mm256_unpacklo_epi16(c, d), cd1 = _mm256_unpackhi_epi16(c, d);
        // Columns (0 1 | 8 9), (2 3 | 10 11), (4 5 | 12 13), (6 7 | 14 15).
        const __m256i v0 = _mm256_unpacklo_epi32(ab0, cd0), v1 = _mm256_unpackhi_epi32(ab0, cd0);
        const __m256i v2 = _mm256_unpacklo_epi32(ab1, cd1), v3 = _mm256_unpackhi_epi32(ab1, cd1);
        _mm256_store_si256(store, _mm256_permute2x128_si256(v0, v1, 0x20));
        _mm256_store_si256(store + 1, _mm256_permute2x128_si256(v2, v3, 0x20));
        _mm256_store_si256(store + 2, _mm256_permute2x128_si256(v0, v1, 0x31));
        _mm256_store_si256(store + 3, _mm256_permute2x128_si256(v2, v3, 0x31));
      } else {
        _mm256_store_si256(store, words(q[0]));
      }
      uint8_t* to = out + i * column_bytes;
      for (int j = 0; j < quads * kQuad; ++j) {
        __builtin_memcpy(to + j * column_bytes, columns + j * kCount, 2 * kCount);
      }
    }
    void end() {}
  };
  template <int kCount>
  static auto rows(const LinearArgs&, const RowBatch& batch, int64_t, int r) {
    const int64_t place = GatherLanes::place(r / 4, batch.row_tile) * 4 + r % 4;
    return To<kCount>{batch.activations + place * GatherLanes::kBytes,
                      int64_t{batch.row_tile} * GatherLanes::kBytes};
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
