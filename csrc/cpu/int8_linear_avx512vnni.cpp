// int8 linear with AVX-512 VNNI.
//
// vpdpbusd multiplies unsigned by signed bytes and adds four products into int32 without saturating.
// Activations are stored as q + 128; a panel's first line, -128 * sum_k w, takes the offset out again: sums
// start from it.
#include <cstdint>

#include "int8_linear.h"
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
// clang-format on

struct Dot {
  using Sum = int32_t;
  using Stored = uint8_t;
  using Prepared = char;
  static constexpr bool kQuantized = true;
  static constexpr int64_t kParallelWork = 2 << 20;
  // 12 rows * 2 panels: 24 accumulators, 2 weights, 1 broadcast of the 32 registers.
  static constexpr int kRowTile = 12, kPanelTile = 2;
  // 256 quads: 32 KiB of weights of two panels and 12 KiB of activations per row tile.
  static constexpr int kBlockQuads = 256;
  static constexpr bool kPrepares = false;
  static constexpr int kPrepareFromRows = 0, kPreparedSize = 1;
  static constexpr int kStoreRows = 4;

  static __m128i offset_bytes(I16 q) {
    return _mm_xor_si128(_mm512_cvtepi32_epi8(q.v), _mm_set1_epi8(static_cast<char>(kInt8ActivationOffset)));
  }
  template <int kRows>
  static void store_quads(const I16* q, uint8_t* out, int64_t quad_bytes, int quads) {
    __m128i bytes[kRows];
    for (int r = 0; r < kRows; ++r) bytes[r] = offset_bytes(q[r]);
    store_byte_quads<kRows>(bytes, out, quad_bytes, quads);
  }

  static void prepare(const int8_t*, int64_t, int, int64_t, char*) {}

  template <int kRows, int kPanels>
  __attribute__((noinline)) static void tile(const uint8_t* a, const int8_t* lines, bool first,
                                             int64_t panel_stride, int64_t quads, int32_t* sums) {
    // Small tiles have too few sums to keep two multipliers busy: split each over several quads.
    constexpr int kSplit = kRows * kPanels <= 2 ? 4 : kRows * kPanels <= 6 ? 2 : 1;
    __m512i acc[kSplit][kRows][kPanels];
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      unroll<kPanels>([&](auto p) LISSOM_INLINE {
        acc[0][r][p] = first ? load_line(lines - kLine + p * panel_stride)
                             : load_line(sums + (r * kPanels + p) * kPanel);
        unroll_from<1, kSplit>([&](auto s) LISSOM_INLINE { acc[s][r][p] = _mm512_setzero_si512(); });
      });
    });
    int64_t i = 0;
    for (; i + kSplit <= quads; i += kSplit) {
      unroll<kSplit>([&](auto s) LISSOM_INLINE {
        __m512i w[kPanels];
        unroll<kPanels>([&](auto p) LISSOM_INLINE {
          w[p] = load_line(lines + p * panel_stride);
          // Few rows: bound by the bytes of the weights (4096 x 4096, M = 8, one thread: 6 % quicker).
          if (kRows <= 8) _mm_prefetch(lines + p * panel_stride + 2048, _MM_HINT_T0);
        });
        unroll<kRows>([&](auto r) LISSOM_INLINE {
          const __m512i x = broadcast_quad(a + r * kQuad);
          unroll<kPanels>([&](auto p) LISSOM_INLINE { dot(acc[s][r][p], x, w[p]); });
        });
        a += kRows * kQuad;
        lines += kLine;
      });
    }
    for (; kSplit > 1 && i < quads; ++i, a += kRows * kQuad, lines += kLine) {
      unroll<kRows>([&](auto r) LISSOM_INLINE {
        const __m512i x = broadcast_quad(a + r * kQuad);
        unroll<kPanels>([&](auto p)
                            LISSOM_INLINE { dot(acc[0][r][p], x, load_line(lines + p * panel_stride)); });
      });
    }
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      unroll<kPanels>([&](auto p) LISSOM_INLINE {
        __m512i sum = acc[0][r][p];
        unroll_from<1, kSplit>([&](auto s) LISSOM_INLINE { sum = _mm512_add_epi32(sum, acc[s][r][p]); });
        _mm512_storeu_si512(sums + (r * kPanels + p) * kPanel, sum);
      });
    });
  }

  template <int kPanels>
  static void tiles(const uint8_t* a, int rows, const int8_t* lines, bool first, int64_t stride,
                    int64_t quads, int32_t* sums) {
    with_count<12>(rows, [&](auto count) { tile<count, kPanels>(a, lines, first, stride, quads, sums); });
  }

  static void multiply(const uint8_t* a, int rows, const int8_t* lines, bool first, int64_t panel_stride,
                       int panels, int64_t quads, int32_t* sums, const char*) {
    if (panels == 2) {
      tiles<2>(a, rows, lines, first, panel_stride, quads, sums);
    } else {
      tiles<1>(a, rows, lines, first, panel_stride, quads, sums);
    }
  }
};

