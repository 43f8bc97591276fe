// int4 linear with AVX2 and FMA.
//
// Nibbles. vpmaddubsw multiplies unsigned weights (0..15) by signed activations (±127) and adds pairs: at
// most 2 * 15 * 127 = 3810, so the results of eight quads add up in 16 bits (30480 < 32768) before one
// vpmaddwd by ones widens them. Per row and 64 multiply-adds that is 2 vpmaddubsw and 2 vpaddw, half of what
// int8 takes. Zero is code 8: a segment's sum begins with -8 * (sum of its activations).
//
// Codebook. vpshufb looks up 32 signed bytes at once; from there on it is int8's exact route, on int16.
#include <immintrin.h>

#include <cstdint>

#include "int4_linear.h"

namespace lissom {
namespace avx2 {
namespace {

#include "simd_avx2.h"
// clang-format off
#include "activation.h"
#include "unroll.h"
#include "tiles_avx2.h"
#include "byte_quads.h"
#include "linear_kernel.h"
#include "int4_span.h"
// clang-format on

inline __m256i low_nibbles(__m256i line) { return _mm256_and_si256(line, _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(__m256i line) { return low_nibbles(_mm256_srli_epi16(line, 4)); }
inline void store_line(void* p, __m256i line) { _mm256_storeu_si256(static_cast<__m256i*>(p), line); }

// One row's step: sums of pairs += weights (unsigned) * the quad at p (signed). In assembly for the reason
// given in tiles_avx2.h.
LISSOM_INLINE inline void dot_bytes(__m256i& low, __m256i& high, const int8_t* p, __m256i low_weights,
                                    __m256i high_weights) {
  __m256i x, product;
  __asm__(
      "vpbroadcastd %[quad], %[x]\n\t"
      "vpmaddubsw %[x], %[low_weights], %[product]\n\t"
      "vpmaddubsw %[x], %[high_weights], %[x]\n\t"
      "vpaddw %[product], %[low], %[low]\n\t"
      "vpaddw %[x], %[high], %[high]"
      : [low] "+x"(low), [high] "+x"(high), [x] "=&x"(x), [product] "=&x"(product)
      : [low_weights] "x"(low_weights), [high_weights] "x"(high_weights),
        [quad] "m"(*reinterpret_cast<const int8_t (*)[4]>(p)));
}

struct Nibbles {
  using Stored = int8_t;
  using Prepared = uint8_t;
  static constexpr int kStoreRows = 4, kZero = kInt4Zero;
  // 6 rows * 16 outputs: 12 sums of pairs, 2 weights, 1 broadcast, 1 product = 16 registers.
  static constexpr int kRowTile = 6, kMostRows = 6, kPanelTile = 1;
  // 8 KiB of expanded weights, 3 KiB of activations per row tile.
  static constexpr int kBlockK = 512;
  static constexpr int kPreparedSize = kBlockK * kPanel;
  static constexpr int64_t kParallelWork = 2 << 20;
  static bool prepares(const Int4Layout&, int64_t rows) { return rows >= 12; }

  template <int kRows>
  static void store_quads(const I16* q, uint8_t* out, int64_t quad_bytes) {
    __m128i bytes[kRows];
    for (int r = 0; r < kRows; ++r) bytes[r] = to_bytes(q[r]);
    store_byte_quads<kRows>(bytes, out, quad_bytes, 4);
  }

  // [quad][16 outputs][4]
  static void prepare(const Int4Span& span, uint8_t* to) {
    for (int64_t s = 0; s < span.segments; ++s) {
      const uint8_t* from = span.lines(0, s);
      for (int i = 0; i < span.segment_blocks(s) * 4; ++i, from += kLine, to += 2 * kLine) {
        const __m256i a = load_line(from), b = load_line(from + 32);
        store_line(to, low_nibbles(a));
        store_line(to + 32, low_nibbles(b));
        store_line(to + 64, high_nibbles(a));
        store_line(to + 96, high_nibbles(b));
      }
    }
  }

  template <int kRows, bool kPrepared, bool kOffsets>
  __attribute__((noinline)) static void tile(const SpanRows<int8_t>& x, const Int4Span& span, bool first,
                                             float* sums, const uint8_t* prepared) {
    const __m256i ones = _mm256_set1_epi16(1);
    const int64_t segments = span.segments;
    const int8_t* a = x.a;
    const uint8_t* head = span.segment;
    const int32_t* begins = x.begin;
    const float* x_sums = x.sum;
    for (int64_t s = 0; s < segments; ++s) {
      const int blocks = span.segment_blocks(s);
      const uint8_t* lines = kPrepared ? prepared : head + span.blocks_at;
      alignas(32) int32_t total[kRows * kPanel] = {};  // of the blocks before the last
      __m256i acc[kRows][2];
      unroll<kRows>([&](auto r) LISSOM_INLINE { acc[r][0] = acc[r][1] = _mm256_setzero_si256(); });
      for (int b = 0; b < blocks; ++b) {
        if (b > 0) {
          unroll<kRows>([&](auto r) LISSOM_INLINE {
            unroll<2>([&](auto h) LISSOM_INLINE {
              __m256i* to = reinterpret_cast<__m256i*>(total + r * kPanel + h * 8);
              *to = _mm256_add_epi32(_mm256_madd_epi16(acc[r][h], ones), *to);
              acc[r][h] = _mm256_setzero_si256();
            });
          });
        }
        for (int i = 0; i < 4; ++i) {
          if (!kPrepared) _mm_prefetch(lines + 1024, _MM_HINT_T0);
          // A line is loaded twice: four registers of weights would spill the sums of 6 rows.
          unroll<2>([&](auto q) LISSOM_INLINE {
            const uint8_t* from = kPrepared ? lines + q * kLine : lines;
            __m256i low = load_line(from), high = load_line(from + 32);
            if (!kPrepared) {
              low = q ? high_nibbles(low) : low_nibbles(low);
              high = q ? high_nibbles(high) : low_nibbles(high);
            }
            unroll<kRows>([&](auto r) LISSOM_INLINE {
              dot_bytes(acc[r][0], acc[r][1], a + (q * kRows + r) * kQuad, low, high);
            });
          });
          a += 2 * kRows * kQuad;
          lines += kPrepared ? 2 * kLine : kLine;
        }
      }
      if (kPrepared) prepared = lines;
      const float* scales = reinterpret_cast<const float*>(head);
      const bool begin = first && s == 0;
      unroll<kRows>([&](auto r) LISSOM_INLINE {
        const __m256i zero = _mm256_set1_epi32(begins[r]);
        unroll<2>([&](auto h) LISSOM_INLINE {
          __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(acc[r][h], ones), zero);
          if (blocks > 1)
            sum = _mm256_add_epi32(sum, *reinterpret_cast<const __m256i*>(total + r * kPanel + h * 8));
          float* to = sums + r * kPanel + h * 8;
          __m256 y = begin ? _mm256_setzero_ps() : _mm256_loadu_ps(to);
          y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(scales + h * 8), y);
          if (kOffsets) {
            y = _mm256_fmadd_ps(_mm256_set1_ps(x_sums[r]), _mm256_loadu_ps(scales + kPanel + h * 8), y);
          }
          _mm256_storeu_ps(to, y);
        });
      });
      head += span.segment_stride;
      begins += kRows;
      x_sums += kRows;
    }
  }

  static void multiply(const SpanRows<int8_t>& x, const Int4Span& span, bool first, float* sums,
                       const uint8_t* prepared) {
    with_count<6>(x.rows, [&](auto rows) {
      if (span.layout.has_zero) {
        prepared ? tile<rows, true, true>(x, span, first, sums, prepared)
                 : tile<rows, false, true>(x, span, first, sums, nullptr);
      } else {
        prepared ? tile<rows, true, false>(x, span, first, sums, prepared)
                 : tile<rows, false, false>(x, span, first, sums, nullptr);
      }
    });
  }
};

// 4 x 4 transposition of 32-bit elements within each 128-bit lane: element j of x[i] becomes element i of
// x[j].
inline void transpose_lanes(__m256i* x) {
  const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
  const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm256_unpacklo_epi64(a, c);
  x[1] = _mm256_unpackhi_epi64(a, c);
  x[2] = _mm256_unpacklo_epi64(b, d);
  x[3] = _mm256_unpackhi_epi64(b, d);
}

struct Table {
  using Stored = int16_t;
  using Prepared = int16_t;
  static constexpr int kStoreRows = 2, kZero = 0;
  static constexpr int kRowTile = 6, kMostRows = 6, kPanelTile = 1;
  // 16 KiB of expanded weights, 6 KiB of activations per row tile.
  static constexpr int kBlockK = 512;
  static constexpr int kPreparedSize = kBlockK * kPanel;
  static constexpr int64_t kParallelWork = 1 << 20;
  static bool prepares(const Int4Layout&, int64_t rows) { return rows > 1; }

