// The algorithm that every ISA shares. Included once per ISA, inside that ISA's namespace, after its
// simd_*.h and its Dot and its Float (the two inner kernels). Not a stand-alone header.
//
// Dot and Float provide
//   Stored                 type of a stored activation
//   kRowTile, kPanelTile   rows and panels of the largest inner tile
//   kBlockQuads            quads of K per block: weights and activations of a block fit the L1 cache
//   kPrepares, Prepared    whether weights of a block are expanded once into a buffer when rows repay it
//   kPrepareFromRows       … from how many rows on
//   kParallelWork          see Int8LinearKernel
//   Sum                    int32_t or float
//   prepare(lines, panel_stride, panels, quads, prepared)
//   multiply(activations, rows, lines, first, panel_stride, panels, quads, sums, prepared)
// where sums is [rows][panels * 16]; it is added to, or begun where this is the first block of K (whose lines
// then have the panel's first line, the offsets, right before them).

// Rows of a slab and panels of a chunk: sums of 96 KiB, in L2 with the activations of a block of K. (32
// panels: no gain.)
constexpr int kChunkPanels = 16;

inline int tile_rows(const Int8LinearArgs& args, const Int8LinearWork& work, int64_t tile) {
  const int64_t left = args.m - tile * work.row_tile;
  return left < work.row_tile ? static_cast<int>(left) : work.row_tile;
}

// ---- quantization of activations ---------------------------------------------------------------------

// Scale of a row, and the factor that its elements are multiplied with. `magnitude` are the bits of absmax.
inline void row_scale(int32_t magnitude, const Int8LinearArgs& args, float* scale, float* inverse) {
  const float absmax = bits_to_float(static_cast<uint32_t>(magnitude));
  *inverse = args.mode == InputMode::kStatic ? 1.0f / args.input_scale : 127.0f / absmax;
  *scale = args.mode == InputMode::kStatic ? args.input_scale : absmax / 127.0f;
  if (magnitude >= 0x7f800000) {  // NaN or infinity in the row: the row's outputs are NaN
    *scale = bits_to_float(0x7fc00000u);
    *inverse = 0.0f;
  } else if (args.mode == InputMode::kDynamic && *inverse > 3.4028234663852886e38f) {  // (nearly) all zero
    *scale = 0.0f;
    *inverse = 0.0f;
  }
}

// 16 elements of a row as floats; a full block is rotated if asked for: times H/16, see formats.py.
template <bool kRotate, typename T>
inline F16 load_input(const T* x) {
  const F16 v = load(x);
  return kRotate ? hadamard(mul(v, set1(0.0625f))) : v;
}

// Rows of `k` elements, kRows at a time, quantized and stored.
template <bool kClamp, bool kRotate, int kRows, typename T>
void quantize_rows(const T* x, int64_t stride, int64_t k, const float* inverse, uint8_t* out,
                   int64_t quad_bytes) {
  I16 q[kRows];
  const auto quantized = [&](F16 v, int r) {
    v = mul(v, set1(inverse[r]));
    if (kClamp) v = min(set1(127.0f), max(set1(-127.0f), v));
    return to_int(v);
  };
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    for (int r = 0; r < kRows; ++r) q[r] = quantized(load_input<kRotate>(x + r * stride + i), r);
    Dot::store_quads<kRows>(q, out + i / kInt8Quad * quad_bytes, quad_bytes, 4);
  }
  if (i < k) {
    const int rest = static_cast<int>(k - i);
    for (int r = 0; r < kRows; ++r) q[r] = quantized(load_n(x + r * stride + i, rest), r);
    Dot::store_quads<kRows>(q, out + i / kInt8Quad * quad_bytes, quad_bytes,
                            static_cast<int>(int8_quads(rest)));
  }
}

