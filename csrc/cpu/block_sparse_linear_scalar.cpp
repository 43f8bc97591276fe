// Block-sparse linear in plain C++: the definition that the vector files repeat. Runs anywhere.
#include <cstdint>

#include "block_sparse_linear.h"

namespace lissom {
namespace scalar {
namespace {

#include "simd_scalar.h"
// clang-format off
#include "activation.h"
#include "unroll.h"
#include "lanes_scalar.h"
// clang-format on

// Quantized rows as the tiles read them: [quad][rows of the panel][4].
struct QuadColumns {
  static constexpr int kRows = 1, kRowTile = kVectors * kLanes;

  template <int kCount>
  struct To {
    uint8_t* out;
    int64_t quad_bytes;
    void put(const I16* q, int64_t i, int quads) {
      for (int j = 0; j < quads * kQuad; ++j) {
        out[(i + j) / kQuad * quad_bytes + j % kQuad] = static_cast<uint8_t>(q[0].v[j]);
      }
    }
    void end() {}
  };
  template <int kCount>
  static To<kCount> rows(const LinearArgs&, const RowBatch& batch, int64_t, int r) {
    return {batch.activations + r * kQuad, int64_t{batch.row_tile} * kQuad};
  }
};

// … and for gathered columns: [column][rows of the panel, in GatherLanes' order].
struct GatherColumns {
  static constexpr int kRows = 1, kRowTile = GatherLanes::kMostVectors * kLanes;

  // The batch's rows are those of the panel from `row` on, a multiple of the panels' lanes.
  static void begin_at(RowBatch& batch, const RowPanel& panel, int64_t row) {
    const int64_t place = GatherLanes::place(static_cast<int>(row / 4), panel.stride) * 4;
    batch.activations = reinterpret_cast<uint8_t*>(panel.columns) + place * GatherLanes::kBytes;
  }
  template <int kCount>
  struct To {
    uint8_t* out;
    int64_t column_bytes;
    void put(const I16* q, int64_t i, int quads) {
      for (int j = 0; j < quads * kQuad; ++j) out[(i + j) * column_bytes] = static_cast<uint8_t>(q[0].v[j]);
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
}  // namespace scalar

const BlockSparseKernel& block_sparse_linear_scalar() { return scalar::kKernel; }

}  // namespace lissom
