// Block-sparse linear: the algorithm that every ISA shares. Included once per ISA, inside that ISA's
// namespace, after its lanes_*.h and linear_kernel.h. Not a stand-alone header.
//
// x is transposed once per call, panel by panel, to [columns][rows], so that a stored weight is broadcast and
// multiplies a column's rows at once: any column is as good as any other, and a panel (kVectors vectors wide)
// stays in L2 while all weights pass over it once. A block's outputs share the loads of x, its columns the
// sums in registers.

// ---- matrices to panels, and back -------------------------------------------------------------------------

template <typename T>
void transpose_columns(const T* from, int64_t stride, int64_t columns, const RowPanel& panel,
                       const float* scale, int64_t begin, int64_t end) {
  for (int row = 0; row < panel.stride; row += kLanes) {
    const int rows = panel.rows - row < kLanes ? panel.rows - row : kLanes;
    const T* x = from + (panel.row0 + row) * stride;
    for (int64_t j = begin; j < end; j += 16) {
      const int count = columns - j < 16 ? static_cast<int>(columns - j > 0 ? columns - j : 0) : 16;
      F16 v[kLanes];
      if (rows == kLanes && count == 16 && scale == nullptr) {
        unroll<kLanes>([&](auto r) LISSOM_INLINE { v[r] = load(x + r * stride + j); });
      } else {
        const F16 factor = scale ? load_n(scale + j, count) : set1(1.0f);
        for (int r = 0; r < kLanes; ++r) {
          v[r] = r < rows ? mul(load_n(x + r * stride + j, count), factor) : set1(0.0f);
        }
      }
      float* to = panel.columns + j * panel.stride + row;
      if (end - j >= 16) {
        transpose(v, to, panel.stride);
      } else {
        float buffer[16 * kLanes];
        transpose(v, buffer, kLanes);
        for (int64_t i = 0; i < end - j; ++i) {
          __builtin_memcpy(to + i * panel.stride, buffer + i * kLanes, sizeof(float) * kLanes);
        }
      }
    }
  }
}

// Columns beyond `columns` and rows beyond the panel's become zero.
void transpose_panel(const Rows& from, const RowPanel& panel, int64_t columns, const float* scale,
                     int64_t begin, int64_t end) {
  const auto typed = [&](const auto* data) {
    transpose_columns(data, from.stride, columns, panel, scale, begin, end);
  };
  switch (from.type) {
    case DType::kFloat32: return typed(static_cast<const float*>(from.data));
    case DType::kBFloat16: return typed(static_cast<const BFloat16*>(from.data));
    case DType::kFloat16: return typed(static_cast<const Float16*>(from.data));
  }
}

template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation kValue = kActivation;
};

// body(ActivationTag, a value of y's type)
template <typename Body>
void with_output(const LinearArgs& args, const Body& body) {
  const auto typed = [&](auto activation) {
    switch (args.y_type) {
      case DType::kFloat32: return body(activation, float{});
      case DType::kBFloat16: return body(activation, BFloat16{});
      case DType::kFloat16: return body(activation, Float16{});
    }
  };
  switch (args.activation) {
    case Activation::kNone: return typed(ActivationTag<Activation::kNone>{});
    case Activation::kRelu: return typed(ActivationTag<Activation::kRelu>{});
    case Activation::kGelu: return typed(ActivationTag<Activation::kGelu>{});
    case Activation::kGeluTanh: return typed(ActivationTag<Activation::kGeluTanh>{});
    case Activation::kSilu: return typed(ActivationTag<Activation::kSilu>{});
  }
}

// Nothing beyond the offsets is read: they may be the last region.
inline I16 load_offsets(const int32_t* offsets, int count) {
  if (count == 16) return load_int(offsets);
  int32_t buffer[16] = {};
  __builtin_memcpy(buffer, offsets, sizeof(int32_t) * count);
  return load_int(buffer);
}

// Sums [outputs][stride] of outputs n0 … to y.
template <Activation kActivation, bool kInteger, typename T>
void finish_outputs(const BlockSparseLinearArgs& args, const RowPanel& panel, const float* sums, int64_t n0,
                    int64_t n1) {
  const int32_t* offsets = kOffset ? reinterpret_cast<const int32_t*>(args.packed) : nullptr;
  for (int row = 0; row < panel.rows; row += kLanes) {
    const int rows = panel.rows - row < kLanes ? panel.rows - row : kLanes;
    for (int64_t n = n0; n < n1; n += 16) {
      const int count = n1 - n < 16 ? static_cast<int>(n1 - n) : 16;
      F16 v[kLanes];
      transpose_back(sums + (n - n0) * panel.stride + row, panel.stride, v);
      const F16 bias = args.bias ? load_n(args.bias + n, count) : set1(0.0f);
      const F16 scale = kInteger ? load_n(args.weight_scale + n, count) : set1(0.0f);
      T* y = static_cast<T*>(args.y) + (panel.row0 + row) * args.n + n;
      for (int r = 0; r < rows; ++r) {
        F16 value;
        if (kInteger) {
          I16 sum = as_int(v[r]);
          if (kOffset) sum = add_int(sum, load_offsets(offsets + n, count));
          value = fma(to_float(sum), mul(set1(panel.row_scale[row + r]), scale), bias);
        } else {
          value = add(v[r], bias);
        }
        store_n(y + r * args.n, activate<kActivation>(value), count);
      }
    }
  }
}