// Bits of the largest magnitude of a row.
template <bool kRotate, typename T>
int32_t row_magnitude(const T* row, int64_t k) {
  I16 m0 = zero_int(), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    m0 = max_int(m0, magnitude_bits(load_input<kRotate>(row + i)));
    m1 = max_int(m1, magnitude_bits(load_input<kRotate>(row + i + 16)));
    m2 = max_int(m2, magnitude_bits(load_input<kRotate>(row + i + 32)));
    m3 = max_int(m3, magnitude_bits(load_input<kRotate>(row + i + 48)));
  }
  for (; i + 16 <= k; i += 16) m0 = max_int(m0, magnitude_bits(load_input<kRotate>(row + i)));
  if (i < k) m0 = max_int(m0, magnitude_bits(load_n(row + i, static_cast<int>(k - i))));
  return reduce_max(max_int(max_int(m0, m1), max_int(m2, m3)));
}

template <bool kClamp, bool kRotate, typename T>
void quantize_tiles(const Int8LinearArgs& args, const Int8LinearWork& work, int64_t tile_begin,
                    int64_t tile_end) {
  constexpr int kGroup = Dot::kStoreRows;
  constexpr int kQuadBytes = kInt8Quad * static_cast<int>(sizeof(Dot::Stored));
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t row0 = tile * work.row_tile;
    const int rows = tile_rows(args, work, tile);
    const T* x = static_cast<const T*>(args.x) + row0 * args.x_stride;
    uint8_t* out = work.activations + row0 * int8_quads(args.k) * kQuadBytes;
    float inverse[Dot::kRowTile];
    for (int r = 0; r < rows; ++r) {
      row_scale(row_magnitude<kRotate>(x + r * args.x_stride, args.k), args, work.row_scale + row0 + r,
                inverse + r);
    }
    const int64_t quad_bytes = static_cast<int64_t>(rows) * kQuadBytes;
    int r = 0;
    for (; r + kGroup <= rows; r += kGroup) {
      quantize_rows<kClamp, kRotate, kGroup>(x + r * args.x_stride, args.x_stride, args.k, inverse + r,
                                             out + r * kQuadBytes, quad_bytes);
    }
    for (; r < rows; ++r) {
      quantize_rows<kClamp, kRotate, 1>(x + r * args.x_stride, args.x_stride, args.k, inverse + r,
                                        out + r * kQuadBytes, quad_bytes);
    }
  }
}

template <bool kClamp, typename T>
void quantize_clamped(const Int8LinearArgs& args, const Int8LinearWork& work, int64_t tile_begin,
                      int64_t tile_end) {
  if (args.rotated) {
    quantize_tiles<kClamp, true, T>(args, work, tile_begin, tile_end);
  } else {
    quantize_tiles<kClamp, false, T>(args, work, tile_begin, tile_end);
  }
}

template <typename T>
void quantize_typed(const Int8LinearArgs& args, const Int8LinearWork& work, int64_t tile_begin,
                    int64_t tile_end) {
  if (args.mode == InputMode::kStatic) {
    quantize_clamped<true, T>(args, work, tile_begin, tile_end);
  } else {
    quantize_clamped<false, T>(args, work, tile_begin, tile_end);
  }
}

void quantize(const Int8LinearArgs& args, const Int8LinearWork& work, int64_t tile_begin, int64_t tile_end) {
  switch (args.x_type) {
    case DType::kFloat32: return quantize_typed<float>(args, work, tile_begin, tile_end);
    case DType::kBFloat16: return quantize_typed<BFloat16>(args, work, tile_begin, tile_end);
    case DType::kFloat16: return quantize_typed<Float16>(args, work, tile_begin, tile_end);
  }
}

// ---- weight-only: activations are only widened to float and laid out ------------------------------------

template <typename T>
void widen_tiles(const Int8LinearArgs& args, const Int8LinearWork& work, int64_t tile_begin,
                 int64_t tile_end) {
  const int64_t padded_k = int8_quads(args.k) * kInt8Quad;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t row0 = tile * work.row_tile;
    const int rows = tile_rows(args, work, tile);
    float* out = reinterpret_cast<float*>(work.activations) + row0 * padded_k;
    for (int r = 0; r < rows; ++r) {
      const T* row = static_cast<const T*>(args.x) + (row0 + r) * args.x_stride;
      for (int64_t i = 0; i < padded_k; i += 16) {
        float lane[16];
        const int64_t left = args.k - i, all = padded_k - i;
        store(lane, load_n(row + i, left < 16 ? static_cast<int>(left > 0 ? left : 0) : 16));
        const int count = all < 16 ? static_cast<int>(all) : 16;
        for (int j = 0; j < count; ++j) out[(i + j) * rows + r] = lane[j];
      }
    }
  }
}

