// Shared by every ISA: included inside its namespace, after its simd_*.h. Not a stand-alone header. The ISA's
// file provides load_codes(p): 16 codes from 8 bytes, low nibble first, less 8, as floats.

inline float element(const void* data, int type, int64_t i) {
  float lane[16];
  switch (type) {
    case static_cast<int>(DType::kFloat32): return static_cast<const float*>(data)[i];
    case static_cast<int>(DType::kBFloat16):
      store(lane, load_n(static_cast<const BFloat16*>(data) + i, 1));
      return lane[0];
    case static_cast<int>(DType::kFloat16):
      store(lane, load_n(static_cast<const Float16*>(data) + i, 1));
      return lane[0];
    default: return static_cast<float>(static_cast<const uint8_t*>(data)[i]);
  }
}

template <typename T>
void gather(const Int4EmbeddingArgs& args, int64_t begin, int64_t end) {
  const int64_t row_bytes = ceil_div(args.width, 2);
  const int64_t group = args.group < args.width ? args.group : args.width;
  const int64_t groups = group ? ceil_div(args.width, group) : 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t index = args.wide_indices ? static_cast<const int64_t*>(args.indices)[i]
                                            : static_cast<const int32_t*>(args.indices)[i];
    const uint8_t* row = args.table + index * row_bytes;
    T* y = static_cast<T*>(args.y) + i * args.width;
    for (int64_t g = 0; g < groups; ++g) {
      const float s = element(args.scale, static_cast<int>(args.scale_type), index * groups + g);
      const float c = args.zero ? s * (8.0f - element(args.zero, args.zero_type, index * groups + g)) : 0.0f;
      const F16 scale = set1(s), offset = set1(c);
      const int64_t last = (g + 1) * group < args.width ? (g + 1) * group : args.width;
      int64_t j = g * group;
      for (; j + 16 <= last; j += 16) store(y + j, fma(load_codes(row + j / 2), scale, offset));
      if (j < last) {
        const int rest = static_cast<int>(last - j);
        uint8_t codes[8] = {};
        __builtin_memcpy(codes, row + j / 2, (rest + 1) / 2);
        store_n(y + j, fma(load_codes(codes), scale, offset), rest);
      }
    }
  }
}

void gather_rows(const Int4EmbeddingArgs& args, int64_t begin, int64_t end) {
  switch (args.y_type) {
    case DType::kFloat32: return gather<float>(args, begin, end);
    case DType::kBFloat16: return gather<BFloat16>(args, begin, end);
    case DType::kFloat16: return gather<Float16>(args, begin, end);
  }
}