template <bool kInteger>
void finish_panel(const BlockSparseLinearArgs& args, const RowPanel& panel, const float* sums, int64_t n0,
                  int64_t n1) {
  with_output(args, [&](auto activation, auto type) {
    finish_outputs<decltype(activation)::kValue, kInteger, decltype(type)>(args, panel, sums, n0,
                                                                           n1 < args.n ? n1 : args.n);
  });
}

// ---- forward ----------------------------------------------------------------------------------------------

inline bool gathered(const BlockSparse& weight) {
  return weight.type == ValueType::kInt8 && weight.width % kQuad != 0;
}

// Where the weights of some outputs of a block row lie, in elements.
template <typename Weight>
struct BlockRun {
  const Weight* weights;  // of the first block, from the first of the outputs on
  const int32_t* col;
  int64_t blocks;
  int64_t units;                                  // of a block
  int64_t block_stride, row_stride, unit_stride;  // from block to block, output to output, unit to unit
};

// Sums of kOutputs outputs for kVecs vectors of rows, over a block row. kUnits and kRowStride are the run's
// where they are not 0: blocks of one or four units unroll, and their weights have constant addresses.
template <typename L, int kOutputs, int kVecs, int kUnits, int kRowStride>
__attribute__((noinline)) void tile(const float* panel, const BlockRun<typename L::Weight>& run,
                                    float* sums) {
  // Few sums cannot keep two multipliers busy: split each over several units.
  constexpr int kSplit = kUnits == 0 || kOutputs * kVecs >= 8 ? 1 : kOutputs * kVecs >= 4 ? 2 : 4;
  constexpr int64_t kStride = kVecs * kLanes * L::kUnitVectors;
  typename L::Sum acc[kSplit][kOutputs][kVecs];
  unroll<kSplit>([&](auto s) LISSOM_INLINE {
    unroll<kOutputs>([&](auto r) LISSOM_INLINE {
      unroll<kVecs>([&](auto v) LISSOM_INLINE { acc[s][r][v] = L::zero(); });
    });
  });
  const typename L::Weight* w = run.weights;
  const int32_t* col = run.col;
  const int64_t block_stride = run.block_stride;
  const int64_t row_stride = kRowStride ? kRowStride : run.row_stride;
  int64_t b = 0;
  if constexpr (kUnits == 1) {
    for (; b + kSplit <= run.blocks; b += kSplit, w += kSplit * block_stride) {
      unroll<kSplit>([&](auto s) LISSOM_INLINE {
        L::template unit<kOutputs, kVecs>(acc[s], panel + col[b + s] * kStride, w + s * block_stride,
                                          row_stride);
      });
    }
    for (; kSplit > 1 && b < run.blocks; ++b, w += block_stride) {
      L::template unit<kOutputs, kVecs>(acc[0], panel + col[b] * kStride, w, row_stride);
    }
  } else if constexpr (kUnits > 1) {
    for (; b < run.blocks; ++b, w += block_stride) {
      const float* x = panel + col[b] * (kUnits * kStride);
      unroll<kUnits>([&](auto u) LISSOM_INLINE {
        L::template unit<kOutputs, kVecs>(acc[u % kSplit], x + u * kStride, w + u * L::kWeightStep,
                                          row_stride);
      });
    }
  } else {
    for (; b < run.blocks; ++b, w += block_stride) {
      const float* x = panel + col[b] * run.units * kStride;
      const typename L::Weight* wu = w;
      for (int64_t u = 0; u < run.units; ++u, x += kStride, wu += run.unit_stride) {
        L::template unit<kOutputs, kVecs>(acc[0], x, wu, row_stride);
      }
    }
  }
  unroll<kOutputs>([&](auto r) LISSOM_INLINE {
    unroll<kVecs>([&](auto v) LISSOM_INLINE {
      typename L::Sum sum = acc[0][r][v];
      unroll_from<1, kSplit>([&](auto s) LISSOM_INLINE { sum = L::add(sum, acc[s][r][v]); });
      L::store(sums + (r * kVecs + v) * kLanes, sum);
    });
  });
}

template <typename L, int kUnits, int kRowStride>
void tiles(const float* panel, int vectors, int outputs, const BlockRun<typename L::Weight>& run,
           float* sums) {
  with_count<kVectors>(vectors, [&](auto vecs) {
    if constexpr (kGroup >= 8) {
      if (outputs == 8) return tile<L, 8, vecs, kUnits, kRowStride>(panel, run, sums);
    }
    if (outputs == 4) return tile<L, 4, vecs, kUnits, kRowStride>(panel, run, sums);
    if (outputs == 2) return tile<L, 2, vecs, kUnits, kRowStride>(panel, run, sums);
    tile<L, 1, vecs, kUnits, kRowStride>(panel, run, sums);
  });
}

// Outputs whose sums wait to be written together; a group more may be begun.
constexpr int kStripOutputs = 64;

// Outputs of a group when `left` remain: a power of two.
inline int group_outputs(int64_t left) {
  int outputs = kGroup;
  while (outputs > left) outputs /= 2;
  return outputs;
}