void widen_rows(const Int8LinearArgs& args, const Int8LinearWork& work, int64_t tile_begin,
                int64_t tile_end) {
  switch (args.x_type) {
    case DType::kFloat32: return widen_tiles<float>(args, work, tile_begin, tile_end);
    case DType::kBFloat16: return widen_tiles<BFloat16>(args, work, tile_begin, tile_end);
    case DType::kFloat16: return widen_tiles<Float16>(args, work, tile_begin, tile_end);
  }
}

// ---- from sums to outputs ---------------------------------------------------------------------------------

inline F16 load_sums(const int32_t* p) { return to_float(load_int(p)); }
inline F16 load_sums(const float* p) { return load(p); }

// Where the sums of a slab and a chunk of panels lie: groups of panels one after the other, each
// [rows][panels of the group * 16].
template <typename Sum>
struct Sums {
  Sum* data;
  int64_t row0, rows;
  int64_t panel0, panels;
  int group;  // panels in all groups but a shorter last one

  int group_panels(int64_t panel) const {
    const int64_t left = panel0 + panels - panel;
    return static_cast<int>(left < group ? left : group);
  }
  Sum* at(int64_t group_begin, int64_t row) const {
    return data + ((group_begin - panel0) * rows + (row - row0) * group_panels(group_begin)) * kInt8Panel;
  }
};

// y = act(fma(sum, row_scale * weight_scale, bias)), row by row: a row's stores are contiguous over the
// chunk, which spares the TLB a new page per store. row_scale is null in weight-only mode.
template <Activation kActivation, typename T, typename Sum>
void finish_chunk(const Int8LinearArgs& args, const float* row_scale, const Sums<Sum>& sums) {
  for (int64_t row = sums.row0; row < sums.row0 + sums.rows; ++row) {
    T* y = static_cast<T*>(args.y) + row * args.n;
    const F16 x_scale = row_scale ? set1(row_scale[row]) : set1(1.0f);  // times 1 is exact
    for (int64_t begin = sums.panel0; begin < sums.panel0 + sums.panels; begin += sums.group) {
      const Sum* sum = sums.at(begin, row);
      const int panels = sums.group_panels(begin);
      for (int p = 0; p < panels; ++p) {
        const int64_t n0 = (begin + p) * kInt8Panel;
        if (n0 + kInt8Panel <= args.n) {
          const F16 bias = args.bias ? load(args.bias + n0) : set1(0.0f);
          const F16 scale = mul(x_scale, load(args.weight_scale + n0));
          store(y + n0, activate<kActivation>(fma(load_sums(sum + p * kInt8Panel), scale, bias)));
        } else {
          const int count = static_cast<int>(args.n - n0);
          const F16 bias = args.bias ? load_n(args.bias + n0, count) : set1(0.0f);
          const F16 scale = mul(x_scale, load_n(args.weight_scale + n0, count));
          store_n(y + n0, activate<kActivation>(fma(load_sums(sum + p * kInt8Panel), scale, bias)), count);
        }
      }
    }
  }
}

template <typename T, typename Sum>
void finish_typed(const Int8LinearArgs& args, const float* row_scale, const Sums<Sum>& sums) {
  switch (args.activation) {
    case Activation::kNone: return finish_chunk<Activation::kNone, T>(args, row_scale, sums);
    case Activation::kRelu: return finish_chunk<Activation::kRelu, T>(args, row_scale, sums);
    case Activation::kGelu: return finish_chunk<Activation::kGelu, T>(args, row_scale, sums);
    case Activation::kGeluTanh: return finish_chunk<Activation::kGeluTanh, T>(args, row_scale, sums);
    case Activation::kSilu: return finish_chunk<Activation::kSilu, T>(args, row_scale, sums);
  }
}

template <typename Sum>
void finish(const Int8LinearArgs& args, const float* row_scale, const Sums<Sum>& sums) {
  switch (args.y_type) {
    case DType::kFloat32: return finish_typed<float>(args, row_scale, sums);
    case DType::kBFloat16: return finish_typed<BFloat16>(args, row_scale, sums);
    case DType::kFloat16: return finish_typed<Float16>(args, row_scale, sums);
  }
}