  // A tile of one row is stored in bytes, for one_row: per 16 k-values, q and then |q|.
  template <int kRows>
  static void store_quads(const I16* q, uint8_t* out, int64_t quad_bytes) {
    if (kRows == 1 && quad_bytes == kQuad * static_cast<int64_t>(sizeof(Stored))) {
      const __m128i bytes = to_bytes(q[0]);
      store_line(out, _mm256_setr_m128i(bytes, _mm_abs_epi8(bytes)));
      return;
    }
    __m256i words[kRows];
    for (int r = 0; r < kRows; ++r) words[r] = pair_order(q[r]);
    store_word_quads<kRows>(words, out, quad_bytes, 4);
  }

  // Half h of a line has outputs 4l + i for l = 2h, 2h + 1: after the look-up a transposition of the block's
  // four lines gives, for each quad, outputs 8h … 8h + 7 in order.
  static void prepare(const Int4Span& span, int16_t* to) {
    const __m256i zero = _mm256_set1_epi8(static_cast<char>(kInt4TableZero));
    for (int64_t s = 0; s < span.segments; ++s) {
      const uint8_t *tables = span.tables(0, s), *lines = span.lines(0, s);
      __m256i table[2][4];
      unroll<2>([&](auto h) LISSOM_INLINE {
        unroll<4>([&](auto i) LISSOM_INLINE {
          table[h][i] = _mm256_xor_si256(load_line(tables + i * kLine + h * 32), zero);
        });
      });
      for (int b = 0; b < span.segment_blocks(s); ++b, lines += kInt4BlockBytes, to += 8 * kLine) {
        __m256i quads[2][8];  // of each half, quads 0-3 and 4-7
        unroll<2>([&](auto h) LISSOM_INLINE {
          unroll<4>([&](auto i) LISSOM_INLINE {
            const __m256i line = load_line(lines + i * kLine + h * 32);
            quads[h][i] = _mm256_shuffle_epi8(table[h][i], low_nibbles(line));
            quads[h][4 + i] = _mm256_shuffle_epi8(table[h][i], high_nibbles(line));
          });
          transpose_lanes(quads[h]);
          transpose_lanes(quads[h] + 4);
        });
        unroll<8>([&](auto q) LISSOM_INLINE { store_pairs(quads[0][q], quads[1][q], to + q * kLine); });
      }
    }
  }

