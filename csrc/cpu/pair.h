// Two vectors of 16 lanes as one, whose operations alternate: where a long chain of dependent operations is
// all there is to do, half of them need not wait. Included inside an ISA's namespace, after its simd_*.h. Not
// a stand-alone header.

struct Pair {
  Pair() = default;
  Pair(F16 both) : a(both), b(both) {}
  Pair(F16 first, F16 second) : a(first), b(second) {}
  F16 a, b;
};

inline Pair add(Pair x, Pair y) { return {add(x.a, y.a), add(x.b, y.b)}; }
inline Pair sub(Pair x, Pair y) { return {sub(x.a, y.a), sub(x.b, y.b)}; }
inline Pair mul(Pair x, Pair y) { return {mul(x.a, y.a), mul(x.b, y.b)}; }
inline Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
inline Pair max(Pair x, Pair y) { return {max(x.a, y.a), max(x.b, y.b)}; }
inline Pair min(Pair x, Pair y) { return {min(x.a, y.a), min(x.b, y.b)}; }
inline Pair abs(Pair x) { return {abs(x.a), abs(x.b)}; }
inline Pair negate(Pair x) { return {negate(x.a), negate(x.b)}; }
inline Pair select_negative(Pair x, Pair y, Pair z) {
  return {select_negative(x.a, y.a, z.a), select_negative(x.b, y.b, z.b)};
}
inline Pair exponent_field(Pair x) { return {exponent_field(x.a), exponent_field(x.b)}; }
// Into one vector, in order.
inline F16 fma_where_positive(Pair where, Pair x, Pair y, F16 sum) {
  return fma_where_positive(where.b, x.b, y.b, fma_where_positive(where.a, x.a, y.a, sum));
}
template <typename T>
inline void load_to(const T* p, Pair* x) {
  *x = {load(p), load(p + 16)};
}
template <typename T>
inline void store(T* p, Pair x) {
  store_two(p, x.a, x.b);
}
