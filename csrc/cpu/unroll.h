// Loops unrolled by the front end, so that an array of accumulators indexed by the counter becomes registers.
// (GCC's own unrolling comes after scalar replacement: a 12 x 2 tile of zmm sums was stored to the stack on
// every step, at half the speed.) Included once per ISA, inside that ISA's namespace.

#define LISSOM_INLINE __attribute__((always_inline))

template <int kValue>
struct Index {
  constexpr operator int() const { return kValue; }
};

template <int kFrom, int kTo, typename Body>
__attribute__((always_inline)) inline void unroll_from(const Body& body) {
  if constexpr (kFrom < kTo) {
    body(Index<kFrom>{});
    unroll_from<kFrom + 1, kTo>(body);
  }
}

// body(Index<0>), …, body(Index<kCount - 1>); write body as [&](auto i) LISSOM_INLINE { … }.
template <int kCount, typename Body>
__attribute__((always_inline)) inline void unroll(const Body& body) {
  unroll_from<0, kCount>(body);
}

// body(Index<count>) for a count in [1, kMost] known at run time only.
template <int kMost, typename Body>
inline void with_count(int count, const Body& body) {
  unroll_from<1, kMost + 1>([&](auto i) LISSOM_INLINE {
    if (i == count) body(i);
  });
}