  template <int kRows>
  __attribute__((noinline)) static void tile(const SpanRows<int16_t>& x, const Int4Span& span, bool first,
                                             float* sums, const int16_t* w) {
    const int16_t* a = x.a;
    for (int64_t s = 0; s < span.segments; ++s) {
      __m256i acc[kRows][2];
      unroll<kRows>([&](auto r) LISSOM_INLINE { acc[r][0] = acc[r][1] = _mm256_setzero_si256(); });
      const int64_t quads = span.segment_blocks(s) * (kInt4Block / kQuad);
      for (int64_t i = 0; i < quads; ++i, a += kRows * kQuad, w += kLine) {
        unroll<2>([&](auto half) LISSOM_INLINE {  // even pair, odd pair
          const __m256i low = load_line(w + half * 32), high = load_line(w + half * 32 + 16);
          unroll<kRows>(
              [&](auto r) LISSOM_INLINE { dot(acc[r][0], acc[r][1], a + r * kQuad + half * 2, low, high); });
        });
      }
      const bool begin = first && s == 0;
      unroll<kRows>([&](auto r) LISSOM_INLINE {
        unroll<2>([&](auto h) LISSOM_INLINE {
          float* to = sums + r * kPanel + h * 8;
          const __m256 y = begin ? _mm256_setzero_ps() : _mm256_loadu_ps(to);
          const __m256 scale = _mm256_loadu_ps(span.scales(0, s) + h * 8);
          _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][h]), scale, y));
        });
      });
    }
  }

  // One row: no transposition of weights. A 128-bit lane of a line is one output, so its products with 16
  // activations stay in the lane, and only a segment's sums are transposed. vpmaddubsw of |x| by w with the
  // sign of x cannot saturate (2 * 127 * 127 < 2^15).
  __attribute__((noinline)) static void one_row(const SpanRows<int16_t>& x, const Int4Span& span, bool first,
                                                float* sums) {
    const __m256i ones = _mm256_set1_epi16(1), zero = _mm256_set1_epi8(static_cast<char>(kInt4TableZero));
    const __m128i* a = reinterpret_cast<const __m128i*>(x.a);
    __m256 y[2];
    for (int h = 0; h < 2; ++h) y[h] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + h * 8);
    for (int64_t s = 0; s < span.segments; ++s) {
      const int blocks = span.segment_blocks(s);
      const uint8_t *tables = span.tables(0, s), *lines = span.lines(0, s);
      unroll<2>([&](auto h) LISSOM_INLINE {
        __m256i total[4];
        unroll<4>([&](auto i) LISSOM_INLINE {
          const __m256i table = _mm256_xor_si256(load_line(tables + i * kLine + h * 32), zero);
          __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
          for (int b = 0; b < blocks; ++b) {
            const __m256i line = load_line(lines + b * kInt4BlockBytes + i * kLine + h * 32);
            unroll<2>([&](auto high) LISSOM_INLINE {
              const __m256i w = _mm256_shuffle_epi8(table, high ? high_nibbles(line) : low_nibbles(line));
              const __m256i q = _mm256_broadcastsi128_si256(a[4 * b + 2 * high]);
              const __m256i magnitude = _mm256_broadcastsi128_si256(a[4 * b + 2 * high + 1]);
              const __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(w, q));
              sum[high] = _mm256_add_epi32(sum[high], _mm256_madd_epi16(products, ones));
            });
          }
          total[i] = _mm256_add_epi32(sum[0], sum[1]);
        });
        transpose_lanes(total);
        const __m256i sum =
            _mm256_add_epi32(_mm256_add_epi32(total[0], total[1]), _mm256_add_epi32(total[2], total[3]));
        y[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(span.scales(0, s) + h * 8), y[h]);
      });
      for (int i = 0; i < blocks * kInt4BlockBytes; i += kLine) _mm_prefetch(lines + 2048 + i, _MM_HINT_T0);
      a += 4 * blocks;
    }
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(sums + h * 8, y[h]);
  }

  static void multiply(const SpanRows<int16_t>& x, const Int4Span& span, bool first, float* sums,
                       const int16_t* prepared) {
    if (x.rows == 1) return one_row(x, span, first, sums);
    with_count<6>(x.rows, [&](auto rows) { tile<rows>(x, span, first, sums, prepared); });
  }
};