// Into L2; addresses past the end are harmless.
inline void prefetch(const int8_t* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kInt8Line) __builtin_prefetch(begin + i, 0, 2);
}

// ---- the product
// ---------------------------------------------------------------------------------------------

// Loop order: slabs of rows; chunks of panels; blocks of K; panels; row tiles. The slab's activations of one
// block of K stay in L2 while the chunk's panels pass over them; a panel's weights of the block (and their
// expansion) stay in L1 while the slab's row tiles pass over them. Sums of the chunk wait in L2 for the next
// block.
template <typename Inner>
void multiply(const Int8LinearArgs& args, const Int8LinearWork& work, int64_t tile_begin, int64_t tile_end,
              int64_t panel_begin, int64_t panel_end) {
  using Sum = typename Inner::Sum;
  alignas(64) Sum data[kInt8SlabRows * kChunkPanels * kInt8Panel];
  alignas(64) typename Inner::Prepared prepared[Inner::kPreparedSize];
  const int64_t quads = int8_quads(args.k), panel_stride = int8_panel_bytes(args.k);
  const auto* activations = reinterpret_cast<const typename Inner::Stored*>(work.activations);

  const int64_t slab_tiles = kInt8SlabRows / work.row_tile;
  for (int64_t slab = tile_begin; slab < tile_end; slab += slab_tiles) {
    const int64_t slab_end = slab + slab_tiles < tile_end ? slab + slab_tiles : tile_end;
    const int64_t row0 = slab * work.row_tile;
    const int64_t row1 = slab_end * work.row_tile < args.m ? slab_end * work.row_tile : args.m;
    const bool prepare = Inner::kPrepares && row1 - row0 >= Inner::kPrepareFromRows;

    for (int64_t chunk = panel_begin; chunk < panel_end; chunk += kChunkPanels) {
      const int64_t chunk_end = chunk + kChunkPanels < panel_end ? chunk + kChunkPanels : panel_end;
      const Sums<Sum> sums{data, row0, row1 - row0, chunk, chunk_end - chunk, Inner::kPanelTile};
      for (int64_t quad = 0; quad == 0 || quad < quads; quad += Inner::kBlockQuads) {
        const int64_t count = quads - quad < Inner::kBlockQuads ? quads - quad : Inner::kBlockQuads;
        for (int64_t panel = chunk; panel < chunk_end; panel += Inner::kPanelTile) {
          const int panels = sums.group_panels(panel);
          const int8_t* lines = args.packed + panel * panel_stride + (1 + quad) * kInt8Line;
          if (prepare) Inner::prepare(lines, panel_stride, panels, count, prepared);
          // While prepared weights are multiplied, the lines to be prepared next come into L2, a share per
          // tile.
          const int8_t* next = panel + Inner::kPanelTile < chunk_end
                                   ? lines + Inner::kPanelTile * panel_stride
                                   : args.packed + chunk * panel_stride + (1 + quad + count) * kInt8Line;
          const int64_t share = ceil_div(count, slab_end - slab) * kInt8Line;
          for (int64_t tile = slab; tile < slab_end; ++tile) {
            if (prepare) {
              for (int p = 0; p < panels; ++p)
                prefetch(next + p * panel_stride + (tile - slab) * share, share);
            }
            const int64_t first = tile * work.row_tile;
            const int rows = tile_rows(args, work, tile);
            const typename Inner::Stored* a = activations + (first * quads + quad * rows) * kInt8Quad;
            Inner::multiply(a, rows, lines, quad == 0, panel_stride, panels, count, sums.at(panel, first),
                            prepare ? prepared : nullptr);
          }
        }
      }
      finish(args, Inner::kQuantized ? work.row_scale : nullptr, sums);
    }
  }
}

const Int8LinearKernel kKernels[2] = {
    {Dot::kRowTile, Dot::kPanelTile, static_cast<int>(sizeof(Dot::Stored)), Dot::kParallelWork, quantize,
     multiply<Dot>},
    {Float::kRowTile, Float::kPanelTile, static_cast<int>(sizeof(Float::Stored)), Float::kParallelWork,
     widen_rows, multiply<Float>},
};
