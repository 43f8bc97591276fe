// int4 linear with AVX-512 VNNI.
//
// vpdpbusd multiplies unsigned weights (nibbles, or table entries + 128) by signed activations and adds four
// products into int32. Zero is code 8 (or 128): a segment's sum begins with -8 * (sum of its activations).
// The arithmetic per row is that of int8; the weights take half the bytes.
#include <cstdint>

#include "int4_linear.h"
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
#include "linear_kernel.h"
#include "int4_span.h"
// clang-format on

inline __m512i low_nibbles(__m512i line) { return _mm512_and_si512(line, _mm512_set1_epi8(15)); }
inline __m512i high_nibbles(__m512i line) { return low_nibbles(_mm512_srli_epi16(line, 4)); }

// 4 x 4 transposition of 32-bit elements within each 128-bit lane: element j of x[i] becomes element i of
// x[j].
inline void transpose_lanes(__m512i* x) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi64(a, c);
  x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d);
  x[3] = _mm512_unpackhi_epi64(b, d);
}

// What nibbles and codebooks have in common: all but how a line becomes bytes.
struct Quantized {
  using Stored = uint8_t;
  using Prepared = uint8_t;
  static constexpr int kStoreRows = 4;
  // 6 rows * 2 panels: 12 sums and as many in float, 4 weights, 1 broadcast, 1 mask of the 32 registers. (12
  // * 2, with the float sums in memory: 5 % slower, 15 % with groups of 32.) But 7 to 12 rows alone are one
  // pass over the weights.
  static constexpr int kRowTile = 6, kMostRows = 12, kPanelTile = 2;
  // 16 KiB of expanded weights of two panels, 6 KiB of activations per row tile.
  static constexpr int kBlockK = 512;
  static constexpr int kPreparedSize = kBlockK * kPanel * kPanelTile;
  static constexpr int64_t kParallelWork = 2 << 20;

  template <int kRows>
  static void store_quads(const I16* q, uint8_t* out, int64_t quad_bytes) {
    __m128i bytes[kRows];
    for (int r = 0; r < kRows; ++r) bytes[r] = _mm512_cvtepi32_epi8(q[r].v);
    store_byte_quads<kRows>(bytes, out, quad_bytes, 4);
  }