// run_of(i) is block row i's run; multiply(run, outputs, sums) sums up the first outputs of a run.
template <bool kInteger, typename Run, typename RunOf, typename Multiply>
void multiply_block_rows(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end,
                         const RunOf& run_of, const Multiply& multiply) {
  const int64_t height = args.weight.height;
  // The last 16 outputs are transposed together, whatever their number: hence the rest.
  alignas(64) float sums[(kStripOutputs + kGroup + 16) * kVectors * kLanes];
  int64_t n0 = begin * height;
  int filled = 0;
  for (int64_t i = begin; i < end; ++i) {
    Run run = run_of(i);
    for (int64_t r = 0; r < height && i * height + r < args.n;) {
      const int outputs = group_outputs(height - r);
      multiply(run, outputs, sums + filled * panel.stride);
      filled += outputs;
      r += outputs;
      run.weights += outputs * run.row_stride;
      if (filled >= kStripOutputs) {
        finish_panel<kInteger>(args, panel, sums, n0, n0 + filled);
        n0 += filled;
        filled = 0;
      }
    }
  }
  if (filled) finish_panel<kInteger>(args, panel, sums, n0, n0 + filled);
}

// Block row i, its values as they are.
template <typename W>
BlockRun<W> values_run(const BlockSparse& weight, int64_t i) {
  const int64_t first = weight.crow[i], size = weight.height * weight.width;
  return {static_cast<const W*>(weight.values) + first * size,
          weight.col + first,
          weight.crow[i + 1] - first,
          weight.width,
          size,
          weight.width,
          1};
}

template <typename W>
void multiply_float(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  using L = FloatLanes<W>;
  using Run = BlockRun<W>;
  const BlockSparse& weight = args.weight;
  const auto run_of = [&](int64_t i) { return values_run<W>(weight, i); };
  const int vectors = panel.stride / kLanes;
  multiply_block_rows<false, Run>(args, panel, begin, end, run_of,
                                  [&](const Run& run, int outputs, float* sums) {
                                    if (weight.width == 1) {
                                      tiles<L, 1, 1>(panel.columns, vectors, outputs, run, sums);
                                    } else if (weight.width == 4) {
                                      tiles<L, 4, 4>(panel.columns, vectors, outputs, run, sums);
                                    } else {
                                      tiles<L, 0, 0>(panel.columns, vectors, outputs, run, sums);
                                    }
                                  });
}

// Sums of kOutputs outputs for kVecs vectors of rows, over units of four columns anywhere.
template <int kOutputs, int kVecs>
__attribute__((noinline)) void gather_tile(const float* panel, const int8_t* w, const int32_t* columns,
                                           int64_t units, int64_t unit_bytes, float* sums) {
  ByteLanes::Sum acc[kOutputs][kVecs];
  unroll<kOutputs>([&](auto r) LISSOM_INLINE {
    unroll<kVecs>([&](auto v) LISSOM_INLINE { acc[r][v] = ByteLanes::zero(); });
  });
  for (int64_t u = 0; u < units; ++u, columns += kQuad, w += unit_bytes) {
    GatherLanes::unit<kOutputs, kVecs>(acc, panel, columns, w);
  }
  unroll<kOutputs>([&](auto r) LISSOM_INLINE {
    unroll<kVecs>([&](auto v)
                      LISSOM_INLINE { ByteLanes::store(sums + (r * kVecs + v) * kLanes, acc[r][v]); });
  });
}

void gather_tiles(const RowPanel& panel, int outputs, const BlockRun<int8_t>& run, float* sums) {
  const auto tile_of = [&](auto vecs) {
    const auto call = [&](auto count) {
      gather_tile<count, vecs>(panel.columns, run.weights, run.col, run.blocks, run.block_stride, sums);
    };
    if constexpr (kGroup >= 8) {
      if (outputs == 8) return call(Index<8>{});
    }
    if (outputs == 4) return call(Index<4>{});
    if (outputs == 2) return call(Index<2>{});
    call(Index<1>{});
  };
  if constexpr (GatherLanes::kLeastVectors > 1) {
    tile_of(Index<GatherLanes::kLeastVectors>{});
  } else {
    with_count<GatherLanes::kMostVectors>(panel.stride / kLanes, tile_of);
  }
}

void multiply_gathered(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  using Run = BlockRun<int8_t>;
  const BlockSparse& weight = args.weight;
  BlockSparsePacked layout{weight.block_rows(), weight.height, weight.width};
  const auto* offsets = reinterpret_cast<const int32_t*>(args.packed + layout.unit_offsets_at());
  layout.units = offsets[layout.block_rows];
  const auto* columns = reinterpret_cast<const int32_t*>(args.packed + layout.columns_at());
  const auto* units = reinterpret_cast<const int8_t*>(args.packed + layout.units_at());
  const int64_t unit_bytes = weight.height * kQuad;
  const auto run_of = [&](int64_t i) {
    const int64_t first = offsets[i];
    return Run{
        units + first * unit_bytes, columns + first * kQuad, offsets[i + 1] - first, 1, unit_bytes, kQuad, 0};
  };
  multiply_block_rows<true, Run>(
      args, panel, begin, end, run_of,
      [&](const Run& run, int outputs, float* sums) { gather_tiles(panel, outputs, run, sums); });
}

