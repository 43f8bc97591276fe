// int8 linear: the algorithm that every ISA shares. Included once per ISA, inside that ISA's namespace, after
// linear_kernel.h and its Dot and its Float (the two inner kernels). Not a stand-alone header.
//
// Dot and Float provide
//   Stored                 type of a stored activation
//   kRowTile, kPanelTile   rows and panels of the largest inner tile
//   kBlockQuads            quads of K per block: weights and activations of a block fit the L1 cache
//   kPrepares, Prepared    whether weights of a block are expanded once into a buffer when rows repay it
//   kPrepareFromRows       … from how many rows on
//   kParallelWork          see LinearKernel
//   Sum                    int32_t or float
//   prepare(lines, panel_stride, panels, quads, prepared)
//   multiply(activations, rows, lines, first, panel_stride, panels, quads, sums, prepared)
// where sums is [rows][panels * 16]; it is added to, or begun where this is the first block of K (whose lines
// then have the panel's first line, the offsets, right before them).

struct QuadStore {
  static constexpr int kRows = Dot::kStoreRows, kRowTile = Dot::kRowTile;

  template <int kCount>
  struct Rows {
    uint8_t* out;
    int64_t quad_bytes;
    void put(const I16* q, int64_t i, int quads) {
      Dot::store_quads<kCount>(q, out + i / kQuad * quad_bytes, quad_bytes, quads);
    }
    void end() {}
  };
  template <int kCount>
  static Rows<kCount> rows(const LinearArgs& args, const RowBatch& batch, int64_t tile, int r) {
    constexpr int kQuadBytes = kQuad * static_cast<int>(sizeof(Dot::Stored));
    uint8_t* tile_begin = batch.activations + tile * batch.row_tile * quad_count(args.k) * kQuadBytes;
    return {tile_begin + r * kQuadBytes, static_cast<int64_t>(tile_rows(batch, tile)) * kQuadBytes};
  }
};

void quantize(const LinearArgs& base, const RowBatch& batch, int64_t tile_begin, int64_t tile_end) {
  const auto& args = static_cast<const Int8LinearArgs&>(base);
  if (args.mode == InputMode::kStatic) {
    quantize_batch<QuadStore, true>(args, &args.input_scale, batch, tile_begin, tile_end);
  } else {
    quantize_batch<QuadStore, false>(args, nullptr, batch, tile_begin, tile_end);
  }
}

void widen_rows(const LinearArgs& args, const RowBatch& batch, int64_t tile_begin, int64_t tile_end) {
  widen_batch(args, batch, quad_count(args.k) * kQuad, tile_begin, tile_end);
}

// Loop order: slabs of rows; chunks of panels; blocks of K; panels; row tiles. The slab's activations of one
// block of K stay in L2 while the chunk's panels pass over them; a panel's weights of the block (and their
// expansion) stay in L1 while the slab's row tiles pass over them. Sums of the chunk wait in L2 for the next
// block.
template <typename Inner>
void multiply(const LinearArgs& base, const RowBatch& batch, int64_t tile_begin, int64_t tile_end,
              int64_t panel_begin, int64_t panel_end) {
  const auto& args = static_cast<const Int8LinearArgs&>(base);
  using Sum = typename Inner::Sum;
  alignas(64) Sum data[kSlabRows * kChunkPanels * kPanel];
  alignas(64) typename Inner::Prepared prepared[Inner::kPreparedSize];
  const int64_t quads = quad_count(args.k), panel_stride = int8_panel_bytes(args.k);
  const auto* activations = reinterpret_cast<const typename Inner::Stored*>(batch.activations);

  const int64_t slab_tiles = kSlabRows / batch.row_tile;
  for (int64_t slab = tile_begin; slab < tile_end; slab += slab_tiles) {
    const int64_t slab_end = slab + slab_tiles < tile_end ? slab + slab_tiles : tile_end;
    const int64_t row0 = slab * batch.row_tile;
    const int64_t row1 = slab_end * batch.row_tile < batch.m ? slab_end * batch.row_tile : batch.m;
    const bool prepare = Inner::kPrepares && row1 - row0 >= Inner::kPrepareFromRows;
    // A few rows meet each weight once, and their activations stay in L1: one run along the panel.
    const int64_t block = !prepare && row1 - row0 <= kFewRows ? (quads ? quads : 1) : Inner::kBlockQuads;

    for (int64_t chunk = panel_begin; chunk < panel_end; chunk += kChunkPanels) {
      const int64_t chunk_end = chunk + kChunkPanels < panel_end ? chunk + kChunkPanels : panel_end;
      const Sums<Sum> sums{data, row0, row1 - row0, chunk, chunk_end - chunk, Inner::kPanelTile};
      for (int64_t quad = 0; quad == 0 || quad < quads; quad += block) {
        const int64_t count = quads - quad < block ? quads - quad : block;
        for (int64_t panel = chunk; panel < chunk_end; panel += Inner::kPanelTile) {
          const int panels = sums.group_panels(panel);
          const int8_t* lines = args.packed + panel * panel_stride + (1 + quad) * kLine;
          if (prepare) Inner::prepare(lines, panel_stride, panels, count, prepared);
          // While prepared weights are multiplied, the lines to be prepared next come into L2, a share per
          // tile.
          const int8_t* next = panel + Inner::kPanelTile < chunk_end
                                   ? lines + Inner::kPanelTile * panel_stride
                                   : args.packed + chunk * panel_stride + (1 + quad + count) * kLine;
          const int64_t share = ceil_div(count, slab_end - slab) * kLine;
          for (int64_t tile = slab; tile < slab_end; ++tile) {
            if (prepare) {
              for (int p = 0; p < panels; ++p)
                prefetch(next + p * panel_stride + (tile - slab) * share, share);
            }
            const int64_t first = tile * batch.row_tile;
            const int rows = tile_rows(batch, tile);
            const typename Inner::Stored* a = activations + (first * quads + quad * rows) * kQuad;
            Inner::multiply(a, rows, lines, quad == 0, panel_stride, panels, count, sums.at(panel, first),
                            prepare ? prepared : nullptr);
          }
        }
      }
      finish(args, batch, Inner::kQuantized ? batch.row_scale : nullptr, args.weight_scale, sums);
    }
  }
}

template <typename Inner>
int64_t row_bytes(const LinearArgs& args) {
  return quad_count(args.k) * kQuad * static_cast<int64_t>(sizeof(typename Inner::Stored));
}

const LinearKernel kKernels[2] = {
    {Dot::kRowTile, Dot::kRowTile, Dot::kPanelTile, Dot::kParallelWork, row_bytes<Dot>, quantize,
     multiply<Dot>},
    {Float::kRowTile, Float::kRowTile, Float::kPanelTile, Float::kParallelWork, row_bytes<Float>, widen_rows,
     multiply<Float>},
};