  // Prepared bytes are [panel][quad][16 outputs][4].
  template <int kRows, int kPanels, bool kPrepared, bool kOffsets>
  __attribute__((noinline)) static void tile(const SpanRows<uint8_t>& x, const Int4Span& span, bool first,
                                             float* sums, const uint8_t* prepared) {
    // Small tiles have too few sums to keep two multipliers busy: split each over several quads. Their float
    // sums fit the registers too.
    constexpr int kSplit = kRows * kPanels <= 2 ? 4 : kRows * kPanels <= 6 ? 2 : 1;
    constexpr bool kKeep = kRows * kPanels <= 12;
    const int64_t apart = kPrepared ? span.k() * kPanel : span.panel_stride;
    const int64_t segments = span.segments;
    const uint8_t *a = x.a, *head = span.segment;
    const int32_t* begins = x.begin;
    const float* x_sums = x.sum;
    __m512 kept[kRows][kPanels];
    if (kKeep) {
      unroll<kRows>([&](auto r) LISSOM_INLINE {
        unroll<kPanels>([&](auto p) LISSOM_INLINE {
          kept[r][p] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (r * kPanels + p) * kPanel);
        });
      });
    }
    for (int64_t s = 0; s < segments; ++s) {
      __m512i acc[kSplit][kRows][kPanels];
      unroll<kRows>([&](auto r) LISSOM_INLINE {
        const __m512i begin = _mm512_set1_epi32(begins[r]);
        unroll<kPanels>([&](auto p) LISSOM_INLINE {
          acc[0][r][p] = begin;
          unroll_from<1, kSplit>([&](auto i) LISSOM_INLINE { acc[i][r][p] = _mm512_setzero_si512(); });
        });
      });
      const uint8_t* lines = kPrepared ? prepared : head + span.blocks_at;
      const int pairs = span.segment_blocks(s) * 2;  // of lines: 4 quads
      for (int i = 0; i < pairs; ++i) {
        unroll<2>([&](auto line) LISSOM_INLINE {
          __m512i w[2][kPanels];
          unroll<kPanels>([&](auto p) LISSOM_INLINE {
            if (kPrepared) {
              w[0][p] = load_line(lines + p * apart);
              w[1][p] = load_line(lines + p * apart + kLine);
            } else {
              const __m512i nibbles = load_line(lines + p * apart);
              w[0][p] = low_nibbles(nibbles);
              w[1][p] = high_nibbles(nibbles);
              if (kRows != kRowTile) _mm_prefetch(lines + p * apart + 2048, _MM_HINT_T0);
            }
          });
          unroll<2>([&](auto q) LISSOM_INLINE {
            constexpr int kAcc = (line * 2 + q) % kSplit;
            unroll<kRows>([&](auto r) LISSOM_INLINE {
              const __m512i quad = broadcast_quad(a + (q * kRows + r) * kQuad);
              unroll<kPanels>([&](auto p) LISSOM_INLINE { dot(acc[kAcc][r][p], w[q][p], quad); });
            });
          });
          a += 2 * kRows * kQuad;
          lines += kPrepared ? 2 * kLine : kLine;
        });
      }
      if (kPrepared) prepared = lines;

      unroll<kPanels>([&](auto p) LISSOM_INLINE {
        const float* scales = reinterpret_cast<const float*>(head + p * span.panel_stride);
        const __m512 scale = _mm512_loadu_ps(scales);
        const __m512 offset = kOffsets ? _mm512_loadu_ps(scales + kPanel) : scale;
        unroll<kRows>([&](auto r) LISSOM_INLINE {
          __m512i total = acc[0][r][p];
          unroll_from<1, kSplit>([&](auto i)
                                     LISSOM_INLINE { total = _mm512_add_epi32(total, acc[i][r][p]); });
          float* to = sums + (r * kPanels + p) * kPanel;
          __m512 y = kKeep ? kept[r][p] : (first && s == 0) ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
          y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, y);
          if (kOffsets) y = _mm512_fmadd_ps(_mm512_set1_ps(x_sums[r]), offset, y);
          if (kKeep) {
            kept[r][p] = y;
          } else {
            _mm512_storeu_ps(to, y);
          }
        });
      });
      head += span.segment_stride;
      begins += kRows;
      x_sums += kRows;
    }
    if (kKeep) {
      unroll<kRows>([&](auto r) LISSOM_INLINE {
        unroll<kPanels>(
            [&](auto p) LISSOM_INLINE { _mm512_storeu_ps(sums + (r * kPanels + p) * kPanel, kept[r][p]); });
      });
    }
  }

  template <bool kPrepared, bool kOffsets>
  static void tiles(const SpanRows<uint8_t>& x, const Int4Span& span, bool first, float* sums,
                    const uint8_t* prepared) {
    with_count<12>(x.rows, [&](auto rows) {
      if (span.panels == 2) {
        tile<rows, 2, kPrepared, kOffsets>(x, span, first, sums, prepared);
      } else {
        tile<rows, 1, kPrepared, kOffsets>(x, span, first, sums, prepared);
      }
    });
  }
};

struct Nibbles : Quantized {
  static constexpr int kZero = kInt4Zero;
  static bool prepares(const Int4Layout&, int64_t rows) { return rows >= 240000; }

  static void prepare(const Int4Span& span, uint8_t* to) {
    for (int p = 0; p < span.panels; ++p) {
      for (int64_t s = 0; s < span.segments; ++s) {
        const uint8_t* from = span.lines(p, s);
        for (int i = 0; i < span.segment_blocks(s) * 4; ++i, from += kLine, to += 2 * kLine) {
          const __m512i line = load_line(from);
          _mm512_storeu_si512(to, low_nibbles(line));
          _mm512_storeu_si512(to + kLine, high_nibbles(line));
        }
      }
    }
  }