// Block row i, its int8 values in quads.
BlockRun<int8_t> quads_run(const BlockSparseLinearArgs& args, int64_t i) {
  const BlockSparse& weight = args.weight;
  const BlockSparsePacked layout{weight.block_rows(), weight.height, weight.width};
  const int8_t* units = reinterpret_cast<const int8_t*>(args.packed) + layout.units_at();
  const int64_t first = weight.crow[i], count = weight.width / kQuad, unit_bytes = weight.height * kQuad;
  return {units + first * count * unit_bytes,
          weight.col + first,
          weight.crow[i + 1] - first,
          count,
          count * unit_bytes,
          kQuad,
          unit_bytes};
}

void multiply_quads(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  using Run = BlockRun<int8_t>;
  const int vectors = panel.stride / kLanes;
  multiply_block_rows<true, Run>(
      args, panel, begin, end, [&](int64_t i) { return quads_run(args, i); },
      [&](const Run& run, int outputs, float* sums) {
        if (run.units == 1) {
          tiles<ByteLanes, 1, kQuad>(panel.columns, vectors, outputs, run, sums);
        } else {
          tiles<ByteLanes, 0, kQuad>(panel.columns, vectors, outputs, run, sums);
        }
      });
}

// ---- forward, few rows: lanes are outputs, or columns ---------------------------------------------------
//
// With fewer rows than lanes the vector runs along what a block stores one after the other: the outputs of a
// column (or quad), four outputs of four columns, or a row's columns. x lies [block column][rows][width].
// Tried: two columns of 8 outputs in one vector of 16, x spread over the halves by shuffles: those have one
// port (1024 x 4096, M = 8: a quarter slower than half-used vectors of rows).

#ifdef LISSOM_FEW_ROWS

enum class Few { kNone, kOutputs, kQuads, kColumns };

// The form for a weight, and the most rows that it is better for.
inline Few few_form(const BlockSparse& weight) {
  if (weight.type == ValueType::kInt8) {
    return weight.width % kQuad == 0 && weight.height % ByteOutputs::kWidth == 0 ? Few::kOutputs : Few::kNone;
  }
  if (weight.width == 1 && weight.height % 8 == 0) return Few::kOutputs;
  if (weight.width == 4 && weight.height % 4 == 0) return Few::kQuads;
  if (weight.width % kLanes == 0) return Few::kColumns;
  return Few::kNone;
}
inline int few_rows(const BlockSparse& weight) {
  switch (few_form(weight)) {
    case Few::kNone: return 0;
    case Few::kOutputs: return weight.height % kLanes == 0 ? kMostFewRows : 6;  // 6: of 16 lanes 8 are used
    default: return 4;
  }
}

// Sums [rows][stride] of some outputs of a block row.
template <typename V, int kRows>
__attribute__((noinline)) void outputs_tile(const float* panel, const BlockRun<typename V::Weight>& run,
                                            float* sums, int stride) {
  constexpr int kSplit = kRows <= 2 ? 4 : kRows <= 6 ? 2 : 1;
  constexpr int64_t kUnit = kRows * V::kInputs;
  typename V::Sum acc[kSplit][kRows];
  unroll<kSplit>([&](auto s)
                     LISSOM_INLINE { unroll<kRows>([&](auto m) LISSOM_INLINE { acc[s][m] = V::zero(); }); });
  const auto step = [&](typename V::Sum* sum, const float* x, const typename V::Weight* w) LISSOM_INLINE {
    const auto weights = V::weights(w);
    unroll<kRows>([&](auto m) LISSOM_INLINE { V::template multiply<kRows>(sum[m], x + m, weights); });
  };
  const typename V::Weight* w = run.weights;
  int64_t b = 0;
  if (run.units == 1) {
    for (; b + kSplit <= run.blocks; b += kSplit, w += kSplit * run.block_stride) {
      __builtin_prefetch(reinterpret_cast<const char*>(w) + 1024, 0, 3);
      unroll<kSplit>([&](auto s) LISSOM_INLINE {
        step(acc[s], panel + run.col[b + s] * kUnit, w + s * run.block_stride);
      });
    }
  }
  for (; b < run.blocks; ++b, w += run.block_stride) {
    const float* x = panel + run.col[b] * run.units * kUnit;
    const typename V::Weight* wu = w;
    int64_t u = 0;
    for (; u + kSplit <= run.units; u += kSplit) {
      unroll<kSplit>([&](auto s) LISSOM_INLINE {
        step(acc[s], x, wu);
        x += kUnit;
        wu += run.unit_stride;
      });
    }
    for (; u < run.units; ++u, x += kUnit, wu += run.unit_stride) step(acc[0], x, wu);
  }
  unroll<kRows>([&](auto m) LISSOM_INLINE {
    typename V::Sum sum = acc[0][m];
    unroll_from<1, kSplit>([&](auto s) LISSOM_INLINE { sum = V::add(sum, acc[s][m]); });
    V::store(sums + m * stride, sum);
  });
}

