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

constexpr bool kOffset = false;  // int8 sums lack the packed weights' offsets

// clang-format off
#include "linear_kernel.h"
#include "block_sparse_linear_kernel.h"
// clang-format on

}  // namespace
}  // namespace scalar

const BlockSparseKernel& block_sparse_linear_scalar() { return scalar::kKernel; }

}  // namespace lissom
