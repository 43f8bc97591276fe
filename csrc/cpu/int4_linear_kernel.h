// int4 linear: the algorithm that every ISA shares. Included once per ISA, inside that ISA's namespace, after
// linear_kernel.h and int4_span.h and its Nibbles, its Table and its Float (the three inner kernels). Not a
// stand-alone header.
//
// The inner kernels provide
//   Stored, kStoreRows     type of a stored activation; rows that store_quads stores at once
//   kZero                  code that counts as zero: sums of a segment begin at -kZero * (sum of activations)
//   kRowTile, kPanelTile   rows and panels that an inner tile handles best
//   kMostRows              rows that it handles at most
//   kBlockK                k-values per block of K, whole segments: its weights and activations fit the
//   caches Prepared, kPreparedSize
//                          buffer into which a block's weights may be expanded
//   prepares(layout, rows) whether that pays for so many rows of a slab
//   kParallelWork          see LinearKernel
//   prepare(span, prepared)
//   multiply(x, span, first, sums, prepared)
// where sums is [rows][panels * 16] of float; it is added to, or begun where this is the first block of K.

// ---- activations
// ----------------------------------------------------------------------------------------------

// A tile of rows is stored as [quads of padded K][rows][4], then for each segment what its sums begin with,
// int32 [segments][rows], and the sum of its activations, float [segments][rows].
template <typename Inner>
int64_t int4_row_bytes(const LinearArgs& base) {
  const Int4Layout& layout = static_cast<const Int4LinearArgs&>(base).layout;
  return layout.padded_k() * static_cast<int64_t>(sizeof(typename Inner::Stored)) + layout.segments() * 8;
}

template <typename Inner>
struct SegmentStore {
  static constexpr int kRows = Inner::kStoreRows, kRowTile = Inner::kMostRows;

  template <int kCount>
  struct Rows {
    uint8_t* out;
    int64_t quad_bytes;
    int64_t padded_k, at;
    int segment, rows;
    int32_t* begin;
    float* sum;
    I16 total[kCount];

    void put(const I16* q, int64_t i, int) {
      Inner::template store_quads<kCount>(q, out + i / kQuad * quad_bytes, quad_bytes);
      for (int r = 0; r < kCount; ++r) total[r] = add_int(total[r], q[r]);
      at = i + 16;
      if ((at & (segment - 1)) != 0 && at < padded_k) return;
      for (int r = 0; r < kCount; ++r) {
        const int32_t x = reduce_add(total[r]);
        begin[r] = -Inner::kZero * x;
        sum[r] = static_cast<float>(x);
        total[r] = zero_int();
      }
      begin += rows;
      sum += rows;
    }
    void end() {
      I16 zero[kCount];
      for (int r = 0; r < kCount; ++r) zero[r] = zero_int();
      while (at < padded_k) put(zero, at, 4);
    }
  };

  template <int kCount>
  static Rows<kCount> rows(const LinearArgs& base, const RowBatch& batch, int64_t tile, int r) {
    constexpr int kQuadBytes = kQuad * static_cast<int>(sizeof(typename Inner::Stored));
    const Int4Layout& layout = static_cast<const Int4LinearArgs&>(base).layout;
    const int rows = tile_rows(batch, tile);
    uint8_t* out = batch.activations + tile * batch.row_tile * int4_row_bytes<Inner>(base);
    int32_t* begin = reinterpret_cast<int32_t*>(out + layout.padded_k() / kQuad * rows * kQuadBytes);
    float* sum = reinterpret_cast<float*>(begin + layout.segments() * rows);
    Rows<kCount> result{out + r * kQuadBytes,
                        static_cast<int64_t>(rows) * kQuadBytes,
                        layout.padded_k(),
                        0,
                        layout.segment,
                        rows,
                        begin + r,
                        sum + r,
                        {}};
    for (int i = 0; i < kCount; ++i) result.total[i] = zero_int();
    return result;
  }
};

template <typename Inner>
void quantize_segments(const LinearArgs& args, const RowBatch& batch, int64_t tile_begin, int64_t tile_end) {
  quantize_batch<SegmentStore<Inner>, false>(args, nullptr, batch, tile_begin, tile_end);
}

int64_t int4_float_row_bytes(const LinearArgs& base) {
  return static_cast<const Int4LinearArgs&>(base).layout.padded_k() * static_cast<int64_t>(sizeof(float));
}

void widen_padded(const LinearArgs& base, const RowBatch& batch, int64_t tile_begin, int64_t tile_end) {
  widen_batch(base, batch, static_cast<const Int4LinearArgs&>(base).layout.padded_k(), tile_begin, tile_end);
}