// Four outputs' quads of columns: a block of four columns is one run of memory.
template <typename W, int kOutputs, int kRows>
__attribute__((noinline)) void quads_tile(const float* panel, const BlockRun<W>& run, float* sums,
                                          int stride) {
  constexpr int kVecs = kOutputs * kQuad / kLanes, kSplit = kVecs * kRows <= 2   ? 4
                                                            : kVecs * kRows <= 4 ? 2
                                                                                 : 1;
  Lane acc[kSplit][kVecs][kRows];
  unroll<kSplit>([&](auto s) LISSOM_INLINE {
    unroll<kVecs>([&](auto v) LISSOM_INLINE {
      unroll<kRows>([&](auto m) LISSOM_INLINE { acc[s][v][m] = lane_zero(); });
    });
  });
  const W* w = run.weights;
  const auto step = [&](auto s, int64_t b) LISSOM_INLINE {
    const float* x = panel + int64_t{run.col[b]} * (kRows * kQuad);
    Lane weights[kVecs];
    unroll<kVecs>([&](auto v) LISSOM_INLINE { weights[v] = lane_load(w + v * kLanes); });
    unroll<kRows>([&](auto m) LISSOM_INLINE {
      const Lane quad = lane_quad(x + m * kQuad);
      unroll<kVecs>([&](auto v) LISSOM_INLINE { dot(acc[s][v][m], quad, weights[v]); });
    });
    w += run.block_stride;
  };
  int64_t b = 0;
  for (; b + kSplit <= run.blocks; b += kSplit) {
    __builtin_prefetch(reinterpret_cast<const char*>(w) + 1024, 0, 3);
    unroll<kSplit>([&](auto s) LISSOM_INLINE { step(s, b + s); });
  }
  for (; kSplit > 1 && b < run.blocks; ++b) step(Index<0>{}, b);
  unroll<kRows>([&](auto m) LISSOM_INLINE {
    unroll<kVecs>([&](auto v) LISSOM_INLINE {
      Lane sum = acc[0][v][m];
      unroll_from<1, kSplit>([&](auto s) LISSOM_INLINE { sum = lane_add(sum, acc[s][v][m]); });
      alignas(64) float lanes[kLanes];
      lane_store(lanes, lane_quad_sums(sum));
      for (int i = 0; i < kLanes / kQuad; ++i) sums[m * stride + v * (kLanes / kQuad) + i] = lanes[i * kQuad];
    });
  });
}

// Dot products along the rows of wide blocks.
template <typename W, int kOutputs, int kRows>
__attribute__((noinline)) void columns_tile(const float* panel, const BlockRun<W>& run, float* sums,
                                            int stride) {
  Lane acc[kOutputs][kRows];
  unroll<kOutputs>(
      [&](auto r) LISSOM_INLINE { unroll<kRows>([&](auto m) LISSOM_INLINE { acc[r][m] = lane_zero(); }); });
  const W* w = run.weights;
  const int64_t width = run.row_stride;
  for (int64_t b = 0; b < run.blocks; ++b, w += run.block_stride) {
    const float* x = panel + run.col[b] * width * kRows;
    for (int64_t c = 0; c < width; c += kLanes) {
      Lane xm[kRows];
      unroll<kRows>([&](auto m) LISSOM_INLINE { xm[m] = lane_load(x + m * width + c); });
      unroll<kOutputs>([&](auto r) LISSOM_INLINE {
        const Lane weights = lane_load(w + r * width + c);
        unroll<kRows>([&](auto m) LISSOM_INLINE { dot(acc[r][m], xm[m], weights); });
      });
    }
  }
  unroll<kOutputs>([&](auto r) LISSOM_INLINE {
    unroll<kRows>([&](auto m) LISSOM_INLINE { sums[m * stride + r] = lane_sum(acc[r][m]); });
  });
}

// x -> [block column][rows][width], columns [begin, end).
template <typename T>
void spread_rows(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  const int64_t width = args.weight.width;
  const int rows = panel.stride;
  for (int m = 0; m < rows; ++m) {
    const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
    for (int64_t j = begin; j < end; j += 16) {
      const int64_t left = args.k - j;
      alignas(64) float buffer[16];
      store(buffer, load_n(x + j, left < 16 ? static_cast<int>(left > 0 ? left : 0) : 16));
      const int64_t count = end - j < 16 ? end - j : 16;
      if (rows == 1) {
        __builtin_memcpy(panel.columns + j, buffer, sizeof(float) * count);
      } else if (width == 1) {
        for (int64_t i = 0; i < count; ++i) panel.columns[(j + i) * rows + m] = buffer[i];
      } else {  // in fours: the width divides by 4
        for (int64_t i = 0; i < count; i += kQuad) {
          const int64_t column = j + i;
          float* to = panel.columns + (column / width * rows + m) * width + column % width;
          __builtin_memcpy(to, buffer + i, sizeof(float) * kQuad);
        }
      }
    }
  }
}
void fill_few(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  switch (args.x_type) {
    case DType::kFloat32: return spread_rows<float>(args, panel, begin, end);
    case DType::kBFloat16: return spread_rows<BFloat16>(args, panel, begin, end);
    case DType::kFloat16: return spread_rows<Float16>(args, panel, begin, end);
  }
}