  static void multiply(const SpanRows<uint8_t>& x, const Int4Span& span, bool first, float* sums,
                       const uint8_t* prepared) {
    if (span.layout.has_zero) {
      prepared ? tiles<true, true>(x, span, first, sums, prepared)
               : tiles<false, true>(x, span, first, sums, nullptr);
    } else {
      prepared ? tiles<true, false>(x, span, first, sums, prepared)
               : tiles<false, false>(x, span, first, sums, nullptr);
    }
  }
};

struct Table : Quantized {
  static constexpr int kZero = kInt4TableZero;
  static bool prepares(const Int4Layout&, int64_t rows) { return rows > 1; }

  // Line i has outputs 4l + i: after the look-up a transposition of the block's four lines gives, for each
  // quad, the 16 outputs in order.
  static void prepare(const Int4Span& span, uint8_t* to) {
    for (int p = 0; p < span.panels; ++p) {
      for (int64_t s = 0; s < span.segments; ++s) {
        const uint8_t *tables = span.tables(p, s), *lines = span.lines(p, s);
        __m512i table[4];
        unroll<4>([&](auto i) LISSOM_INLINE { table[i] = load_line(tables + i * kLine); });
        for (int b = 0; b < span.segment_blocks(s); ++b, lines += kInt4BlockBytes, to += 8 * kLine) {
          __m512i quads[8];
          unroll<4>([&](auto i) LISSOM_INLINE {
            const __m512i line = load_line(lines + i * kLine);
            quads[i] = _mm512_shuffle_epi8(table[i], low_nibbles(line));
            quads[4 + i] = _mm512_shuffle_epi8(table[i], high_nibbles(line));
          });
          transpose_lanes(quads);
          transpose_lanes(quads + 4);
          unroll<8>([&](auto q) LISSOM_INLINE { _mm512_storeu_si512(to + q * kLine, quads[q]); });
        }
      }
    }
  }

  // One row: no transposition of weights. A 128-bit lane of a line is one output, so its products with 16
  // activations stay in the lane, and only a segment's sums are transposed.
  __attribute__((noinline)) static void one_row(const SpanRows<uint8_t>& x, const Int4Span& span, int panel,
                                                bool first, float* sums) {
    const __m128i* a = reinterpret_cast<const __m128i*>(x.a);
    __m512 y = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums);
    for (int64_t s = 0; s < span.segments; ++s) {
      const int blocks = span.segment_blocks(s);
      const uint8_t *tables = span.tables(panel, s), *lines = span.lines(panel, s);
      __m512i table[4], sum[2][4];
      unroll<4>([&](auto i) LISSOM_INLINE {
        table[i] = load_line(tables + i * kLine);
        sum[0][i] = sum[1][i] = _mm512_setzero_si512();
      });
      for (int b = 0; b < blocks; ++b, a += 2, lines += kInt4BlockBytes) {
        const __m512i low = _mm512_broadcast_i32x4(_mm_loadu_si128(a));
        const __m512i high = _mm512_broadcast_i32x4(_mm_loadu_si128(a + 1));
        unroll<4>([&](auto i) LISSOM_INLINE {
          const __m512i line = load_line(lines + i * kLine);
          _mm_prefetch(lines + i * kLine + 2048, _MM_HINT_T0);
          dot(sum[0][i], _mm512_shuffle_epi8(table[i], low_nibbles(line)), low);
          dot(sum[1][i], _mm512_shuffle_epi8(table[i], high_nibbles(line)), high);
        });
      }
      unroll<4>([&](auto i) LISSOM_INLINE { sum[0][i] = _mm512_add_epi32(sum[0][i], sum[1][i]); });
      transpose_lanes(sum[0]);
      const __m512i total =
          _mm512_add_epi32(_mm512_add_epi32(sum[0][0], sum[0][1]), _mm512_add_epi32(sum[0][2], sum[0][3]));
      const __m512i exact = _mm512_add_epi32(total, _mm512_set1_epi32(x.begin[s]));
      y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), _mm512_loadu_ps(span.scales(panel, s)), y);
    }
    _mm512_storeu_ps(sums, y);
  }

  static void multiply(const SpanRows<uint8_t>& x, const Int4Span& span, bool first, float* sums,
                       const uint8_t* prepared) {
    if (x.rows == 1) {
      for (int p = 0; p < span.panels; ++p) one_row(x, span, p, first, sums + p * kPanel);
    } else {
      tiles<true, false>(x, span, first, sums, prepared);
    }
  }
};

