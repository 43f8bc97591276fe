// What this machine can do at best: loops that do nothing but the operation measured.
//
// Built on demand by bench/floors.py and loaded with ctypes; shares no code with csrc/, so that the
// yardstick cannot inherit a fault of what it measures. Every function is compiled for its own
// instruction set (target attributes), the caller asks only for what the CPU has.
//
// Compute loops keep everything in registers: enough independent accumulators to hide the latency, two
// different operand registers so that nothing can be folded. The instructions are `asm volatile`, because
// a compiler would remove repeated intrinsics whose operands do not change.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define FLOORS_X86 1
#endif

namespace {

using Clock = std::chrono::steady_clock;

double now() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

#ifdef FLOORS_X86

constexpr int kUnroll = 64;  // instruction groups per counted iteration: loop overhead below 1 %

// Exact int8 on AVX2: values widened to int16, vpmaddwd (16 multiply-adds into int32), vpaddd. The
// widening itself is reused over the rows of a tile and is not counted.
__attribute__((target("avx2,fma"))) void int8_avx2(int64_t iterations) {
  __m256i a = _mm256_set1_epi16(-77), b = _mm256_set1_epi16(113);
  __m256i c0 = a, c1 = b, c2 = a, c3 = b, c4 = a, c5 = b;
  __m256i t0, t1, t2, t3, t4, t5;
#define MUL(T) asm volatile("vpmaddwd %1, %2, %0" : "=x"(T) : "x"(a), "x"(b))
#define ADD(C, T) asm volatile("vpaddd %1, %0, %0" : "+x"(C) : "x"(T))
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 11
    for (int u = 0; u < 66; u += 6) {
      MUL(t0); MUL(t1); MUL(t2); MUL(t3); MUL(t4); MUL(t5);
      ADD(c0, t0); ADD(c1, t1); ADD(c2, t2); ADD(c3, t3); ADD(c4, t4); ADD(c5, t5);
    }
  }
#undef MUL
#undef ADD
}
constexpr double kInt8Avx2Ops = 66 * 16 * 2;  // 11 × 6 groups, 16 multiply-adds, 2 operations each

// vpdpbusd: 64 multiply-adds of u8 × s8 into int32, exact (no saturation of the pair sums).
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void int8_avx512vnni(int64_t iterations) {
  __m512i a = _mm512_set1_epi8(-77), b = _mm512_set1_epi8(113);
  __m512i c0 = a, c1 = b, c2 = a, c3 = b, c4 = a, c5 = b, c6 = a, c7 = b;
  __m512i d0 = a, d1 = b, d2 = a, d3 = b, d4 = a, d5 = b, d6 = a, d7 = b;
#define STEP(C) asm volatile("vpdpbusd %1, %2, %0" : "+v"(C) : "v"(a), "v"(b))
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; u += 16) {
      STEP(c0); STEP(c1); STEP(c2); STEP(c3); STEP(c4); STEP(c5); STEP(c6); STEP(c7);
      STEP(d0); STEP(d1); STEP(d2); STEP(d3); STEP(d4); STEP(d5); STEP(d6); STEP(d7);
    }
  }
#undef STEP
}
constexpr double kInt8Avx512VnniOps = 64 * 64 * 2;

// int8 activations × unsigned 4-bit weights on AVX2: eight vpmaddubsw (32 multiply-adds each, pair sums at
// most 2·15·127 = 3810) add up in 16 bits without saturation, then one vpmaddwd by ones widens them.
// Taking the nibbles apart is reused over the rows of a tile and is not counted.
__attribute__((target("avx2,fma"))) void int4_avx2(int64_t iterations) {
  __m256i a = _mm256_set1_epi8(-77), b = _mm256_set1_epi8(13), ones = _mm256_set1_epi16(1);
  __m256i c0 = a, c1 = b, c2 = a, c3 = b;
  __m256i s0, s1, s2, s3, t0, t1, t2, t3;
#define MUL(T) asm volatile("vpmaddubsw %1, %2, %0" : "=x"(T) : "x"(a), "x"(b))
#define ADD(S, T) asm volatile("vpaddw %1, %0, %0" : "+x"(S) : "x"(T))
#define WIDEN(C, S)                                              \
  asm volatile("vpmaddwd %1, %0, %0" : "+x"(S) : "x"(ones));     \
  asm volatile("vpaddd %1, %0, %0" : "+x"(C) : "x"(S))
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      MUL(s0); MUL(s1); MUL(s2); MUL(s3);
#pragma GCC unroll 7
      for (int add = 1; add < 8; ++add) {
        MUL(t0); MUL(t1); MUL(t2); MUL(t3);
        ADD(s0, t0); ADD(s1, t1); ADD(s2, t2); ADD(s3, t3);
      }
      WIDEN(c0, s0); WIDEN(c1, s1); WIDEN(c2, s2); WIDEN(c3, s3);
    }
  }
