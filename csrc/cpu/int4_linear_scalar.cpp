// int4 linear in plain C++: the definition that the vector files repeat. Runs anywhere.
#include <cstdint>

#include "int4_linear.h"

namespace lissom {
namespace scalar {
namespace {

#include "simd_scalar.h"
// clang-format off
#include "activation.h"
#include "linear_kernel.h"
#include "int4_span.h"
// clang-format on

// Code of k-value `k` of a block and output `n`.
inline int nibble(const uint8_t* lines, int n, int k) {
  const int byte = lines[k / 8 * kLine + n * kQuad + k % kQuad];
  return k % 8 < 4 ? byte & 15 : byte >> 4;
}
// The same where a codebook is used.
inline int table_index(const uint8_t* lines, int n, int k) {
  const int byte = lines[n % 4 * kLine + n / 4 * 16 + k % 16];
  return k < 16 ? byte & 15 : byte >> 4;
}
// Byte `plane` of entry `index` of output `n`.
inline uint8_t table_byte(const uint8_t* tables, int plane, int n, int index) {
  return tables[(plane * 4 + n % 4) * kLine + n / 4 * 16 + index];
}

// What the inner kernels have in common: a block of K is a segment, and is always expanded, [k][16].
template <typename A, typename W>
struct Plain {
  using Stored = A;
  using Prepared = W;
  static constexpr int kStoreRows = 1, kZero = 0;
  static constexpr int kRowTile = 4, kMostRows = 4, kPanelTile = 1, kBlockK = kInt4Segment;
  static constexpr int kPreparedSize = kBlockK * kPanel;
  static constexpr int64_t kParallelWork = 1 << 16;
  static bool prepares(const Int4Layout&, int64_t) { return true; }
};

struct Quantized : Plain<int8_t, int8_t> {
  template <int kRows>
  static void store_quads(const I16* q, uint8_t* out, int64_t quad_bytes) {
    for (int i = 0; i < 16; ++i) out[i / kQuad * quad_bytes + i % kQuad] = static_cast<uint8_t>(q[0].v[i]);
  }

  static void multiply(const SpanRows<int8_t>& x, const Int4Span& span, bool first, float* sums,
                       const int8_t* w) {
    if (first) __builtin_memset(sums, 0, sizeof(float) * x.rows * kPanel);
    const int8_t* a = x.a;
    for (int64_t s = 0; s < span.segments; ++s) {
      const int64_t count = span.segment_blocks(s) * kInt4Block;
      for (int r = 0; r < x.rows; ++r) {
        for (int n = 0; n < kPanel; ++n) {
          int32_t total = 0;
          for (int64_t k = 0; k < count; ++k)
            total += a[(k / kQuad * x.rows + r) * kQuad + k % kQuad] * w[k * kPanel + n];
          float& sum = sums[r * kPanel + n];
          sum = __builtin_fmaf(static_cast<float>(total), span.scales(0, s)[n], sum);
          if (span.layout.has_zero) sum = __builtin_fmaf(x.sum[s * x.rows + r], span.offsets(0, s)[n], sum);
        }
      }
      a += count * x.rows;
      w += count * kPanel;
    }
  }
};

struct Nibbles : Quantized {
  static void prepare(const Int4Span& span, int8_t* w) {
    for (int64_t b = 0; b < span.blocks; ++b) {
      const int64_t s = b / span.layout.segment_blocks();
      const uint8_t* lines = span.lines(0, s) + b % span.layout.segment_blocks() * kInt4BlockBytes;
      for (int k = 0; k < kInt4Block; ++k) {
        for (int n = 0; n < kPanel; ++n) *w++ = static_cast<int8_t>(nibble(lines, n, k) - kInt4Zero);
      }
    }
  }
};

struct Table : Quantized {
  static void prepare(const Int4Span& span, int8_t* w) {
    for (int64_t b = 0; b < span.blocks; ++b) {
      const int64_t s = b / span.layout.segment_blocks();
      const uint8_t* lines = span.lines(0, s) + b % span.layout.segment_blocks() * kInt4BlockBytes;
      for (int k = 0; k < kInt4Block; ++k) {
        for (int n = 0; n < kPanel; ++n) {
          *w++ = static_cast<int8_t>(table_byte(span.tables(0, s), 0, n, table_index(lines, n, k)) -
                                     kInt4TableZero);
        }
      }
    }
  }
};

struct Float : Plain<float, float> {
  static void prepare(const Int4Span& span, float* w) {
    for (int64_t b = 0; b < span.blocks; ++b) {
      const int64_t s = b / span.layout.segment_blocks();
      const uint8_t* lines = span.lines(0, s) + b % span.layout.segment_blocks() * kInt4BlockBytes;
      for (int k = 0; k < kInt4Block; ++k) {
        for (int n = 0; n < kPanel; ++n) {
          const float scale = span.scales(0, s)[n];
          if (span.layout.scope == TableScope::kNone) {
            const float q = static_cast<float>(nibble(lines, n, k) - kInt4Zero);
            *w++ = __builtin_fmaf(q, scale, span.layout.has_zero ? span.offsets(0, s)[n] : 0.0f);
          } else {
            uint32_t bits = 0;
            for (int p = 0; p < 4; ++p) {
              bits |= uint32_t{table_byte(span.tables(0, s), p, n, table_index(lines, n, k))} << (8 * p);
            }
            *w++ = bits_to_float(bits) * scale;
          }
        }
      }
    }
  }

  static void multiply(const SpanRows<float>& x, const Int4Span& span, bool first, float* sums,
                       const float* w) {
    if (first) __builtin_memset(sums, 0, sizeof(float) * x.rows * kPanel);
    const float* a = x.a;
    for (int64_t k = 0; k < span.k(); ++k, a += x.rows, w += kPanel) {
      for (int r = 0; r < x.rows; ++r) {
        for (int n = 0; n < kPanel; ++n) {
          sums[r * kPanel + n] = __builtin_fmaf(a[r], w[n], sums[r * kPanel + n]);
        }
      }
    }
  }
};

#include "int4_linear_kernel.h"

}  // namespace
}  // namespace scalar

const LinearKernel* int4_linear_scalar() { return scalar::kKernels; }

}  // namespace lissom
