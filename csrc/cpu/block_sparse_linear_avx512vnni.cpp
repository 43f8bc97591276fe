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
    // Four rows: each column of theirs is one store of 4 bytes.
    void put(const I16* q, int64_t i, int quads) {
      __m128i b[kCount], columns[4];
      for (int r = 0; r < kCount; ++r) b[r] = QuadColumns::offset_bytes(q[r]);
      if constexpr (kCount == 4) {
        const __m128i ab0 = _mm_unpacklo_epi8(b[0], b[1]), ab1 = _mm_unpackhi_epi8(b[0], b[1]);
        const __m128i cd0 = _mm_unpacklo_epi8(b[2], b[3]), cd1 = _mm_unpackhi_epi8(b[2], b[3]);
        columns[0] = _mm_unpacklo_epi16(ab0, cd0);
        columns[1] = _mm_unpackhi_epi16(ab0, cd0);
        columns[2] = _mm_unpacklo_epi16(ab1, cd1);
        columns[3] = _mm_unpackhi_epi16(ab1, cd1);
      } else {
        columns[0] = b[0];
      }
      const char* from = reinterpret_cast<const char*>(columns);
      uint8_t* to = out + i * column_bytes;
      for (int j = 0; j < quads * kQuad; ++j)
        __builtin_memcpy(to + j * column_bytes, from + j * kCount, kCount);
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

constexpr bool kOffset = true;  // int8 sums lack the packed weights' offsets

// clang-format off
#include "linear_kernel.h"
#include "block_sparse_linear_kernel.h"
// clang-format on

}  // namespace
}  // namespace avx512vnni

const BlockSparseKernel& block_sparse_linear_avx512vnni() { return avx512vnni::kKernel; }

}  // namespace lissom