// Sums [rows][stride] of outputs n0 … to y.
template <Activation kActivation, bool kInteger, typename T>
void finish_few_outputs(const BlockSparseLinearArgs& args, const RowPanel& panel, const float* sums,
                        int stride, int64_t n0, int64_t n1) {
  const int32_t* offsets = kOffset ? reinterpret_cast<const int32_t*>(args.packed) : nullptr;
  for (int m = 0; m < panel.rows; ++m) {
    T* y = static_cast<T*>(args.y) + m * args.n;
    for (int64_t n = n0; n < n1; n += 16) {
      const int count = n1 - n < 16 ? static_cast<int>(n1 - n) : 16;
      const F16 bias = args.bias ? load_n(args.bias + n, count) : set1(0.0f);
      const F16 value = load(sums + m * stride + (n - n0));
      F16 out;
      if (kInteger) {
        I16 sum = as_int(value);
        if (kOffset) sum = add_int(sum, load_offsets(offsets + n, count));
        out = fma(to_float(sum), mul(set1(panel.row_scale[m]), load_n(args.weight_scale + n, count)), bias);
      } else {
        out = add(value, bias);
      }
      store_n(y + n, activate<kActivation>(out), count);
    }
  }
}

// multiply(run, outputs, sums, stride) sums up the first outputs of a run, group_of(left) at once.
template <bool kInteger, typename Run, typename GroupOf, typename RunOf, typename Multiply>
void multiply_few_rows(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end,
                       const GroupOf& group_of, const RunOf& run_of, const Multiply& multiply) {
  constexpr int kStride = kStripOutputs + 16;
  const int64_t height = args.weight.height;
  alignas(64) float sums[(kMostFewRows + 1) * kStride];
  int64_t n0 = begin * height;
  int filled = 0;
  const auto flush = [&] {
    const int64_t n1 = n0 + filled < args.n ? n0 + filled : args.n;
    with_output(args, [&](auto activation, auto type) {
      finish_few_outputs<decltype(activation)::kValue, kInteger, decltype(type)>(args, panel, sums, kStride,
                                                                                 n0, n1);
    });
    n0 += filled;
    filled = 0;
  };
  for (int64_t i = begin; i < end; ++i) {
    Run run = run_of(i);
    for (int64_t r = 0; r < height && i * height + r < args.n;) {
      const int outputs = group_of(height - r);
      multiply(run, outputs, sums + filled, kStride);
      filled += outputs;
      r += outputs;
      run.weights += outputs * run.row_stride;
      if (filled >= kStripOutputs) flush();
    }
  }
  if (filled) flush();
}

template <typename V, typename Run, typename RunOf>
void few_by_outputs(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end,
                    const RunOf& run_of) {
  multiply_few_rows<V::kInteger, Run>(
      args, panel, begin, end, [](int64_t) { return V::kWidth; }, run_of,
      [&](const Run& run, int, float* sums, int stride) {
        with_count<kMostFewRows>(panel.rows,
                                 [&](auto rows) { outputs_tile<V, rows>(panel.columns, run, sums, stride); });
      });
}

template <typename W>
void few_by_quads(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  using Run = BlockRun<W>;
  multiply_few_rows<false, Run>(
      args, panel, begin, end, [&](int64_t left) { return left >= 8 && panel.rows <= 2 ? 8 : 4; },
      [&](int64_t i) { return values_run<W>(args.weight, i); },
      [&](const Run& run, int outputs, float* sums, int stride) {
        with_count<4>(panel.rows, [&](auto rows) {
          if constexpr (rows <= 2) {
            if (outputs == 8) return quads_tile<W, 8, rows>(panel.columns, run, sums, stride);
          }
          quads_tile<W, 4, rows>(panel.columns, run, sums, stride);
        });
      });
}

template <typename W>
void few_by_columns(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  using Run = BlockRun<W>;
  multiply_few_rows<false, Run>(
      args, panel, begin, end, [&](int64_t left) { return left >= 4 ? 4 : 1; },
      [&](int64_t i) { return values_run<W>(args.weight, i); },
      [&](const Run& run, int outputs, float* sums, int stride) {
        with_count<4>(panel.rows, [&](auto rows) {
          if (outputs == 4) return columns_tile<W, 4, rows>(panel.columns, run, sums, stride);
          columns_tile<W, 1, rows>(panel.columns, run, sums, stride);
        });
      });
}

template <typename W>
void few_floats(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  const auto run_of = [&](int64_t i) { return values_run<W>(args.weight, i); };
  switch (few_form(args.weight)) {
    case Few::kOutputs:
      if constexpr (kLanes > 8) {
        if (args.weight.height % kLanes == 0) {
          return few_by_outputs<FloatOutputs<W, kLanes>, BlockRun<W>>(args, panel, begin, end, run_of);
        }
      }
      return few_by_outputs<FloatOutputs<W, 8>, BlockRun<W>>(args, panel, begin, end, run_of);
    case Few::kQuads: return few_by_quads<W>(args, panel, begin, end);
    default: return few_by_columns<W>(args, panel, begin, end);
  }
}

void multiply_few(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  switch (args.weight.type) {
    case ValueType::kFloat32: return few_floats<float>(args, panel, begin, end);
    case ValueType::kBFloat16: return few_floats<BFloat16>(args, panel, begin, end);
    case ValueType::kFloat16: return few_floats<Float16>(args, panel, begin, end);
    case ValueType::kInt8:
      return few_by_outputs<ByteOutputs, BlockRun<int8_t>>(args, panel, begin, end,
                                                           [&](int64_t i) { return quads_run(args, i); });
  }
}

