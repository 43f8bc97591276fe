// What this machine can do at best: loops that do nothing but the operation measured.
//
// Built on demand by bench/floors.py and loaded with ctypes; shares no code with csrc/, so that the
// yardstick cannot inherit a fault of what it measures. Every function is compiled for its own
// instruction set (target attributes), the caller asks only for what the CPU has.
//
// Compute loops keep everything in registers: enough independent accumulators to hide the latency, two
// different operand registers so that nothing can be folded. The instructions are `asm volatile`, because
// a compiler would remove repeated intrinsics whose operands do not change.

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

// Reads 512 bytes per step; a distance of 0 leaves prefetching to the hardware.
template <int kDistance>
__attribute__((target("avx2"))) void read_avx2(const char* p, size_t bytes) {
  __m256i v;
  for (size_t i = 0; i < bytes; i += 512) {
#pragma GCC unroll 8
    for (size_t line = 0; line < 512; line += 64) {
      if (kDistance) _mm_prefetch(p + i + line + kDistance, _MM_HINT_T0);
      asm volatile("vmovdqa (%1), %0" : "=x"(v) : "r"(p + i + line));
      asm volatile("vmovdqa (%1), %0" : "=x"(v) : "r"(p + i + line + 32));
    }
  }
}

template <int kDistance>
__attribute__((target("avx512f"))) void read_avx512(const char* p, size_t bytes) {
  __m512i v;
  for (size_t i = 0; i < bytes; i += 512) {
#pragma GCC unroll 8
    for (size_t line = 0; line < 512; line += 64) {
      if (kDistance) _mm_prefetch(p + i + line + kDistance, _MM_HINT_T0);
      asm volatile("vmovdqa64 (%1), %0" : "=v"(v) : "r"(p + i + line));
    }
  }
}

// Four streams a quarter of the slice apart: more open pages and more hardware prefetchers at work.
__attribute__((target("avx2"))) void read_streams(const char* p, size_t bytes) {
  const size_t quarter = bytes / 4;
  __m256i v;
  for (size_t i = 0; i < quarter; i += 128) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const char* q = p + s * quarter + i;
      asm volatile("vmovdqa (%1), %0" : "=x"(v) : "r"(q));
      asm volatile("vmovdqa (%1), %0" : "=x"(v) : "r"(q + 32));
      asm volatile("vmovdqa (%1), %0" : "=x"(v) : "r"(q + 64));
      asm volatile("vmovdqa (%1), %0" : "=x"(v) : "r"(q + 96));
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
    {"fp32_avx2", fp32_avx2, kFp32Avx2Ops},
    {"fp32_avx512", fp32_avx512, kFp32Avx512Ops},
};
const Read kRead[] = {
    {"avx2", read_avx2<0>, false},
    {"avx2, prefetch +512 B", read_avx2<512>, false},
    {"avx2, prefetch +2 KiB", read_avx2<2048>, false},
    {"avx2, prefetch +4 KiB", read_avx2<4096>, false},
    {"avx2, 4 streams", read_streams, false},
    {"avx512", read_avx512<0>, true},
    {"avx512, prefetch +1 KiB", read_avx512<1024>, true},
    {"avx512, prefetch +4 KiB", read_avx512<4096>, true},
};
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

// Runs body(thread) on `threads` threads that start together; seconds from the start to the last end.
template <class Body>
double together(int threads, Body body) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<double> end(threads);
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    others.emplace_back([&, t] {
      const Pinned pinned(t);
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) {
      }
      body(t);
      end[t] = now();
    });
  }
  double begin = 0;
  {
    const Pinned pinned(0);  // after the others exist: threads inherit the affinity
    while (ready.load() != threads - 1) {
    }
    begin = now();
    go.store(true, std::memory_order_release);
    body(0);
    end[0] = now();
  }
  for (auto& thread : others) thread.join();
  double last = 0;
  for (double e : end) last = e > last ? e : last;
  return last - begin;
}

}  // namespace

extern "C" {

int floors_compute_count() { return kComputes; }
const char* floors_compute_name(int kind) { return kCompute[kind].name; }
double floors_compute_ops(int kind) { return kCompute[kind].ops; }
int floors_read_count() { return kReads; }
const char* floors_read_name(int variant) { return kRead[variant].name; }
int floors_read_needs_avx512(int variant) { return kRead[variant].avx512; }

// Operations per second of one repetition of `iterations` on each of `threads` threads.
double floors_compute(int kind, int threads, int64_t iterations) {
  const Compute& c = kCompute[kind];
  const double seconds = together(threads, [&](int) { c.run(iterations); });
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

// Bytes per second of reading the buffer `passes` times, each thread its own slice.
double floors_read(int variant, int threads, const void* buffer, size_t bytes, int passes) {
  const size_t slice = bytes / threads / 4096 * 4096;
  const char* p = static_cast<const char*>(buffer);
  const double seconds = together(threads, [&](int t) {
    for (int i = 0; i < passes; ++i) kRead[variant].run(p + t * slice, slice);
  });
  return double(slice) * threads * passes / seconds;
}

}  // extern "C"