// Rows of a tile from the k-value (and the segment) where a span begins.
template <typename Inner>
SpanRows<typename Inner::Stored> rows_at(const Int4LinearArgs& args, const RowBatch& batch, int64_t tile,
                                         int64_t k) {
  using Stored = typename Inner::Stored;
  const int rows = tile_rows(batch, tile);
  const int64_t padded_k = args.layout.padded_k(), segment = k / args.layout.segment;
  const int64_t row_bytes = args.weight_only ? int4_float_row_bytes(args) : int4_row_bytes<Inner>(args);
  const auto* a = reinterpret_cast<const Stored*>(batch.activations + tile * batch.row_tile * row_bytes);
  const auto* begin = reinterpret_cast<const int32_t*>(a + padded_k * rows) + segment * rows;
  const auto* sum = reinterpret_cast<const float*>(begin + args.layout.segments() * rows);
  return {a + k * rows, rows, begin, sum};
}

// ---- the product
// ------------------------------------------------------------------------------------------------

// Loop order as in int8_linear_kernel.h: slabs of rows; chunks of panels; blocks of K; panels; row tiles.
// Sums are float32 and wait in L2.
template <typename Inner>
void int4_multiply(const LinearArgs& base, const RowBatch& batch, int64_t tile_begin, int64_t tile_end,
                   int64_t panel_begin, int64_t panel_end) {
  const auto& args = static_cast<const Int4LinearArgs&>(base);
  const Int4Layout& layout = args.layout;
  alignas(64) float data[kSlabRows * kChunkPanels * kPanel];
  alignas(64) typename Inner::Prepared prepared[Inner::kPreparedSize];
  const int64_t panel_stride = layout.panel_bytes();

  const int64_t slab_tiles = kSlabRows / batch.row_tile;
  for (int64_t slab = tile_begin; slab < tile_end; slab += slab_tiles) {
    const int64_t slab_end = slab + slab_tiles < tile_end ? slab + slab_tiles : tile_end;
    const int64_t row0 = slab * batch.row_tile;
    const int64_t row1 = slab_end * batch.row_tile < batch.m ? slab_end * batch.row_tile : batch.m;
    const bool prepare = Inner::prepares(layout, row1 - row0);
    // A few rows meet each weight once, and their activations stay in L1: one run along the panel.
    const int64_t block_k = !prepare && row1 - row0 <= kFewRows ? layout.padded_k() : Inner::kBlockK;

    for (int64_t chunk = panel_begin; chunk < panel_end; chunk += kChunkPanels) {
      const int64_t chunk_end = chunk + kChunkPanels < panel_end ? chunk + kChunkPanels : panel_end;
      const Sums<float> sums{data, row0, row1 - row0, chunk, chunk_end - chunk, Inner::kPanelTile};
      if (layout.padded_k() == 0) {  // nothing that would begin the sums
        __builtin_memset(data, 0, sizeof(float) * sums.rows * sums.panels * kPanel);
      }
      for (int64_t k = 0; k < layout.padded_k(); k += block_k) {
        const int64_t count = layout.padded_k() - k < block_k ? layout.padded_k() - k : block_k;
        for (int64_t panel = chunk; panel < chunk_end; panel += Inner::kPanelTile) {
          const Int4Span span(layout, args.packed + panel * panel_stride, k, count, sums.group_panels(panel));
          if (prepare) Inner::prepare(span, prepared);
          // While several tiles are multiplied, the weights that come next are brought into L2, a share per
          // tile.
          const bool more = panel + Inner::kPanelTile < chunk_end;
          const uint8_t* next = more ? span.segment + Inner::kPanelTile * panel_stride
                                     : span.segment - (panel - chunk) * panel_stride + span.bytes();
          const int64_t share = ceil_div(ceil_div(span.bytes(), slab_end - slab), kLine) * kLine;
          for (int64_t tile = slab; tile < slab_end; ++tile) {
            if (slab_end - slab > 1) {
              for (int p = 0; p < span.panels; ++p)
                prefetch(next + p * panel_stride + (tile - slab) * share, share);
            }
            Inner::multiply(rows_at<Inner>(args, batch, tile, k), span, k == 0,
                            sums.at(panel, tile * batch.row_tile), prepare ? prepared : nullptr);
          }
        }
      }
      finish(args, batch, args.weight_only ? nullptr : batch.row_scale, nullptr, sums);
    }
  }
}

template <typename Inner>
constexpr LinearKernel quantized_kernel() {
  return {Inner::kRowTile,       Inner::kMostRows,         Inner::kPanelTile,   Inner::kParallelWork,
          int4_row_bytes<Inner>, quantize_segments<Inner>, int4_multiply<Inner>};
}

const LinearKernel kKernels[3] = {
    quantized_kernel<Nibbles>(),
    quantized_kernel<Table>(),
    {Float::kRowTile, Float::kRowTile, Float::kPanelTile, Float::kParallelWork, int4_float_row_bytes,
     widen_padded, int4_multiply<Float>},
};