#else

inline int few_rows(const BlockSparse&) { return 0; }
void fill_few(const BlockSparseLinearArgs&, const RowPanel&, int64_t, int64_t) {}
void multiply_few(const BlockSparseLinearArgs&, const RowPanel&, int64_t, int64_t) {}

#endif  // LISSOM_FEW_ROWS

void multiply(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  if (panel.few) return multiply_few(args, panel, begin, end);
  switch (args.weight.type) {
    case ValueType::kFloat32: return multiply_float<float>(args, panel, begin, end);
    case ValueType::kBFloat16: return multiply_float<BFloat16>(args, panel, begin, end);
    case ValueType::kFloat16: return multiply_float<Float16>(args, panel, begin, end);
    case ValueType::kInt8:
      return gathered(args.weight) ? multiply_gathered(args, panel, begin, end)
                                   : multiply_quads(args, panel, begin, end);
  }
}

int64_t panel_floats(const BlockSparse& weight, int stride) {
  const int64_t k = weight.padded_k();
  if (weight.type != ValueType::kInt8) return k * stride;
  // Quantized rows come in quads, also where blocks are narrower.
  const int64_t quads = quad_count(k);
  return quads * stride * (gathered(weight) ? GatherLanes::kBytes : ByteLanes::kUnitVectors);
}

PanelShape panel_shape(const BlockSparse& weight, int64_t m) {
  if (m <= few_rows(weight)) return {static_cast<int>(m), 1, true};
  if (!gathered(weight)) return {kLanes, kVectors, false};
  return {GatherLanes::kLeastVectors * kLanes, GatherLanes::kMostVectors / GatherLanes::kLeastVectors, false};
}

void fill(const BlockSparseLinearArgs& args, const RowPanel& panel, int64_t begin, int64_t end) {
  if (args.weight.type != ValueType::kInt8) {
    if (panel.few) return fill_few(args, panel, begin, end);
    return transpose_panel({args.x, args.x_type, args.x_stride}, panel, args.k, nullptr, begin, end);
  }
  const int lanes = panel_shape(args.weight, args.m).lanes;
  const int64_t row = begin * lanes;
  const int64_t rows = end * lanes < panel.rows ? end * lanes - row : panel.rows - row;
  if (rows <= 0) return;
  RowBatch batch;
  const int64_t bytes = args.x_type == DType::kFloat32 ? 4 : 2;
  batch.x = static_cast<const char*>(args.x) + (panel.row0 + row) * args.x_stride * bytes;
  batch.y = nullptr;
  batch.m = rows;
  batch.row_tile = panel.stride;  // one tile
  batch.row_scale = panel.row_scale + row;
  if (gathered(args.weight)) {
    GatherColumns::begin_at(batch, panel, row);
    return quantize_batch<GatherColumns, false>(args, nullptr, batch, 0, 1);
  }
  batch.activations = reinterpret_cast<uint8_t*>(panel.columns + row);
  quantize_batch<QuadColumns, false>(args, nullptr, batch, 0, 1);
}

// ---- gradients
// ----------------------------------------------------------------------------------------------

// Columns of grad_x += weights of kOutputs outputs times their grad, which stays in registers.
template <typename W, int kOutputs, int kVecs>
__attribute__((noinline)) void grad_input_tile(const float* grad, const BlockRun<W>& run, float* grad_x) {
  constexpr int64_t kStride = kVecs * kLanes;
  Lane g[kOutputs][kVecs];
  unroll<kOutputs>([&](auto r) LISSOM_INLINE {
    unroll<kVecs>([&](auto v) LISSOM_INLINE { g[r][v] = lane_load(grad + (r * kVecs + v) * kLanes); });
  });
  const W* w = run.weights;
  for (int64_t b = 0; b < run.blocks; ++b, w += run.block_stride) {
    float* to = grad_x + run.col[b] * run.units * kStride;
    for (int64_t u = 0; u < run.units; ++u, to += kStride) {
      Lane acc[kVecs];
      unroll<kVecs>([&](auto v) LISSOM_INLINE { acc[v] = lane_load(to + v * kLanes); });
      unroll<kOutputs>([&](auto r) LISSOM_INLINE {
        const Lane wr = lane_set1(w + u + r * run.row_stride);
        unroll<kVecs>([&](auto v) LISSOM_INLINE { dot(acc[v], g[r][v], wr); });
      });
      unroll<kVecs>([&](auto v) LISSOM_INLINE { lane_store(to + v * kLanes, acc[v]); });
    }
  }
}

template <typename W>
void grad_input_typed(const BlockSparse& weight, const RowPanel& grad, const RowPanel& grad_x) {
  const int vectors = grad.stride / kLanes;
  for (int64_t i = 0; i < weight.block_rows(); ++i) {
    BlockRun<W> run = values_run<W>(weight, i);
    for (int64_t r = 0; r < weight.height;) {
      const int outputs = group_outputs(weight.height - r);
      const float* g = grad.columns + (i * weight.height + r) * grad.stride;
      with_count<kVectors>(vectors, [&](auto vecs) {
        if constexpr (kGroup >= 8) {
          if (outputs == 8) return grad_input_tile<W, 8, vecs>(g, run, grad_x.columns);
        }
        if (outputs == 4) return grad_input_tile<W, 4, vecs>(g, run, grad_x.columns);
        if (outputs == 2) return grad_input_tile<W, 2, vecs>(g, run, grad_x.columns);
        grad_input_tile<W, 1, vecs>(g, run, grad_x.columns);
      });
      r += outputs;
      run.weights += outputs * run.row_stride;
    }
  }
}

