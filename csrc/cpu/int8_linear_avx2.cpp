// int8 linear with AVX2 and FMA.
//
// Exact route: activations are stored as int16 once per call, weights are widened to int16 in registers, and
// vpmaddwd adds the products of two k-steps into int32: nothing can saturate (the usual vpmaddubsw of u8 by
// s8 does, at 2 * 255 * 127). 32 multiply-adds a cycle, twice fp32 FMA.
//
// A quad line holds k0 k1 k2 k3 of each output in one 32-bit lane. Shifts within 16-bit halves give
//   even = (k0, k2) as int16 pair: (line << 8) >> 8        odd = (k1, k3): line >> 8
// so a row's quad is stored in the order k0 k2 k1 k3, and one 32-bit broadcast meets each.
#include <immintrin.h>

#include <cstdint>

#include "int8_linear.h"

namespace lissom {
namespace avx2 {
namespace {

#include "simd_avx2.h"
// clang-format off
#include "activation.h"
#include "unroll.h"
#include "tiles_avx2.h"
// clang-format on

struct Dot {
  using Sum = int32_t;
  using Stored = int16_t;
  using Prepared = int16_t;
  static constexpr bool kQuantized = true;
  static constexpr int64_t kParallelWork = 1 << 20;
  // 6 rows * 16 outputs: 12 accumulators, 2 weights, 1 broadcast, 1 product = 16 registers.
  static constexpr int kRowTile = 6, kPanelTile = 1;
  // 128 quads: 16 KiB of expanded weights and 6 KiB of activations per row tile.
  static constexpr int kBlockQuads = 128;
  // The expansion costs 6 of 54 vector operations per quad and tile; done once, it is free from three tiles
  // on.
  static constexpr bool kPrepares = true;
  static constexpr int kPrepareFromRows = 18;
  static constexpr int kPreparedSize = kBlockQuads * kLine;
  static constexpr int kStoreRows = 2;

  // A tile of one row is stored in bytes instead, for one_row: per quad four q and four |q|.
  static __m256i order_bytes(I16 q) {
    const __m128i bytes = to_bytes(q), magnitudes = _mm_abs_epi8(bytes);
    return _mm256_setr_m128i(_mm_unpacklo_epi32(bytes, magnitudes), _mm_unpackhi_epi32(bytes, magnitudes));
  }
  template <int kRows>
  static void store_quads(const I16* q, uint8_t* out, int64_t quad_bytes, int quads) {
    const bool single = kRows == 1 && quad_bytes == kQuad * static_cast<int64_t>(sizeof(Stored));
    __m256i words[kRows];
    for (int r = 0; r < kRows; ++r) words[r] = single ? order_bytes(q[r]) : pair_order(q[r]);
    store_word_quads<kRows>(words, out, quad_bytes, quads);
  }

  static void prepare(const int8_t* lines, int64_t, int, int64_t quads, int16_t* prepared) {
    for (int64_t i = 0; i < quads; ++i, lines += kLine, prepared += kLine)
      store_pairs(load_line(lines), load_line(lines + 32), prepared);
  }

  template <int kRows, bool kPrepared>
  __attribute__((noinline)) static void tile(const int16_t* a, const void* weights, int64_t quads,
                                             int32_t* sums) {
    __m256i acc[kRows][2];
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      acc[r][0] = load_line(sums + r * 16);
      acc[r][1] = load_line(sums + r * 16 + 8);
    });
    const char* w = static_cast<const char*>(weights);
    for (int64_t i = 0; i < quads; ++i) {
      unroll<2>([&](auto half) LISSOM_INLINE {  // even pair, odd pair
        __m256i low, high;
        if (kPrepared) {
          low = load_line(w + half * 64);
          high = load_line(w + half * 64 + 32);
        } else {
          low = half ? odd_of(load_line(w)) : even_of(load_line(w));
          high = half ? odd_of(load_line(w + 32)) : even_of(load_line(w + 32));
        }
        unroll<kRows>([&](auto r)
                          LISSOM_INLINE { dot(acc[r][0], acc[r][1], a + r * 4 + half * 2, low, high); });
      });
      a += kRows * 4;
      w += kPrepared ? 128 : 64;
    }
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * 16), acc[r][0]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * 16 + 8), acc[r][1]);
    });
  }

  // One row: vpmaddubsw of |x| by w with the sign of x cannot saturate either (2 * 127 * 127 < 2^15) and
  // takes 4 instructions for 32 products where widening takes 7; with more rows its work per row would lose.
  // A single stream of weights, four quads in flight so that no addition waits for the last.
  __attribute__((noinline)) static void one_row(const int16_t* activations, const int8_t* w, int64_t quads,
                                                int32_t* sums) {
    const char* a = reinterpret_cast<const char*>(activations);
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i acc[4][2];
    unroll<4>([&](auto u) LISSOM_INLINE { acc[u][0] = acc[u][1] = _mm256_setzero_si256(); });
    const auto step = [&](__m256i* sum) LISSOM_INLINE {
      int32_t quad, magnitudes;
      __builtin_memcpy(&quad, a, 4);
      __builtin_memcpy(&magnitudes, a + 4, 4);
      const __m256i x = _mm256_set1_epi32(quad), abs_x = _mm256_set1_epi32(magnitudes);
      _mm_prefetch(w + 1024, _MM_HINT_T0);
      unroll<2>([&](auto half) LISSOM_INLINE {
        const __m256i pairs = _mm256_maddubs_epi16(abs_x, _mm256_sign_epi8(load_line(w + 32 * half), x));
        sum[half] = _mm256_add_epi32(sum[half], _mm256_madd_epi16(pairs, ones));
      });
      a += 8;
      w += kLine;
    };
    int64_t i = 0;
    for (; i + 4 <= quads; i += 4) unroll<4>([&](auto u) LISSOM_INLINE { step(acc[u]); });
    for (; i < quads; ++i) step(acc[0]);
    unroll<2>([&](auto half) LISSOM_INLINE {
      const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(acc[0][half], acc[1][half]),
                                           _mm256_add_epi32(acc[2][half], acc[3][half]));
      __m256i* to = reinterpret_cast<__m256i*>(sums + half * 8);
      _mm256_storeu_si256(to, _mm256_add_epi32(sum, _mm256_loadu_si256(to)));
    });
  }

  template <bool kPrepared>
  static void tiles(const int16_t* a, int rows, const void* w, int64_t quads, int32_t* sums) {
    with_count<6>(rows, [&](auto count) { tile<count, kPrepared>(a, w, quads, sums); });
  }

  static void multiply(const int16_t* a, int rows, const int8_t* lines, bool first, int64_t, int,
                       int64_t quads, int32_t* sums, const int16_t* prepared) {
    if (first) __builtin_memset(sums, 0, sizeof(int32_t) * rows * kPanel);
    if (rows == 1) return one_row(a, lines, quads, sums);
    if (prepared) return tiles<true>(a, rows, prepared, quads, sums);
    tiles<false>(a, rows, lines, quads, sums);
  }
};

