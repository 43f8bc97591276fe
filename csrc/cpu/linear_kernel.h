// What the linear ops' algorithms share, written once on 16 lanes: quantizing rows, widening them, and
// turning sums into outputs. Included once per ISA, inside that ISA's namespace, after its simd_*.h and
// before the
// *_linear_kernel.h that uses it. Not a stand-alone header.

// Panels of a chunk: with a slab's rows their sums are 96 KiB, in L2 with the activations of a block of K.
// (32 panels: no gain.)
constexpr int kChunkPanels = 16;

// So few rows pass over whole panels, without blocks of K: hardware follows one long run of weights better
// than many short ones (int4, 4096 x 4096, M = 1, one thread of a Zen 5: 133 -> 105 us).
constexpr int kFewRows = 4;

inline int tile_rows(const RowBatch& rows, int64_t tile) {
  const int64_t left = rows.m - tile * rows.row_tile;
  return left < rows.row_tile ? static_cast<int>(left) : rows.row_tile;
}

// ---- quantization of activations ---------------------------------------------------------------------

// Scale of a row, and the factor that its elements are multiplied with. `magnitude` are the bits of absmax;
// input_scale is null where it decides.
inline void row_scale(int32_t magnitude, const float* input_scale, float* scale, float* inverse) {
  const float absmax = bits_to_float(static_cast<uint32_t>(magnitude));
  *inverse = input_scale ? 1.0f / *input_scale : 127.0f / absmax;
  *scale = input_scale ? *input_scale : absmax / 127.0f;
  if (magnitude >= 0x7f800000) {  // NaN or infinity in the row: the row's outputs are NaN
    *scale = bits_to_float(0x7fc00000u);
    *inverse = 0.0f;
  } else if (!input_scale && *inverse > 3.4028234663852886e38f) {  // (nearly) all zero
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

// kRows rows of `k` elements, quantized and handed to `to`: 16 k-values of each at a time, then a last part
// that is filled up with zeros.
template <bool kClamp, bool kRotate, int kRows, typename T, typename Store>
void quantize_rows(const T* x, int64_t stride, int64_t k, const float* inverse, Store to) {
  I16 q[kRows];
  const auto quantized = [&](F16 v, int r) {
    v = mul(v, set1(inverse[r]));
    if (kClamp) v = min(set1(127.0f), max(set1(-127.0f), v));
    return to_int(v);
  };
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    for (int r = 0; r < kRows; ++r) q[r] = quantized(load_input<kRotate>(x + r * stride + i), r);
    to.put(q, i, 4);
  }
  if (i < k) {
    const int rest = static_cast<int>(k - i);
    for (int r = 0; r < kRows; ++r) q[r] = quantized(load_n(x + r * stride + i, rest), r);
    to.put(q, i, static_cast<int>(quad_count(rest)));
  }
  to.end();
}

// Store says how an op lays its activations out: Store::kRows rows are stored at once, and
// Store::rows<kRows>(args, batch, tile, r) is where rows r… of a tile go.
template <typename Store, bool kClamp, bool kRotate, typename T>
void quantize_tiles(const LinearArgs& args, const float* input_scale, const RowBatch& batch,
                    int64_t tile_begin, int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t row0 = tile * batch.row_tile, stride = args.x_stride;
    const int rows = tile_rows(batch, tile);
    const T* x = static_cast<const T*>(batch.x) + row0 * stride;
    float inverse[Store::kRowTile];
    for (int r = 0; r < rows; ++r) {
      row_scale(row_magnitude<kRotate>(x + r * stride, args.k), input_scale, batch.row_scale + row0 + r,
                inverse + r);
    }
    int r = 0;
    for (; r + Store::kRows <= rows; r += Store::kRows) {
      quantize_rows<kClamp, kRotate, Store::kRows>(x + r * stride, stride, args.k, inverse + r,
                                                   Store::template rows<Store::kRows>(args, batch, tile, r));
    }
    for (; r < rows; ++r) {
      quantize_rows<kClamp, kRotate, 1>(x + r * stride, stride, args.k, inverse + r,
                                        Store::template rows<1>(args, batch, tile, r));
    }
  }
}

template <typename Store, bool kClamp, typename T>
void quantize_clamped(const LinearArgs& args, const float* input_scale, const RowBatch& batch,
                      int64_t tile_begin, int64_t tile_end) {
  if (args.rotated) {
    quantize_tiles<Store, kClamp, true, T>(args, input_scale, batch, tile_begin, tile_end);
  } else {
    quantize_tiles<Store, kClamp, false, T>(args, input_scale, batch, tile_begin, tile_end);
  }
}