#undef MUL
#undef ADD
#undef WIDEN
}
constexpr double kInt4Avx2Ops = 2 * 8 * 4 * 32 * 2;

__attribute__((target("avx2,fma"))) void fp32_avx2(int64_t iterations) {
  __m256 a = _mm256_set1_ps(0.25f), b = _mm256_set1_ps(-0.5f);
  __m256 c0 = a, c1 = b, c2 = a, c3 = b, c4 = a, c5 = b, c6 = a, c7 = b, c8 = a, c9 = b, ca = a, cb = b;
#define STEP(C) asm volatile("vfmadd231ps %1, %2, %0" : "+x"(C) : "x"(a), "x"(b))
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 6
    for (int u = 0; u < 72; u += 12) {
      STEP(c0); STEP(c1); STEP(c2); STEP(c3); STEP(c4); STEP(c5);
      STEP(c6); STEP(c7); STEP(c8); STEP(c9); STEP(ca); STEP(cb);
    }
  }
#undef STEP
}
constexpr double kFp32Avx2Ops = 72 * 8 * 2;

__attribute__((target("avx512f"))) void fp32_avx512(int64_t iterations) {
  __m512 a = _mm512_set1_ps(0.25f), b = _mm512_set1_ps(-0.5f);
  __m512 c0 = a, c1 = b, c2 = a, c3 = b, c4 = a, c5 = b, c6 = a, c7 = b;
  __m512 d0 = a, d1 = b, d2 = a, d3 = b, d4 = a, d5 = b, d6 = a, d7 = b;
#define STEP(C) asm volatile("vfmadd231ps %1, %2, %0" : "+v"(C) : "v"(a), "v"(b))
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; u += 16) {
      STEP(c0); STEP(c1); STEP(c2); STEP(c3); STEP(c4); STEP(c5); STEP(c6); STEP(c7);
      STEP(d0); STEP(d1); STEP(d2); STEP(d3); STEP(d4); STEP(d5); STEP(d6); STEP(d7);
    }
  }
#undef STEP
}
constexpr double kFp32Avx512Ops = 64 * 16 * 2;

// Reads whole cache lines in kStreams streams, bytes / kStreams apart, in turn kLines lines of each (512 bytes
// per step in all). kDistance bytes ahead are prefetched into L1 (kNta: past L2); 0 leaves it to the hardware.
template <int kStreams, int kDistance, bool kNta = false>
__attribute__((target("avx2"))) void read_avx2(const char* p, size_t bytes) {
  constexpr int kLines = 8 / kStreams;
  const size_t stream = bytes / kStreams;
  __m256i v;
  for (size_t i = 0; i < stream; i += 64 * kLines) {
#pragma GCC unroll 8
    for (int line = 0; line < 8; ++line) {
      const char* q = p + line / kLines * stream + i + line % kLines * 64;
      if (kDistance) _mm_prefetch(q + kDistance, kNta ? _MM_HINT_NTA : _MM_HINT_T0);
      asm volatile("vmovdqa (%1), %0" : "=x"(v) : "r"(q));
      asm volatile("vmovdqa (%1), %0" : "=x"(v) : "r"(q + 32));
    }
  }
}

template <int kStreams, int kDistance, bool kNta = false>
__attribute__((target("avx512f"))) void read_avx512(const char* p, size_t bytes) {
  constexpr int kLines = 8 / kStreams;
  const size_t stream = bytes / kStreams;
  __m512i v;
  for (size_t i = 0; i < stream; i += 64 * kLines) {
#pragma GCC unroll 8
    for (int line = 0; line < 8; ++line) {
      const char* q = p + line / kLines * stream + i + line % kLines * 64;
      if (kDistance) _mm_prefetch(q + kDistance, kNta ? _MM_HINT_NTA : _MM_HINT_T0);
      asm volatile("vmovdqa64 (%1), %0" : "=v"(v) : "r"(q));
    }
  }
}

#endif  // FLOORS_X86

struct Compute {
  const char* name;
  void (*run)(int64_t);
  double ops;  // operations per iteration (a multiply-add is two)
};

struct Read {
  const char* name;
  void (*run)(const char*, size_t);
  bool avx512;
};