// Weight-only: weights of a block become floats in L1, then 6 x 16 FMA tiles. Each output is one chain of
// fused multiply-adds over k in order, whatever the tile, so all ISAs give the same bits.
struct Float {
  using Sum = float;
  using Stored = float;
  using Prepared = float;
  static constexpr bool kQuantized = false;
  static constexpr int64_t kParallelWork = 1 << 19;
  static constexpr int kRowTile = 6, kPanelTile = 4, kBlockQuads = 64;
  static constexpr bool kPrepares = true;
  static constexpr int kPrepareFromRows = 6;
  static constexpr int kPreparedSize = kBlockQuads * kLine * kPanelTile;

  // k-step j of 8 outputs as floats.
  static __m256 weight(__m256i line, int j) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(line, 24 - 8 * j), 24));
  }

  // [panel][k][16 outputs]
  static void prepare(const int8_t* lines, int64_t panel_stride, int panels, int64_t quads, float* prepared) {
    for (int p = 0; p < panels; ++p) {
      const int8_t* w = lines + p * panel_stride;
      for (int64_t i = 0; i < quads; ++i, w += kLine) {
        const __m256i low = load_line(w), high = load_line(w + 32);
        for (int j = 0; j < kQuad; ++j, prepared += 16) {
          _mm256_store_ps(prepared, weight(low, j));
          _mm256_store_ps(prepared + 8, weight(high, j));
        }
      }
    }
  }

  // Few rows: weights straight from the line; several panels in flight hide the latency of the chains.
  template <int kRows, int kPanels>
  __attribute__((noinline)) static void direct(const float* a, const int8_t* lines, int64_t panel_stride,
                                               int64_t quads, float* sums, int stride) {
    __m256 acc[kRows][kPanels][2];
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      unroll<kPanels>([&](auto p) LISSOM_INLINE {
        acc[r][p][0] = _mm256_loadu_ps(sums + r * stride + p * 16);
        acc[r][p][1] = _mm256_loadu_ps(sums + r * stride + p * 16 + 8);
      });
    });
    for (int64_t i = 0; i < quads; ++i, lines += kLine) {
      unroll<kQuad>([&](auto j) LISSOM_INLINE {
        unroll<kPanels>([&](auto p) LISSOM_INLINE {
          const __m256 low = weight(load_line(lines + p * panel_stride), j);
          const __m256 high = weight(load_line(lines + p * panel_stride + 32), j);
          unroll<kRows>([&](auto r) LISSOM_INLINE {
            const __m256 x = _mm256_broadcast_ss(a + r);
            acc[r][p][0] = _mm256_fmadd_ps(x, low, acc[r][p][0]);
            acc[r][p][1] = _mm256_fmadd_ps(x, high, acc[r][p][1]);
          });
        });
        a += kRows;
      });
    }
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      unroll<kPanels>([&](auto p) LISSOM_INLINE {
        _mm256_storeu_ps(sums + r * stride + p * 16, acc[r][p][0]);
        _mm256_storeu_ps(sums + r * stride + p * 16 + 8, acc[r][p][1]);
      });
    });
  }

  static void direct_tile(const float* a, int rows, const int8_t* lines, int64_t quads, float* sums,
                          int stride) {
    with_count<5>(rows, [&](auto count) { direct<count, 1>(a, lines, 0, quads, sums, stride); });
  }

  static void multiply(const float* a, int rows, const int8_t* lines, bool first, int64_t panel_stride,
                       int panels, int64_t quads, float* sums, const float* prepared) {
    const int stride = panels * kPanel;
    if (first) __builtin_memset(sums, 0, sizeof(float) * rows * stride);
    if (!prepared && rows == 1 && panels == 4)
      return direct<1, 4>(a, lines, panel_stride, quads, sums, stride);
    if (prepared) return float_tiles(a, rows, prepared, quads * kLine, panels, quads * kQuad, sums);
    for (int p = 0; p < panels; ++p)
      direct_tile(a, rows, lines + p * panel_stride, quads, sums + p * 16, stride);
  }
};

// clang-format off
#include "linear_kernel.h"
#include "int8_linear_kernel.h"
// clang-format on

}  // namespace
}  // namespace avx2

const LinearKernel* int8_linear_avx2() { return avx2::kKernels; }

}  // namespace lissom