// Weight-only: as in int4_linear_avx2.cpp, with 12 x 32 tiles.
struct Float {
  using Stored = float;
  using Prepared = float;
  static constexpr int kRowTile = 12, kPanelTile = 4, kBlockK = 256;
  static constexpr int kPreparedSize = kBlockK * kPanel * kPanelTile;
  static constexpr int64_t kParallelWork = 1 << 19;
  static bool prepares(const Int4Layout& layout, int64_t rows) {
    return rows >= 6 || layout.scope != TableScope::kNone;
  }

  // Weights for the k-value whose code lies kShift bits up in each lane. The look-up minds only the low 4
  // bits of an index, which spares masking, subtracting and converting.
  template <int kShift>
  static __m512 weight(__m512i line, __m512 scale, __m512 offset) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i index = kShift ? _mm512_srli_epi32(line, kShift) : line;
    return _mm512_fmadd_ps(_mm512_permutexvar_ps(index, values), scale, offset);
  }
  static __m512 offsets(const Int4Span& span, int p, int64_t s) {
    return span.layout.has_zero ? _mm512_loadu_ps(span.offsets(p, s)) : _mm512_setzero_ps();
  }

  // [panel][k][16 outputs]
  static void prepare(const Int4Span& span, float* to) {
    for (int p = 0; p < span.panels; ++p) {
      for (int64_t s = 0; s < span.segments; ++s) {
        const int blocks = span.segment_blocks(s);
        if (span.layout.scope == TableScope::kNone) {
          prepare_nibbles(span, p, s, to);
        } else {
          prepare_table(span, p, s, to);
        }
        to += blocks * kInt4Block * kPanel;
      }
    }
  }

  static void prepare_nibbles(const Int4Span& span, int p, int64_t s, float* to) {
    const uint8_t* lines = span.lines(p, s);
    const __m512 scale = _mm512_loadu_ps(span.scales(p, s)), offset = offsets(span, p, s);
    for (int i = 0; i < span.segment_blocks(s) * 4; ++i, lines += kLine, to += 8 * kPanel) {
      const __m512i line = load_line(lines);
      unroll<8>([&](auto k) LISSOM_INLINE {
        constexpr int kShift = 8 * (k % 4) + 4 * (k / 4);
        _mm512_store_ps(to + k * kPanel, weight<kShift>(line, scale, offset));
      });
    }
  }

  static void prepare_table(const Int4Span& span, int p, int64_t s, float* to) {
    const uint8_t *tables = span.tables(p, s), *lines = span.lines(p, s);
    const __m512 scale = _mm512_loadu_ps(span.scales(p, s));
    for (int b = 0; b < span.segment_blocks(s); ++b, lines += kInt4BlockBytes, to += kInt4Block * kPanel) {
      for (int high = 0; high < 2; ++high) {
        __m512i words[4][4];  // [4 k-values][line]
        unroll<4>([&](auto i) LISSOM_INLINE {
          const __m512i line = load_line(lines + i * kLine);
          const __m512i index = high ? high_nibbles(line) : low_nibbles(line);
          __m512i byte[4];
          unroll<4>([&](auto plane) LISSOM_INLINE {
            byte[plane] = _mm512_shuffle_epi8(load_line(tables + (plane * 4 + i) * kLine), index);
          });
          const __m512i low01 = _mm512_unpacklo_epi8(byte[0], byte[1]);
          const __m512i high01 = _mm512_unpackhi_epi8(byte[0], byte[1]);
          const __m512i low23 = _mm512_unpacklo_epi8(byte[2], byte[3]);
          const __m512i high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
          words[0][i] = _mm512_unpacklo_epi16(low01, low23);
          words[1][i] = _mm512_unpackhi_epi16(low01, low23);
          words[2][i] = _mm512_unpacklo_epi16(high01, high23);
          words[3][i] = _mm512_unpackhi_epi16(high01, high23);
        });
        unroll<4>([&](auto m) LISSOM_INLINE {
          transpose_lanes(words[m]);
          unroll<4>([&](auto j) LISSOM_INLINE {
            _mm512_store_ps(to + (16 * high + 4 * m + j) * kPanel,
                            _mm512_mul_ps(_mm512_castsi512_ps(words[m][j]), scale));
          });
        });
      }
    }
  }

  template <int kRows, int kPanels>
  __attribute__((noinline)) static void direct(const SpanRows<float>& x, const Int4Span& span, int panel,
                                               float* sums, int stride) {
    __m512 acc[kRows][kPanels];
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      unroll<kPanels>([&](auto p)
                          LISSOM_INLINE { acc[r][p] = _mm512_loadu_ps(sums + r * stride + p * kPanel); });
    });
    const float* a = x.a;
    for (int64_t s = 0; s < span.segments; ++s) {
      const uint8_t* lines = span.lines(panel, s);
      __m512 scale[kPanels], offset[kPanels];
      unroll<kPanels>([&](auto p) LISSOM_INLINE {
        scale[p] = _mm512_loadu_ps(span.scales(panel + p, s));
        offset[p] = offsets(span, panel + p, s);
      });
      for (int i = 0; i < span.segment_blocks(s) * 4; ++i, lines += kLine, a += 8 * kRows) {
        __m512i line[kPanels];
        unroll<kPanels>([&](auto p) LISSOM_INLINE { line[p] = load_line(lines + p * span.panel_stride); });
        unroll<8>([&](auto k) LISSOM_INLINE {
          constexpr int kShift = 8 * (k % 4) + 4 * (k / 4);
          unroll<kPanels>([&](auto p) LISSOM_INLINE {
            const __m512 w = weight<kShift>(line[p], scale[p], offset[p]);
            unroll<kRows>([&](auto r) LISSOM_INLINE { dot(acc[r][p], _mm512_set1_ps(a[k * kRows + r]), w); });
          });
        });
      }
    }
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      unroll<kPanels>([&](auto p)
                          LISSOM_INLINE { _mm512_storeu_ps(sums + r * stride + p * kPanel, acc[r][p]); });
    });
  }

  static void multiply(const SpanRows<float>& x, const Int4Span& span, bool first, float* sums,
                       const float* prepared) {
    const int stride = span.panels * kPanel;
    if (first) __builtin_memset(sums, 0, sizeof(float) * x.rows * stride);
    if (prepared) return float_tiles(x.a, x.rows, prepared, span.k() * kPanel, span.panels, span.k(), sums);
    with_count<5>(x.rows, [&](auto rows) {
      if (span.panels == 4) return direct<rows, 4>(x, span, 0, sums, stride);
      for (int p = 0; p < span.panels; ++p) direct<rows, 1>(x, span, p, sums + p * kPanel, stride);
    });
  }
};

#include "int4_linear_kernel.h"

}  // namespace
}  // namespace avx512vnni

const LinearKernel* int4_linear_avx512vnni() { return avx512vnni::kKernels; }

}  // namespace lissom