template <typename Store, bool kClamp>
void quantize_batch(const LinearArgs& args, const float* input_scale, const RowBatch& batch,
                    int64_t tile_begin, int64_t tile_end) {
  switch (args.x_type) {
    case DType::kFloat32:
      return quantize_clamped<Store, kClamp, float>(args, input_scale, batch, tile_begin, tile_end);
    case DType::kBFloat16:
      return quantize_clamped<Store, kClamp, BFloat16>(args, input_scale, batch, tile_begin, tile_end);
    case DType::kFloat16:
      return quantize_clamped<Store, kClamp, Float16>(args, input_scale, batch, tile_begin, tile_end);
  }
}

// ---- weight-only: activations are only widened to float and laid out, [k][rows of the tile] --------------

template <typename T>
void widen_tiles(const LinearArgs& args, const RowBatch& batch, int64_t padded_k, int64_t tile_begin,
                 int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t row0 = tile * batch.row_tile;
    const int rows = tile_rows(batch, tile);
    float* out = reinterpret_cast<float*>(batch.activations) + row0 * padded_k;
    for (int r = 0; r < rows; ++r) {
      const T* row = static_cast<const T*>(batch.x) + (row0 + r) * args.x_stride;
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

[[maybe_unused]] void widen_batch(const LinearArgs& args, const RowBatch& batch, int64_t padded_k,
                                  int64_t tile_begin, int64_t tile_end) {
  switch (args.x_type) {
    case DType::kFloat32: return widen_tiles<float>(args, batch, padded_k, tile_begin, tile_end);
    case DType::kBFloat16: return widen_tiles<BFloat16>(args, batch, padded_k, tile_begin, tile_end);
    case DType::kFloat16: return widen_tiles<Float16>(args, batch, padded_k, tile_begin, tile_end);
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
    return data + ((group_begin - panel0) * rows + (row - row0) * group_panels(group_begin)) * kPanel;
  }
};

// y = act(fma(sum, row_scale * weight_scale, bias)), row by row: a row's stores are contiguous over the
// chunk, which spares the TLB a new page per store. A scale that is null is 1.
template <Activation kActivation, typename T, typename Sum>
void finish_chunk(const LinearArgs& args, const RowBatch& batch, const float* row_scale,
                  const float* weight_scale, const Sums<Sum>& sums) {
  for (int64_t row = sums.row0; row < sums.row0 + sums.rows; ++row) {
    T* y = static_cast<T*>(batch.y) + row * args.n;
    const F16 x_scale = row_scale ? set1(row_scale[row]) : set1(1.0f);  // times 1 is exact
    for (int64_t begin = sums.panel0; begin < sums.panel0 + sums.panels; begin += sums.group) {
      const Sum* sum = sums.at(begin, row);
      const int panels = sums.group_panels(begin);
      for (int p = 0; p < panels; ++p) {
        const int64_t n0 = (begin + p) * kPanel;
        const int count = n0 + kPanel <= args.n ? kPanel : static_cast<int>(args.n - n0);
        const F16 bias = args.bias ? load_n(args.bias + n0, count) : set1(0.0f);
        const F16 scale = weight_scale ? mul(x_scale, load_n(weight_scale + n0, count)) : x_scale;
        store_n(y + n0, activate<kActivation>(fma(load_sums(sum + p * kPanel), scale, bias)), count);
      }
    }
  }
}

template <typename T, typename Sum>
void finish_typed(const LinearArgs& args, const RowBatch& batch, const float* row_scale,
                  const float* weight_scale, const Sums<Sum>& sums) {
  switch (args.activation) {
    case Activation::kNone:
      return finish_chunk<Activation::kNone, T>(args, batch, row_scale, weight_scale, sums);
    case Activation::kRelu:
      return finish_chunk<Activation::kRelu, T>(args, batch, row_scale, weight_scale, sums);
    case Activation::kGelu:
      return finish_chunk<Activation::kGelu, T>(args, batch, row_scale, weight_scale, sums);
    case Activation::kGeluTanh:
      return finish_chunk<Activation::kGeluTanh, T>(args, batch, row_scale, weight_scale, sums);
    case Activation::kSilu:
      return finish_chunk<Activation::kSilu, T>(args, batch, row_scale, weight_scale, sums);
  }
}

template <typename Sum>
void finish(const LinearArgs& args, const RowBatch& batch, const float* row_scale, const float* weight_scale,
            const Sums<Sum>& sums) {
  switch (args.y_type) {
    case DType::kFloat32: return finish_typed<float>(args, batch, row_scale, weight_scale, sums);
    case DType::kBFloat16: return finish_typed<BFloat16>(args, batch, row_scale, weight_scale, sums);
    case DType::kFloat16: return finish_typed<Float16>(args, batch, row_scale, weight_scale, sums);
  }
}

// Into L2; addresses past the end are harmless.
inline void prefetch(const void* begin, int64_t bytes) {
  const char* p = static_cast<const char*>(begin);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(p + i, 0, 2);
}