#ifdef FLOORS_X86
const Compute kCompute[] = {
    {"int8_avx2", int8_avx2, kInt8Avx2Ops},
    {"int8_avx512vnni", int8_avx512vnni, kInt8Avx512VnniOps},
    {"int4_avx2", int4_avx2, kInt4Avx2Ops},
    {"fp32_avx2", fp32_avx2, kFp32Avx2Ops},
    {"fp32_avx512", fp32_avx512, kFp32Avx512Ops},
};
#define READS(ISA, FUNCTION, AVX512)                                            \
  {ISA, FUNCTION<1, 0>, AVX512},                                                \
  {ISA ", prefetch +1 KiB", FUNCTION<1, 1024>, AVX512},                         \
  {ISA ", prefetch +4 KiB", FUNCTION<1, 4096>, AVX512},                         \
  {ISA ", non-temporal prefetch +1 KiB", FUNCTION<1, 1024, true>, AVX512},      \
  {ISA ", 2 streams", FUNCTION<2, 0>, AVX512},                                  \
  {ISA ", 2 streams, prefetch +1 KiB", FUNCTION<2, 1024>, AVX512},              \
  {ISA ", 2 streams, prefetch +2 KiB", FUNCTION<2, 2048>, AVX512},              \
  {ISA ", 4 streams", FUNCTION<4, 0>, AVX512},                                  \
  {ISA ", 4 streams, prefetch +4 KiB", FUNCTION<4, 4096>, AVX512},              \
  {ISA ", 8 streams", FUNCTION<8, 0>, AVX512}
const Read kRead[] = {READS("avx2", read_avx2, false), READS("avx512", read_avx512, true)};
#undef READS
constexpr int kComputes = sizeof(kCompute) / sizeof(kCompute[0]);
constexpr int kReads = sizeof(kRead) / sizeof(kRead[0]);
#else
const Compute* kCompute = nullptr;
const Read* kRead = nullptr;
constexpr int kComputes = 0, kReads = 0;
#endif

// Puts the calling thread on the index-th CPU that the process may use, until destruction. Without it Linux
// often starts both threads of a short repetition on one core, and moves them apart only after it is over.
class Pinned {
 public:
#if defined(__linux__)
  explicit Pinned(int index) {
    if (sched_getaffinity(0, sizeof before_, &before_)) return;
    index %= CPU_COUNT(&before_);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &before_) || index-- > 0) continue;
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      pinned_ = sched_setaffinity(0, sizeof one, &one) == 0;
      return;
    }
  }
  ~Pinned() {
    if (pinned_) sched_setaffinity(0, sizeof before_, &before_);
  }

 private:
  cpu_set_t before_;
  bool pinned_ = false;
#else
  explicit Pinned(int) {}
#endif
};

// Runs body(thread) `repetitions` times on `threads` threads that start each one together; seconds from the
// first start to the last end of the quickest repetition. A floor is what the machine can do at best: whoever
// interrupts a repetition spoils that one only.
template <class Body>
double quickest(int threads, int repetitions, Body body) {
  std::atomic<int> ready{0}, done{0};
  std::vector<double> begin(threads), end(threads);
  double best = 0;
  const auto all = [&](std::atomic<int>& arrived, int repetition) {
    arrived.fetch_add(1);
    while (arrived.load(std::memory_order_acquire) < threads * (repetition + 1)) {
    }
  };
  const auto work = [&](int t) {
    const Pinned pinned(t);
    for (int i = 0; i < repetitions; ++i) {
      all(ready, i);
      begin[t] = now();
      body(t);
      end[t] = now();
      all(done, i);
      if (t > 0) continue;
      const double seconds =
          *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
      if (i == 0 || seconds < best) best = seconds;
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);  // after the others exist: threads inherit the affinity
  for (auto& thread : others) thread.join();
  return best;
}

}  // namespace

extern "C" {

int floors_compute_count() { return kComputes; }
const char* floors_compute_name(int kind) { return kCompute[kind].name; }
double floors_compute_ops(int kind) { return kCompute[kind].ops; }
int floors_read_count() { return kReads; }
const char* floors_read_name(int variant) { return kRead[variant].name; }
int floors_read_needs_avx512(int variant) { return kRead[variant].avx512; }

// Operations per second of the quickest of `repetitions`, each `iterations` on each of `threads` threads.
double floors_compute(int kind, int threads, int64_t iterations, int repetitions) {
  const Compute& c = kCompute[kind];
  const double seconds = quickest(threads, repetitions, [&](int) { c.run(iterations); });
  return c.ops * double(iterations) * threads / seconds;
}

// A buffer from the ordinary allocator, as weights have (no huge pages asked for), written once.
// 8 KiB of slack lets prefetches run past the end.
void* floors_allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 4096, bytes + 8192)) return nullptr;
  std::memset(p, 1, bytes + 8192);
  return p;
}
void floors_free(void* p) { std::free(p); }

// Bytes per second of the quickest of `repetitions`, each reading the buffer `passes` times, each thread its
// own slice. `bytes` is a multiple of 4 KiB × threads.
double floors_read(int variant, int threads, const void* buffer, size_t bytes, int passes, int repetitions) {
  const size_t slice = bytes / threads;
  const char* p = static_cast<const char*>(buffer);
  const double seconds = quickest(threads, repetitions, [&](int t) {
    for (int i = 0; i < passes; ++i) kRead[variant].run(p + t * slice, slice);
  });
  return double(bytes) * passes / seconds;
}

}  // extern "C"
