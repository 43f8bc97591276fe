// Shared by every ISA: included inside its namespace, after its simd_*.h. Not a stand-alone header.

template <typename T>
void gather(const Int8EmbeddingArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t index = args.wide_indices ? static_cast<const int64_t*>(args.indices)[i]
                                            : static_cast<const int32_t*>(args.indices)[i];
    const int8_t* row = args.table + index * args.width;
    const F16 scale = set1(args.scale[index]);
    T* y = static_cast<T*>(args.y) + i * args.width;
    int64_t j = 0;
    for (; j + 16 <= args.width; j += 16) store(y + j, mul(to_float(load_int8(row + j)), scale));
    if (j < args.width) {
      const int rest = static_cast<int>(args.width - j);
      store_n(y + j, mul(to_float(load_int8_n(row + j, rest)), scale), rest);
    }
  }
}

void gather_rows(const Int8EmbeddingArgs& args, int64_t begin, int64_t end) {
  switch (args.y_type) {
    case DType::kFloat32: return gather<float>(args, begin, end);
    case DType::kBFloat16: return gather<BFloat16>(args, begin, end);
    case DType::kFloat16: return gather<Float16>(args, begin, end);
  }
}
