// What the inner kernels of int4_linear are given. Included once per ISA, inside that ISA's namespace.

// A block of K of neighbouring panels: whole segments, but that the last one of K may be short. Sizes are
// copied from the layout once: worked out anew for every segment they took as long as a row's products.
struct Int4Span {
  Int4Span(const Int4Layout& layout, const uint8_t* panel, int64_t k, int64_t count, int panels)
      : layout(layout),
        panel(panel),
        segment(panel + layout.panel_header() + k / layout.segment * layout.segment_bytes()),
        panel_stride(layout.panel_bytes()),
        segment_stride(layout.segment_bytes()),
        blocks_at(layout.blocks_at()),
        panels(panels),
        full_segment(layout.segment_blocks()),
        blocks(count / kInt4Block),
        segments(ceil_div(blocks, full_segment)) {}

  const Int4Layout& layout;
  const uint8_t* panel;    // the first panel, where tables of panel scope lie
  const uint8_t* segment;  // its first segment of the span
  int64_t panel_stride, segment_stride, blocks_at;
  int panels, full_segment;  // blocks of a segment that is not cut short
  int64_t blocks;            // of 32 k-values
  int64_t segments;

  int64_t k() const { return blocks * kInt4Block; }
  int64_t bytes() const { return segments * blocks_at + blocks * kInt4BlockBytes; }
  int segment_blocks(int64_t s) const {
    const int64_t left = blocks - s * full_segment;
    return left < full_segment ? static_cast<int>(left) : full_segment;
  }
  // Of panel p and segment s:
  const uint8_t* head(int p, int64_t s) const { return segment + p * panel_stride + s * segment_stride; }
  const float* scales(int p, int64_t s) const { return reinterpret_cast<const float*>(head(p, s)); }
  const float* offsets(int p, int64_t s) const {
    return reinterpret_cast<const float*>(head(p, s) + Int4Layout::offsets_at());
  }
  const uint8_t* tables(int p, int64_t s) const {
    return layout.scope == TableScope::kPanel ? panel + p * panel_stride
                                              : head(p, s) + layout.segment_tables_at();
  }
  const uint8_t* lines(int p, int64_t s) const { return head(p, s) + blocks_at; }
};

// The rows of a tile, from the span's first k-value and segment on.
template <typename Stored>
struct SpanRows {
  const Stored* a;  // [quads][rows][4]; weight-only: [k][rows]
  int rows;
  const int32_t* begin;  // [segments][rows]: what a segment's sums begin with
  const float* sum;      // [segments][rows]: sum of the segment's activations
};