template <typename T>
void write_panel(const RowPanel& panel, int64_t columns, T* to) {
  for (int row = 0; row < panel.rows; row += kLanes) {
    const int rows = panel.rows - row < kLanes ? panel.rows - row : kLanes;
    for (int64_t j = 0; j < columns; j += 16) {
      const int count = columns - j < 16 ? static_cast<int>(columns - j) : 16;
      F16 v[kLanes];
      transpose_back(panel.columns + j * panel.stride + row, panel.stride, v);
      for (int r = 0; r < rows; ++r) store_n(to + (panel.row0 + row + r) * columns + j, v[r], count);
    }
  }
}

void grad_input(const BlockSparseGradInputArgs& args, const RowPanel& grad, const RowPanel& grad_x) {
  const BlockSparse& weight = args.weight;
  __builtin_memset(grad_x.columns, 0, sizeof(float) * weight.padded_k() * grad_x.stride);
  switch (weight.type) {
    case ValueType::kFloat32: grad_input_typed<float>(weight, grad, grad_x); break;
    case ValueType::kBFloat16: grad_input_typed<BFloat16>(weight, grad, grad_x); break;
    case ValueType::kFloat16: grad_input_typed<Float16>(weight, grad, grad_x); break;
    case ValueType::kInt8: grad_input_typed<int8_t>(weight, grad, grad_x); break;
  }
  switch (args.grad_x_type) {
    case DType::kFloat32: return write_panel(grad_x, weight.k, static_cast<float*>(args.grad_x));
    case DType::kBFloat16: return write_panel(grad_x, weight.k, static_cast<BFloat16*>(args.grad_x));
    case DType::kFloat16: return write_panel(grad_x, weight.k, static_cast<Float16*>(args.grad_x));
  }
}

// Products of kOutputs columns of grad and kColumns columns of x, summed over the rows of both.
template <int kOutputs, int kColumns>
__attribute__((noinline)) void grad_values_tile(const float* grad, const float* const* x, int64_t stride,
                                                float* const* to, int64_t to_stride) {
  Lane acc[kOutputs][kColumns];
  unroll<kOutputs>([&](auto r) LISSOM_INLINE {
    unroll<kColumns>([&](auto c) LISSOM_INLINE { acc[r][c] = lane_zero(); });
  });
  const float* xc[kColumns];
  unroll<kColumns>([&](auto c) LISSOM_INLINE { xc[c] = x[c]; });
  for (int64_t m = 0; m < stride; m += kLanes) {
    Lane xv[kColumns];
    unroll<kColumns>([&](auto c) LISSOM_INLINE { xv[c] = lane_load(xc[c] + m); });
    unroll<kOutputs>([&](auto r) LISSOM_INLINE {
      const Lane g = lane_load(grad + r * stride + m);
      unroll<kColumns>([&](auto c) LISSOM_INLINE { dot(acc[r][c], xv[c], g); });
    });
  }
  unroll<kOutputs>([&](auto r) LISSOM_INLINE {
    unroll<kColumns>([&](auto c) LISSOM_INLINE { to[c][r * to_stride] += lane_sum(acc[r][c]); });
  });
}

void grad_values(const BlockSparseGradValuesArgs& args, const RowPanel& grad, const RowPanel& x,
                 int64_t begin, int64_t end) {
  constexpr int kColumns = 3;
  const BlockSparse& weight = args.weight;
  const int64_t size = weight.height * weight.width;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t r = 0; r < weight.height && i * weight.height + r < weight.n;) {
      const int outputs = group_outputs(weight.height - r);
      const float* g = grad.columns + (i * weight.height + r) * grad.stride;
      const float* columns[kColumns];
      float* to[kColumns];
      int filled = 0;
      const auto flush = [&] {
        with_count<kColumns>(filled, [&](auto count) {
          if constexpr (kGroup >= 8) {
            if (outputs == 8) return grad_values_tile<8, count>(g, columns, x.stride, to, weight.width);
          }
          if (outputs == 4) return grad_values_tile<4, count>(g, columns, x.stride, to, weight.width);
          if (outputs == 2) return grad_values_tile<2, count>(g, columns, x.stride, to, weight.width);
          grad_values_tile<1, count>(g, columns, x.stride, to, weight.width);
        });
        filled = 0;
      };
      for (int64_t b = weight.crow[i]; b < weight.crow[i + 1]; ++b) {
        for (int64_t c = 0; c < weight.width; ++c) {
          columns[filled] = x.columns + (weight.col[b] * weight.width + c) * x.stride;
          to[filled] = args.grad_values + b * size + r * weight.width + c;
          if (++filled == kColumns) flush();
        }
      }
      if (filled) flush();
      r += outputs;
    }
  }
}

const BlockSparseKernel kKernel = {{kLanes, kVectors, false}, panel_shape, panel_floats, fill, multiply,
                                   transpose_panel,           grad_input,  grad_values};