// Weight-only: as in int8_linear_avx2.cpp, with 12 x 32 tiles.
struct Float {
  using Sum = float;
  using Stored = float;
  using Prepared = float;
  static constexpr bool kQuantized = false;
  static constexpr int64_t kParallelWork = 1 << 19;
  static constexpr int kRowTile = 12, kPanelTile = 4, kBlockQuads = 64;
  static constexpr bool kPrepares = true;
  static constexpr int kPrepareFromRows = 6;
  static constexpr int kPreparedSize = kBlockQuads * kLine * kPanelTile;

  static __m512 weight(__m512i line, int j) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line, 24 - 8 * j), 24));
  }

  static void prepare(const int8_t* lines, int64_t panel_stride, int panels, int64_t quads, float* prepared) {
    for (int p = 0; p < panels; ++p) {
      const int8_t* w = lines + p * panel_stride;
      for (int64_t i = 0; i < quads; ++i, w += kLine) {
        const __m512i line = load_line(w);
        for (int j = 0; j < kQuad; ++j, prepared += 16) _mm512_store_ps(prepared, weight(line, j));
      }
    }
  }

  template <int kRows, int kPanels>
  __attribute__((noinline)) static void direct(const float* a, const int8_t* lines, int64_t panel_stride,
                                               int64_t quads, float* sums, int stride) {
    __m512 acc[kRows][kPanels];
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      unroll<kPanels>([&](auto p) LISSOM_INLINE { acc[r][p] = _mm512_loadu_ps(sums + r * stride + p * 16); });
    });
    for (int64_t i = 0; i < quads; ++i, lines += kLine) {
      unroll<kQuad>([&](auto j) LISSOM_INLINE {
        unroll<kPanels>([&](auto p) LISSOM_INLINE {
          const __m512 w = weight(load_line(lines + p * panel_stride), j);
          unroll<kRows>([&](auto r) LISSOM_INLINE { dot(acc[r][p], _mm512_set1_ps(a[r]), w); });
        });
        a += kRows;
      });
    }
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      unroll<kPanels>([&](auto p) LISSOM_INLINE { _mm512_storeu_ps(sums + r * stride + p * 16, acc[r][p]); });
    });
  }

  template <int kPanels>
  static void direct_tile(const float* a, int rows, const int8_t* lines, int64_t panel_stride, int64_t quads,
                          float* sums, int stride) {
    with_count<5>(rows,
                  [&](auto count) { direct<count, kPanels>(a, lines, panel_stride, quads, sums, stride); });
  }

  static void multiply(const float* a, int rows, const int8_t* lines, bool first, int64_t panel_stride,
                       int panels, int64_t quads, float* sums, const float* prepared) {
    const int stride = panels * kPanel;
    if (first) __builtin_memset(sums, 0, sizeof(float) * rows * stride);
    if (!prepared && panels == 4) return direct_tile<4>(a, rows, lines, panel_stride, quads, sums, stride);
    if (prepared) return float_tiles(a, rows, prepared, quads * kLine, panels, quads * kQuad, sums);
    for (int p = 0; p < panels; ++p)
      direct_tile<1>(a, rows, lines + p * panel_stride, panel_stride, quads, sums + p * 16, stride);
  }
};

// clang-format off
#include "linear_kernel.h"
#include "int8_linear_kernel.h"
// clang-format on

}  // namespace
}  // namespace avx512vnni

const LinearKernel* int8_linear_avx512vnni() { return avx512vnni::kKernels; }

}  // namespace lissom
