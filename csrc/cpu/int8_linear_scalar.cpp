// int8 linear in plain C++: the definition that the vector files repeat. Runs anywhere.
#include <cstdint>

#include "int8_linear.h"

namespace lissom {
namespace scalar {
namespace {

#include "simd_scalar.h"
// clang-format off
#include "activation.h"
// clang-format on

// What both inner kernels have in common: no expansion of weights, small tiles.
template <typename S, typename A>
struct Plain {
  using Sum = S;
  using Stored = A;
  using Prepared = char;
  static constexpr int kRowTile = 4, kPanelTile = 1, kBlockQuads = 512;
  static constexpr bool kPrepares = false;
  static constexpr int kPrepareFromRows = 0, kPreparedSize = 1;

  static void begin(int rows, Sum* sums) {
    for (int i = 0; i < rows * kPanel; ++i) sums[i] = 0;
  }
  static void prepare(const int8_t*, int64_t, int, int64_t, Prepared*) {}
};

struct Dot : Plain<int32_t, int8_t> {
  static constexpr bool kQuantized = true;
  static constexpr int64_t kParallelWork = 1 << 16;
  static constexpr int kStoreRows = 1;

  template <int kRows>
  static void store_quads(const I16* q, uint8_t* out, int64_t quad_bytes, int quads) {
    for (int i = 0; i < quads * kQuad; ++i) {
      out[i / kQuad * quad_bytes + i % kQuad] = static_cast<uint8_t>(q[0].v[i]);
    }
  }

  static void multiply(const int8_t* a, int rows, const int8_t* lines, bool first, int64_t, int,
                       int64_t quads, int32_t* sums, const char*) {
    if (first) begin(rows, sums);
    for (int64_t quad = 0; quad < quads; ++quad, a += rows * kQuad, lines += kLine) {
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < kPanel; ++n) {
          int32_t sum = 0;
          for (int j = 0; j < kQuad; ++j) sum += a[r * kQuad + j] * lines[n * kQuad + j];
          sums[r * kPanel + n] += sum;
        }
      }
    }
  }
};

struct Float : Plain<float, float> {
  static constexpr bool kQuantized = false;
  static constexpr int64_t kParallelWork = 1 << 16;

  static void multiply(const float* a, int rows, const int8_t* lines, bool first, int64_t, int, int64_t quads,
                       float* sums, const char*) {
    if (first) begin(rows, sums);
    for (int64_t k = 0; k < quads * kQuad; ++k, a += rows) {
      const int8_t* w = lines + k / kQuad * kLine + k % kQuad;
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < kPanel; ++n) {
          float* sum = sums + r * kPanel + n;
          *sum = __builtin_fmaf(a[r], static_cast<float>(w[n * kQuad]), *sum);
        }
      }
    }
  }
};

// clang-format off
#include "linear_kernel.h"
#include "int8_linear_kernel.h"
// clang-format on

}  // namespace
}  // namespace scalar

const LinearKernel* int8_linear_scalar() { return scalar::kKernels; }

}  // namespace lissom
