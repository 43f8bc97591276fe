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

// ---- int4 on CUDA: panels of [units] [tables] [terms] chunks of codes and [terms]
// -----------------------------------------

// Codes lie as mma.m16n8k16 and m16n8k32 take their first operand, a panel's outputs by k-values: lane 4g + t
// of a warp holds of each register i the outputs g + 8 (i % 2), and its 16 bytes at a time are what it
// multiplies next. Terms are pairs of a scale and a zero-point in float32, 16 per segment.
constexpr int kInt4Chunk = 128;          // k-values of a chunk; the longest segment
constexpr int kInt4Unit = 64;            // … of the 16 bytes of each lane
constexpr int kInt4TermBytes = 2 * 4;    // of an output's segment
constexpr int kInt4UnitBytes = 32 * 16;  // of a panel
constexpr int kInt4CodeBytes = kInt4Chunk / kInt4Unit * kInt4UnitBytes;  // of a panel's chunk

// Which nibble of a lane's word is which element: what takes fewest instructions to expand.
enum class NibbleOrder : int { kHalf = 0, kInt8 = 1, kInt8Table = 2 };

// Where things lie in a panel, in bytes; all are multiples of 16.
struct Int4Fragments {
  int64_t k;
  int segment;      // 32, 64 or 128 k-values
  bool one_group;   // the whole row: its terms stand once, before the chunks
  int entry_bytes;  // of a table: 0, 1 (int8) or 4 (float32)
  NibbleOrder order;

  struct Place {
    int64_t byte;  // of a 32-bit word
    int shift;     // of the nibble in it
  };

  LISSOM_HD constexpr int64_t chunks() const { return ceil_div(k, kInt4Chunk); }
  // Of a chunk, that have terms of their own.
  LISSOM_HD constexpr int segments() const { return one_group ? 1 : kInt4Chunk / segment; }
  LISSOM_HD constexpr int term_bytes() const { return segments() * kPanel * kInt4TermBytes; }
  LISSOM_HD static constexpr int tables_at() { return kPanel * 4; }  // after a unit for each output
  LISSOM_HD constexpr int row_terms_at() const { return tables_at() + kPanel * 16 * entry_bytes; }
  LISSOM_HD constexpr int header_bytes() const { return row_terms_at() + (one_group ? term_bytes() : 0); }
  LISSOM_HD constexpr int chunk_bytes() const { return kInt4CodeBytes + (one_group ? 0 : term_bytes()); }
  LISSOM_HD constexpr int64_t panel_bytes() const { return header_bytes() + chunks() * chunk_bytes(); }

  // The code of output `row` (of a panel's 16) at `column`.
  LISSOM_HD constexpr Place code_at(int row, int64_t column) const {
    const int depth = order == NibbleOrder::kHalf ? 16 : 32, each = depth / 8;  // an mma's, a register's
    const int within = static_cast<int>(column % kInt4Chunk), unit = within / kInt4Unit;
    const int place = within % depth, pair = place / (depth / 2), element = place % each;
    const int lane = row % 8 * 4 + place % (depth / 2) / each, second = row / 8;
    const int tile = within % kInt4Unit / depth;
    const int word = order == NibbleOrder::kHalf ? tile : tile * 2 + pair;
    const int nibble = order == NibbleOrder::kHalf   ? second + 2 * pair + 4 * element
                       : order == NibbleOrder::kInt8 ? second + 2 * element
                                                     : 4 * second + element;
    return {
        header_bytes() + column / kInt4Chunk * chunk_bytes() + unit * kInt4UnitBytes + lane * 16 + word * 4,
        nibble * 4};
  }
};

// ---- block-sparse: float values as torch's BSR has them; int8 values as below
// -----------------------------------------

enum class ValueType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

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