// Weight-only: weights of a block become floats in L1, then 6 x 16 FMA tiles. Each output is one chain of
// fused multiply-adds over k in order, whatever the tile, so all ISAs give the same bits.
struct Float {
  using Stored = float;
  using Prepared = float;
  static constexpr int kRowTile = 6, kPanelTile = 4, kBlockK = 256;
  static constexpr int kPreparedSize = kBlockK * kPanel * kPanelTile;
  static constexpr int64_t kParallelWork = 1 << 19;
  static bool prepares(const Int4Layout& layout, int64_t rows) {
    return rows >= 6 || layout.scope != TableScope::kNone;
  }

  // Weights of 8 outputs for the k-value whose signed nibble is `shift` bits below the top of each lane.
  template <int kShift>
  static __m256 weight(__m256i line, __m256 scale, __m256 offset) {
    const __m256i q = _mm256_srai_epi32(kShift ? _mm256_slli_epi32(line, kShift) : line, 28);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(q), scale, offset);
  }
  // Codes as signed nibbles: their top bits flipped.
  static __m256i signed_nibbles(const uint8_t* p) {
    return _mm256_xor_si256(load_line(p), _mm256_set1_epi8(static_cast<char>(0x88)));
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
    __m256 scale[2], offset[2];
    unroll<2>([&](auto h) LISSOM_INLINE {
      scale[h] = _mm256_loadu_ps(span.scales(p, s) + h * 8);
      offset[h] = span.layout.has_zero ? _mm256_loadu_ps(span.offsets(p, s) + h * 8) : _mm256_setzero_ps();
    });
    for (int i = 0; i < span.segment_blocks(s) * 4; ++i, lines += kLine, to += 8 * kPanel) {
      unroll<2>([&](auto h) LISSOM_INLINE {
        const __m256i line = signed_nibbles(lines + h * 32);
        unroll<8>([&](auto k) LISSOM_INLINE {
          constexpr int kShift = 28 - 8 * (k % 4) - 4 * (k / 4);
          _mm256_store_ps(to + k * kPanel + h * 8, weight<kShift>(line, scale[h], offset[h]));
        });
      });
    }
  }

  // The four bytes of each float are looked up apart and interleaved; then, for 4 consecutive k-values at a
  // time, the outputs of the block's four lines are transposed into order.
  static void prepare_table(const Int4Span& span, int p, int64_t s, float* to) {
    const uint8_t *tables = span.tables(p, s), *lines = span.lines(p, s);
    for (int b = 0; b < span.segment_blocks(s); ++b, lines += kInt4BlockBytes, to += kInt4Block * kPanel) {
      for (int h = 0; h < 2; ++h) {
        const __m256 scale = _mm256_loadu_ps(span.scales(p, s) + h * 8);
        for (int high = 0; high < 2; ++high) {
          __m256i words[4][4];  // [4 k-values][line]
          unroll<4>([&](auto i) LISSOM_INLINE {
            const __m256i line = load_line(lines + i * kLine + h * 32);
            const __m256i index = high ? high_nibbles(line) : low_nibbles(line);
            __m256i byte[4];
            unroll<4>([&](auto plane) LISSOM_INLINE {
              byte[plane] = _mm256_shuffle_epi8(load_line(tables + (plane * 4 + i) * kLine + h * 32), index);
            });
            const __m256i low01 = _mm256_unpacklo_epi8(byte[0], byte[1]);
            const __m256i high01 = _mm256_unpackhi_epi8(byte[0], byte[1]);
            const __m256i low23 = _mm256_unpacklo_epi8(byte[2], byte[3]);
            const __m256i high23 = _mm256_unpackhi_epi8(byte[2], byte[3]);
            words[0][i] = _mm256_unpacklo_epi16(low01, low23);
            words[1][i] = _mm256_unpackhi_epi16(low01, low23);
            words[2][i] = _mm256_unpacklo_epi16(high01, high23);
            words[3][i] = _mm256_unpackhi_epi16(high01, high23);
          });
          unroll<4>([&](auto m) LISSOM_INLINE {
            transpose_lanes(words[m]);
            unroll<4>([&](auto j) LISSOM_INLINE {
              float* out = to + (16 * high + 4 * m + j) * kPanel + h * 8;
              _mm256_store_ps(out, _mm256_mul_ps(_mm256_castsi256_ps(words[m][j]), scale));
            });
          });
        }
      }
    }
  }

  // Few rows: weights straight from the line; several panels in flight hide the latency of the chains.
  template <int kRows, int kPanels>
  __attribute__((noinline)) static void direct(const SpanRows<float>& x, const Int4Span& span, int panel,
                                               float* sums, int stride) {
    __m256 acc[kRows][kPanels][2];
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      unroll<kPanels>([&](auto p) LISSOM_INLINE {
        acc[r][p][0] = _mm256_loadu_ps(sums + r * stride + p * kPanel);
        acc[r][p][1] = _mm256_loadu_ps(sums + r * stride + p * kPanel + 8);
      });
    });
    const float* a = x.a;
    for (int64_t s = 0; s < span.segments; ++s) {
      const uint8_t* lines = span.lines(panel, s);
      for (int i = 0; i < span.segment_blocks(s) * 4; ++i, lines += kLine, a += 8 * kRows) {
        unroll<kPanels>([&](auto p) LISSOM_INLINE {
          const uint8_t* line_of = lines + p * span.panel_stride;
          unroll<2>([&](auto h) LISSOM_INLINE {
            const __m256i line = signed_nibbles(line_of + h * 32);
            const __m256 scale = _mm256_loadu_ps(span.scales(panel + p, s) + h * 8);
            const __m256 offset = span.layout.has_zero ? _mm256_loadu_ps(span.offsets(panel + p, s) + h * 8)
                                                       : _mm256_setzero_ps();
            unroll<8>([&](auto k) LISSOM_INLINE {
              constexpr int kShift = 28 - 8 * (k % 4) - 4 * (k / 4);
              const __m256 w = weight<kShift>(line, scale, offset);
              unroll<kRows>([&](auto r) LISSOM_INLINE {
                acc[r][p][h] = _mm256_fmadd_ps(_mm256_broadcast_ss(a + k * kRows + r), w, acc[r][p][h]);
              });
            });
          });
        });
      }
    }
    unroll<kRows>([&](auto r) LISSOM_INLINE {
      unroll<kPanels>([&](auto p) LISSOM_INLINE {
        _mm256_storeu_ps(sums + r * stride + p * kPanel, acc[r][p][0]);
        _mm256_storeu_ps(sums + r * stride + p * kPanel + 8, acc[r][p][1]);
      });
    });
  }

  static void multiply(const SpanRows<float>& x, const Int4Span& span, bool first, float* sums,
                       const float* prepared) {
    const int stride = span.panels * kPanel;
    if (first) __builtin_memset(sums, 0, sizeof(float) * x.rows * stride);
    if (prepared) return float_tiles(x.a, x.rows, prepared, span.k() * kPanel, span.panels, span.k(), sums);
    if (x.rows == 1 && span.panels == 4) return direct<1, 4>(x, span, 0, sums, stride);
    for (int p = 0; p < span.panels; ++p) {
      with_count<5>(x.rows, [&](auto rows) { direct<rows, 1>(x, span, p, sums + p * kPanel, stride); });
    }
  }
};

#include "int4_linear_kernel.h"

}  // namespace
}  // namespace avx2

const LinearKernel* int4_linear_avx2() { return avx2::kKernels; }

}  // namespace lissom
