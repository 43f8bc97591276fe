// Packed layouts and the codes that cross the Python boundary. Shared by CPU and CUDA; the layouts are drawn
// in python/lissom/formats.py, their only other owner, and tests compare the two.
#pragma once

#include <cstdint>

// Where things lie is worked out on the GPU too.
#if defined(__CUDACC__)
#define LISSOM_HD __host__ __device__
#else
#define LISSOM_HD
#endif

namespace lissom {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };
enum class InputMode : int { kDynamic = 0, kStatic = 1, kWeightOnly = 2 };

// Storage types of the two 16-bit formats: only bits, so that no compiler support is needed.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// All packed weights come in panels of 16 outputs and in lines of 64 bytes: one cache line, one 512-bit
// register. A quad is 4 consecutive k-values of one output: what one lane of a dot-product instruction takes.
constexpr int kPanel = 16;
constexpr int kQuad = 4;
constexpr int kLine = kPanel * kQuad;

LISSOM_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LISSOM_HD constexpr int64_t panel_count(int64_t n) { return ceil_div(n, kPanel); }
LISSOM_HD constexpr int64_t quad_count(int64_t k) { return ceil_div(k, kQuad); }

static_assert(kLine == 64, "one line is one cache line and one 512-bit register");
static_assert(kPanel * sizeof(int32_t) == kLine, "an int32 or float for each output fills exactly one line");
static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2, "16-bit storage");

// ---- int8: a line of 16 int32 offsets, then one line per quad
// -----------------------------------------------

// Activations may be stored as unsigned q + 128; the first line of a panel takes that offset out again.
constexpr int kInt8ActivationOffset = 128;

LISSOM_HD constexpr int64_t int8_panel_bytes(int64_t k) { return (1 + quad_count(k)) * kLine; }

// ---- int4: [tables] segments of [scales] [offsets] [tables] blocks
// -----------------------------------------

// K is padded to whole blocks; a block is 32 k-values of a panel in 4 lines of nibbles. A segment is what has
// one scale per output: a group, or a piece of 128 of a row that is one group.
constexpr int kInt4Block = 32;
constexpr int kInt4BlockBytes = kPanel * kInt4Block / 2;
constexpr int kInt4Segment = 128;    // longest
constexpr int kInt4Zero = 8;         // code that stands for 0 where there are no zero-points
constexpr int kInt4TableZero = 128;  // tables hold int8 + 128

enum class TableScope : int { kNone = 0, kPanel = 1, kSegment = 2 };

static_assert(kInt4BlockBytes == 4 * kLine, "a block is 4 lines");

// Where things lie in a panel, in bytes.
struct Int4Layout {
  int64_t k;
  int segment;       // 32, 64 or 128 k-values
  bool has_zero;     // zero-points: an offset line per segment
  TableScope scope;  // of the codebook
  bool floats;       // tables hold float32 in 4 planes of bytes, not int8

  LISSOM_HD constexpr int64_t table_bytes() const { return (floats ? 4 : 1) * kPanel * 16; }
  LISSOM_HD constexpr int64_t panel_header() const { return scope == TableScope::kPanel ? table_bytes() : 0; }
  LISSOM_HD static constexpr int64_t offsets_at() { return kLine; }
  LISSOM_HD constexpr int64_t segment_tables_at() const { return (has_zero ? 2 : 1) * kLine; }
  LISSOM_HD constexpr int64_t blocks_at() const {
    return segment_tables_at() + (scope == TableScope::kSegment ? table_bytes() : 0);
  }
  LISSOM_HD constexpr int64_t segments() const { return ceil_div(k, segment); }
  LISSOM_HD constexpr int64_t padded_k() const { return ceil_div(k, kInt4Block) * kInt4Block; }
  LISSOM_HD constexpr int segment_blocks() const { return segment / kInt4Block; }
  LISSOM_HD constexpr int64_t segment_bytes() const {
    return blocks_at() + segment_blocks() * kInt4BlockBytes;
  }
  LISSOM_HD constexpr int64_t panel_bytes() const {
    return panel_header() + segments() * blocks_at() + padded_k() / kInt4Block * kInt4BlockBytes;
  }
};

// ---- block-sparse: float values as torch's BSR has them; int8 values as below
// -----------------------------------------

enum class ValueType : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 3 };

// int8: regions, each on a line boundary. A unit holds 4 columns of a block row: of its outputs 4 bytes each.
struct BlockSparsePacked {
  int64_t block_rows, height, width;
  int64_t units = 0;  // of all block rows; units_at() needs them where columns are gathered

  // Width divides by 4: units are quads of a block, in order. Otherwise the stored columns of a block row are
  // gathered four by four, with their numbers.
  LISSOM_HD constexpr bool gathered() const { return width % kQuad != 0; }
  LISSOM_HD static constexpr int64_t lines(int64_t bytes) { return ceil_div(bytes, kLine) * kLine; }
  LISSOM_HD constexpr int64_t unit_offsets_at() const {
    return lines(block_rows * height * 4);
  }  // after the offsets
  LISSOM_HD constexpr int64_t columns_at() const {
    return unit_offsets_at() + (gathered() ? lines((block_rows + 1) * 4) : 0);
  }
  LISSOM_HD constexpr int64_t units_at() const {
    return columns_at() + (gathered() ? lines(units * kQuad * 4) : 0);
  }
  LISSOM_HD constexpr int64_t bytes() const { return units_at() + lines(units * height * kQuad); }
};

}  // namespace lissom
