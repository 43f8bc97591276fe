// Storing rows of bytes as quads. Included once per x86 ISA, inside that ISA's namespace.

// bytes[r] are 16 k-values of row r; the first `quads` quads of the rows are stored, a row's quad beside the
// next row's. Four rows: a 4 x 4 transposition of quads, so that each quad of the rows is one 16-byte store.
template <int kRows>
inline void store_byte_quads(const __m128i* bytes, uint8_t* out, int64_t quad_bytes, int quads) {
  static_assert(kRows == 1 || kRows == 4, "one row, or four together");
  __m128i parts[4];
  if (kRows == 4) {
    const __m128i ab_low = _mm_unpacklo_epi32(bytes[0], bytes[1 % kRows]);
    const __m128i ab_high = _mm_unpackhi_epi32(bytes[0], bytes[1 % kRows]);
    const __m128i cd_low = _mm_unpacklo_epi32(bytes[2 % kRows], bytes[3 % kRows]);
    const __m128i cd_high = _mm_unpackhi_epi32(bytes[2 % kRows], bytes[3 % kRows]);
    parts[0] = _mm_unpacklo_epi64(ab_low, cd_low);
    parts[1] = _mm_unpackhi_epi64(ab_low, cd_low);
    parts[2] = _mm_unpacklo_epi64(ab_high, cd_high);
    parts[3] = _mm_unpackhi_epi64(ab_high, cd_high);
    for (int i = 0; i < quads; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * quad_bytes), parts[i]);
  } else {
    _mm_storeu_si128(parts, bytes[0]);
    for (int i = 0; i < quads; ++i) {
      __builtin_memcpy(out + i * quad_bytes, reinterpret_cast<const char*>(parts) + 4 * i, 4);
    }
  }
}
