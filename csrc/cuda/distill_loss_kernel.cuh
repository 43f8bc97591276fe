// A row is shared out in groups of 8 columns that begin where 16 bytes do; its threads take them in turn, so
// that a warp reads 512 neighbouring bytes at a time. Passes over a row:
//
//   1  sums         maxima and sums of 2^x, kept per thread (online softmax): one read, threads share nothing
//                   until the row ends
//   2  terms        the loss's terms, and the gradient where that needs no mean: forward KL, CE, entropy
//   3  means        the last bits of JS's mean
//   4  gradient     of reverse KL and JS, which subtract a mean
//
// Between passes a row's first groups stay in shared memory, as many as there is room for: each thread keeps
// its own, so that nobody waits. The others are read again, last ones first, from the L2 cache as far as it
// reaches. What rows are long enough for:
//
//   a warp a row            up to 1024 columns; rows of a block share nothing
//   a block a row           all passes in one launch
//   several blocks a row    rows that are long and few: a launch a pass, sums of parts in `partials`
//
// By count (sm_90a's SASS), forward KL alone takes 37 instructions an element in bfloat16. Pass 1 takes 12:
// for both logits to unpack 2, fma 2, ex2 2, add 2, half of a packed maximum each, the rest loads and stores.
// Pass 2 takes 25: to unpack and exponentiate 6, the teacher's sum 1, d 2, the polynomial 7, which of the two
// p - q 2, sums 3, the factor and packing 1.5, loads, stores and addresses the rest. Of the 4 warps'
// instructions a clock (1.755 GHz, 132 multiprocessors) an H200 has 44 for each element in the 1.55 ms that
// 8192 x 128256 are to take, and 37 in 1.31 ms, which memory needs: both bound it. The four ex2 take 1.13 ms
// of their pipe.
//
// A row's bits depend on its length, on where it begins within 16 bytes and on whether it is split, not on
// the rows beside it.
#pragma once

#include <type_traits>

#include "distill_loss.h"
#include "distill_loss_math.cuh"

namespace lissom::cuda {

constexpr int kGroup = 8;
constexpr int kFields = 16;     // of a part in `partials`, in the order of store_part(), then of means
constexpr int kMostParts = 32;  // lanes of the warp that adds them up

// What the host works out of DistillLoss; the same for the whole grid.
struct DistillParams {
  DistillLoss a;
  // Factors from logits to exponents, and of logits before that where there is a cap or the scale is no
  // positive one.
  float student_rate, teacher_rate, plain_rate, student_factor, teacher_factor;
  bool student_scaled, teacher_scaled, cap;
  bool entropy, ce, plain, smooth;  // plain: CE's temperature is another than the divergence's
  float beta;
  double kl_loss, entropy_loss, ce_loss, kl_grad, entropy_grad, ce_grad;  // factors of terms
  bool vector;  // rows of all tensors begin alike within 16 bytes
  int first_pass, last_pass;
  int parts, part_groups;  // of a row
  int held;                // steps of a thread whose groups stay in shared memory
};

// Any of the three types, by a DType: the branch is the whole grid's.
struct AnyFloat {};

// A form that code is compiled for. kOptions: whatever DistillParams says; otherwise forward KL is all.
template <typename Type, DistillDivergence kD, bool kWithOptions, int kGroupsAtOnce, int kMostThreads>
struct DistillForm {
  using T = Type;
  static constexpr DistillDivergence kDivergence = kD;
  static constexpr bool kOptions = kWithOptions;
  static constexpr int kGroups = kGroupsAtOnce;  // of a step
  static constexpr int kThreads = kMostThreads;
  static constexpr int kValues = kGroups * kGroup;
  static constexpr bool kTeacher = kD != DistillDivergence::kNone;
  static constexpr bool kReverse = kD == DistillDivergence::kReverse;
  static constexpr bool kJs = kD == DistillDivergence::kJs;
  static constexpr bool kMean = kReverse || kJs;                       // the gradient needs one
  static constexpr bool kCoarse = !kWithOptions && sizeof(Type) == 2;  // of 16 bits, as the gradient is
};

// ---- groups: 8 logits as they lie in memory ---------------------------------------------------------------

template <typename T>
struct Group {
  static constexpr int kPieces = kGroup * sizeof(T) / 16;
  uint4 piece[kPieces];
};
template <>
struct Group<AnyFloat> {
  static constexpr int kPieces = 2;  // of 16-bit types one is used
  uint4 piece[kPieces];
};

template <typename T>
__device__ __forceinline__ T lowest();
template <>
__device__ __forceinline__ float lowest<float>() {
  return minus_infinity();
}
template <>
__device__ __forceinline__ BFloat16 lowest<BFloat16>() {
  return BFloat16{0xff80};
}
template <>
__device__ __forceinline__ Float16 lowest<Float16>() {
  return Float16{0xfc00};
}

__device__ __forceinline__ void widen(float* v, const uint4& four, float) {
  v[0] = __uint_as_float(four.x);
  v[1] = __uint_as_float(four.y);
  v[2] = __uint_as_float(four.z);
  v[3] = __uint_as_float(four.w);
}
template <typename T>
__device__ __forceinline__ void widen(float* v, const uint4& eight, T) {
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<T>(words[i]);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}
template <typename T>
__device__ __forceinline__ void widen_group(float* v, const Group<T>& g, DType) {
#pragma unroll
  for (int i = 0; i < Group<T>::kPieces; ++i) widen(v + i * (kGroup / Group<T>::kPieces), g.piece[i], T());
}
__device__ __forceinline__ void widen_group(float* v, const Group<AnyFloat>& g, DType type) {
  if (type == DType::kFloat32) {
    widen(v, g.piece[0], float());
    widen(v + 4, g.piece[1], float());
  } else if (type == DType::kBFloat16) {
    widen(v, g.piece[0], BFloat16());
  } else {
    widen(v, g.piece[0], Float16());
  }
}

__device__ __forceinline__ uint4 narrow(const float* v, float) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                    __float_as_uint(v[3]));
}
template <typename T>
__device__ __forceinline__ uint4 narrow(const float* v, T) {
  return make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7]));
}

// Columns column … column + 7 of a row, those that are there: -inf elsewhere. kWhole: all are, and lie on 16
// bytes. kLast: nobody reads them again.
template <typename T, bool kWhole, bool kLast>
__device__ __forceinline__ void load_pieces(uint4* piece, const T* row, int column, int vocab) {
  constexpr int kPieces = Group<T>::kPieces, kValues = kGroup / kPieces;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (kWhole) {
      const uint4* from = reinterpret_cast<const uint4*>(row + column) + i;
      piece[i] = kLast ? __ldcs(from) : *from;
    } else {
      alignas(16) T values[kValues];
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const int at = column + i * kValues + j;
        values[j] = at >= 0 && at < vocab ? row[at] : lowest<T>();
      }
      piece[i] = *reinterpret_cast<const uint4*>(values);
    }
  }
}
template <bool kWhole, bool kLast, typename T>
__device__ __forceinline__ void load_group(Group<T>& g, const void* row, DType, int column, int vocab) {
  load_pieces<T, kWhole, kLast>(g.piece, static_cast<const T*>(row), column, vocab);
}
template <bool kWhole, bool kLast>
__device__ __forceinline__ void load_group(Group<AnyFloat>& g, const void* row, DType type, int column,
                                           int vocab) {
  if (type == DType::kFloat32) {
    load_pieces<float, kWhole, kLast>(g.piece, static_cast<const float*>(row), column, vocab);
  } else if (type == DType::kBFloat16) {
    load_pieces<BFloat16, kWhole, kLast>(g.piece, static_cast<const BFloat16*>(row), column, vocab);
  } else {
    load_pieces<Float16, kWhole, kLast>(g.piece, static_cast<const Float16*>(row), column, vocab);
  }
}

template <bool kWhole, typename T>
__device__ __forceinline__ void store_values(T* row, int column, int vocab, const float* v) {
  constexpr int kPieces = Group<T>::kPieces, kValues = kGroup / kPieces;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = column + i * kValues;
    const uint4 four = narrow(v + i * kValues, T());
    if (kWhole) {
      __stcs(reinterpret_cast<uint4*>(row + at), four);
    } else {
      const T* values = reinterpret_cast<const T*>(&four);
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        if (at + j >= 0 && at + j < vocab) row[at + j] = values[j];
      }
    }
  }
}
template <bool kWhole, typename T>
__device__ __forceinline__ void store_group(T, void* row, DType, int column, int vocab, const float* v) {
  store_values<kWhole>(static_cast<T*>(row), column, vocab, v);
}
template <bool kWhole>
__device__ __forceinline__ void store_group(AnyFloat, void* row, DType type, int column, int vocab,
                                            const float* v) {
  if (type == DType::kFloat32) {
    store_values<kWhole>(static_cast<float*>(row), column, vocab, v);
  } else if (type == DType::kBFloat16) {
    store_values<kWhole>(static_cast<BFloat16*>(row), column, vocab, v);
  } else {
    store_values<kWhole>(static_cast<Float16*>(row), column, vocab, v);
  }
}

// The largest logit of a group; half the instructions where two compare at once. NaN need not show: sums do.
template <typename T>
__device__ __forceinline__ float largest(const Group<T>& g) {
  const uint4& w = g.piece[0];
  const float2 pair = unpack2<T>(max2<T>(max2<T>(w.x, w.y), max2<T>(w.z, w.w)));
  return fmaxf(pair.x, pair.y);
}
template <>
__device__ __forceinline__ float largest(const Group<float>& g) {
  float v[kGroup];
  widen_group(v, g, DType::kFloat32);
  return fmaxf(fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])), fmaxf(fmaxf(v[4], v[5]), fmaxf(v[6], v[7])));
}

__device__ __forceinline__ size_t type_bytes(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// Where a row begins.
template <typename T>
__device__ __forceinline__ void* row_at(T, const void* data, DType type, int64_t stride, int64_t row) {
  const size_t bytes = std::is_same<T, AnyFloat>::value ? type_bytes(type) : sizeof(T);
  const char* at = static_cast<const char*>(data) + row * stride * static_cast<int64_t>(bytes);
  return const_cast<void*>(keep_address(at));
}

// ---- a thread's walk over its row -----------------------------------------------------------------------

// A form's groups one at a time.
template <typename F>
using OneGroup = DistillForm<typename F::T, F::kDivergence, F::kOptions, 1, F::kThreads>;

// Groups of a part of a row that lie in it wholly, on 16 bytes, are taken kGroups at once, `stride` threads
// side by side. The rest one by one: what is left of those where they are no multiple, the row's first and
// last group, and all where the tensors' rows do not begin alike.
struct Walk {
  const void *student, *teacher;  // the row's
  void* grad;
  int shift;          // columns by which group 0 begins before the row
  int begin, end;     // groups of this part
  int first, stride;  // this thread's
  int steps;          // of kGroups groups
  int left;           // groups that are one by one
  bool odd, head;     // the first of those is left over, is the row's first
  bool vector;

  __device__ int column(int group) const { return group * kGroup - shift; }
  __device__ int left_group(int i, int at_once) const {
    if (!vector) return begin + static_cast<int>(threadIdx.x) + i * stride;
    if (odd && i == 0) return first + steps * at_once * stride;
    return head && i == (odd ? 1 : 0) ? begin : end - 1;
  }
};

template <typename F>
__device__ __forceinline__ Walk make_walk(const DistillParams& p, int64_t row, int part) {
  Walk w;
  w.student = row_at(typename F::T(), p.a.student.data, p.a.student.type, p.a.student.stride, row);
  w.teacher = F::kTeacher
                  ? row_at(typename F::T(), p.a.teacher.data, p.a.teacher.type, p.a.teacher.stride, row)
                  : nullptr;
  w.grad = p.a.grad ? row_at(typename F::T(), p.a.grad, p.a.student.type, p.a.grad_stride, row) : nullptr;
  w.vector = p.vector;
  w.shift = p.vector
                ? static_cast<int>(reinterpret_cast<uintptr_t>(w.student) % 16 / type_bytes(p.a.student.type))
                : 0;
  const int columns = static_cast<int>(p.a.vocab) + w.shift, groups = (columns + kGroup - 1) / kGroup;
  w.begin = min(groups, part * p.part_groups);
  w.end = min(groups, w.begin + p.part_groups);
  w.stride = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  w.head = p.vector && w.begin == 0 && w.shift > 0;
  const bool tail = p.vector && w.end == groups && columns % kGroup != 0 && !(w.head && groups == 1);
  w.first = w.begin + (w.head ? 1 : 0) + thread;
  const int last = w.end - (tail ? 1 : 0);
  const int count = w.first < last ? (last - w.first - 1) / w.stride + 1 : 0;
  w.steps = p.vector ? count / F::kGroups : 0;
  w.odd = count % F::kGroups != 0;
  w.left = (w.odd ? 1 : 0) + (thread == 0 ? (w.head ? 1 : 0) + (tail ? 1 : 0) : 0);
  if (!p.vector) w.left = count;
  return w;
}

// kGroups groups of both tensors and their columns. whole: all lie wholly in the row, on 16 bytes; kAllWhole:
// that is known.
template <typename Form, bool kAllWhole>
struct Step {
  using F = Form;
  static constexpr bool kWhole = kAllWhole;
  Group<typename F::T> student[F::kGroups], teacher[F::kGroups];
  int column[F::kGroups];
  bool whole = kAllWhole;

  __device__ __forceinline__ void values(const DistillParams& p, float (&z)[F::kValues],
                                         float (&t)[F::kValues]) const {
#pragma unroll
    for (int i = 0; i < F::kGroups; ++i) {
      widen_group(z + i * kGroup, student[i], p.a.student.type);
      if (F::kTeacher) widen_group(t + i * kGroup, teacher[i], p.a.teacher.type);
    }
  }
  // Whether value i is one of the row's.
  __device__ __forceinline__ bool inside(const DistillParams& p, int i) const {
    const int at = column[i / kGroup] + i % kGroup;
    return kWhole || (at >= 0 && at < static_cast<int>(p.a.vocab));
  }
};

template <typename T>
__device__ __forceinline__ int pieces_of(T, DType) {
  return Group<T>::kPieces;
}
__device__ __forceinline__ int pieces_of(AnyFloat, DType type) { return type == DType::kFloat32 ? 2 : 1; }

enum class Hold { kPut, kGet };

// The first `count` of a group's pieces to slots, or from there: slot, slot + stride, …
template <Hold kHold, int kPieces>
__device__ __forceinline__ void hold_pieces(uint4 (&piece)[kPieces], int count, int slot, int stride) {
  uint4* slots = reinterpret_cast<uint4*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (i == count) break;
    if (kHold == Hold::kPut) {
      slots[slot + i * stride] = piece[i];
    } else {
      piece[i] = slots[slot + i * stride];
    }
  }
}

// Body(step) for each step of a thread, last ones first where kBackward. kHold: groups of the first p.held
// steps are put into shared memory, or come from there.
template <typename F, Hold kHold, bool kBackward, bool kLast, typename Body>
__device__ __forceinline__ void each_step(const DistillParams& p, const Walk& walk, const Body& body) {
  using T = typename F::T;
  const int vocab = static_cast<int>(p.a.vocab);
  const DType student = p.a.student.type, teacher = p.a.teacher.type;
  const auto left_over = [&] {
    for (int i = 0; i < walk.left; ++i) {
      Step<OneGroup<F>, false> step;
      step.column[0] = walk.column(walk.left_group(i, F::kGroups));
      step.whole = walk.vector && walk.odd && i == 0;
      const auto load = [&](auto whole) {
        load_group<whole, kLast>(step.student[0], walk.student, student, step.column[0], vocab);
        if (F::kTeacher)
          load_group<whole, kLast>(step.teacher[0], walk.teacher, teacher, step.column[0], vocab);
      };
      step.whole ? load(std::true_type()) : load(std::false_type());
      body(step);
    }
  };
  if (kBackward) left_over();
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int students = pieces_of(T(), student), teachers = F::kTeacher ? pieces_of(T(), teacher) : 0;
  for (int i = 0; i < walk.steps; ++i) {
    const int k = kBackward ? walk.steps - 1 - i : i;
    Step<F, true> step;
#pragma unroll
    for (int j = 0; j < F::kGroups; ++j) {
      step.column[j] = walk.column(walk.first + (k * F::kGroups + j) * walk.stride);
    }
    const auto load = [&](auto last) {
#pragma unroll
      for (int j = 0; j < F::kGroups; ++j) {
        load_group<true, last>(step.student[j], walk.student, student, step.column[j], vocab);
        if (F::kTeacher)
          load_group<true, last>(step.teacher[j], walk.teacher, teacher, step.column[j], vocab);
      }
    };
    if (k >= p.held) {
      load(std::bool_constant<kLast>());
    } else if (kHold == Hold::kPut) {
      load(std::true_type());  // what is held here need not stay in L2
    }
    if (k < p.held) {
#pragma unroll
      for (int j = 0; j < F::kGroups; ++j) {
        const int slot = thread + (k * F::kGroups + j) * (students + teachers) * threads;
        hold_pieces<kHold>(step.student[j].piece, students, slot, threads);
        if (F::kTeacher)
          hold_pieces<kHold>(step.teacher[j].piece, teachers, slot + students * threads, threads);
      }
    }
    body(step);
  }
  if (!kBackward) left_over();
}

// Logits as float32 as they are exponentiated: of capped ones the tanh, scaled ones times their factor.
template <typename S>
__device__ __forceinline__ void prepare(const DistillParams& p, const S& step, float (&z)[S::F::kValues],
                                        float factor, bool scaled) {
  if constexpr (S::F::kOptions) {
    if (!p.cap && !scaled) return;
#pragma unroll
    for (int i = 0; i < S::F::kValues; ++i) {
      z[i] = p.cap ? tanh_approx(z[i] * factor) : z[i] * factor;
      if (!step.inside(p, i)) z[i] = minus_infinity();
    }
  }
}

template <typename S>
__device__ __forceinline__ void logits(const DistillParams& p, const S& step, float (&z)[S::F::kValues],
                                       float (&t)[S::F::kValues]) {
  step.values(p, z, t);
  prepare(p, step, z, p.student_factor, p.student_scaled);
  if (S::F::kTeacher) prepare(p, step, t, p.teacher_factor, p.teacher_scaled);
}

// ---- pass 1: sums ---------------------------------------------------------------------------------------

// Relative to their bases: with e = 2^x, x = z rate - base, of student, teacher, and of the student at
// temperature 1, sums of e; of e x; of e times the difference of exponents without their bases; of z.
template <typename Number>
struct Sums {
  float student_base, teacher_base, plain_base;
  Number student, teacher, plain, mean, cross, total;
};

template <typename Number>
__device__ __forceinline__ Sums<Number> no_sums() {
  const float lowest = minus_infinity();
  return {lowest, lowest, lowest, 0, 0, 0, 0, 0, 0};
}

struct Raised {
  float added;  // sum of 2^x
  float lower;  // what sums so far are multiplied by
  float by;     // how much the base was raised, negated
};

// The base with these logits, whose largest is `top`; x and 2^x relative to it.
template <int kValues>
__device__ __forceinline__ Raised raise(float& base, float top, float rate, const float (&z)[kValues],
                                        float (&x)[kValues], float (&e)[kValues]) {
  const float raised = fmaxf(base, top * rate), at = raised > minus_infinity() ? raised : 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    x[i] = fmaf(z[i], rate, -at);
    e[i] = exp2_approx(x[i]);
  }
  float sum[4] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) sum[i % 4] = i < 4 ? e[i] : sum[i % 4] + e[i];
  const float by = base - at;
  base = raised;
  return {(sum[0] + sum[1]) + (sum[2] + sum[3]), exp2_approx(by), by};
}

template <typename F>
__device__ __forceinline__ float top_of(const Group<typename F::T> (&groups)[F::kGroups],
                                        const float (&z)[F::kValues]) {
  float top = minus_infinity();
  if constexpr (F::kOptions) {
#pragma unroll
    for (int i = 0; i < F::kValues; ++i) top = fmaxf(top, z[i]);
  } else {
#pragma unroll
    for (int i = 0; i < F::kGroups; ++i) top = fmaxf(top, largest(groups[i]));
  }
  return top;
}

template <typename S>
__device__ __forceinline__ void add_step(Sums<float>& sums, const DistillParams& p, const S& step) {
  using F = typename S::F;
  float z[F::kValues], t[F::kValues], x[F::kValues], e[F::kValues];
  logits(p, step, z, t);
  const float top = top_of<F>(step.student, z);
  const bool started = sums.student_base > minus_infinity();
  Raised r = raise(sums.student_base, top, p.student_rate, z, x, e);
  if (F::kOptions && p.entropy) {
    float added = 0.0f;
#pragma unroll
    for (int i = 0; i < F::kValues; ++i) added = fmaf(e[i], fmaxf(x[i], -200.0f), added);
    sums.mean = (sums.mean + (started ? r.by : 0.0f) * sums.student) * r.lower + added;
  }
  if (F::kReverse) {
    float added = 0.0f;
#pragma unroll
    for (int i = 0; i < F::kValues; ++i) {
      const float difference = fmaf(z[i], p.student_rate, -(t[i] * p.teacher_rate));
      added += e[i] > 0.0f ? e[i] * difference : 0.0f;
    }
    sums.cross = (r.lower > 0.0f ? sums.cross * r.lower : 0.0f) + added;
  }
  sums.student = fmaf(sums.student, r.lower, r.added);
  if (F::kTeacher) {
    r = raise(sums.teacher_base, top_of<F>(step.teacher, t), p.teacher_rate, t, x, e);
    sums.teacher = fmaf(sums.teacher, r.lower, r.added);
  }
  if (F::kOptions && p.plain) {
    r = raise(sums.plain_base, top, p.plain_rate, z, x, e);
    sums.plain = fmaf(sums.plain, r.lower, r.added);
  }
  if (F::kOptions && p.smooth) {
#pragma unroll
    for (int i = 0; i < F::kValues; ++i) {
      if (step.inside(p, i)) sums.total += z[i];
    }
  }
}

// ---- from threads, warps, parts to the row ----------------------------------------------------------------

template <typename Number>
__device__ __forceinline__ Sums<double> widened(const Sums<Number>& s) {
  return {s.student_base,
          s.teacher_base,
          s.plain_base,
          static_cast<double>(s.student),
          static_cast<double>(s.teacher),
          static_cast<double>(s.plain),
          static_cast<double>(s.mean),
          static_cast<double>(s.cross),
          static_cast<double>(s.total)};
}

// The largest base of the lanes, and what a lane's sums count relative to it: nothing where its largest
// probability is 0 in float32, whatever they are. Sums without a base are 0 or NaN.
__device__ __forceinline__ float common_base(float& base, double& weight) {
  const float own = base;
  base = warp_max(own);
  const float below = own > minus_infinity() ? own - base : 0.0f;
  weight = below < -126.0f ? 0.0 : static_cast<double>(exp2_precise(below));
  return below;
}

template <typename F>
__device__ __forceinline__ Sums<double> over_lanes(Sums<double> s, const DistillParams& p) {
  double weight;
  const float below = common_base(s.student_base, weight);
  if (F::kOptions && p.entropy) s.mean = warp_sum((s.mean + below * s.student) * weight);
  if (F::kReverse) s.cross = warp_sum(weight > 0.0 ? s.cross * weight : 0.0);
  s.student = warp_sum(s.student * weight);
  if (F::kTeacher) {
    common_base(s.teacher_base, weight);
    s.teacher = warp_sum(s.teacher * weight);
  }
  if (F::kOptions && p.plain) {
    common_base(s.plain_base, weight);
    s.plain = warp_sum(s.plain * weight);
  }
  if (F::kOptions && p.smooth) s.total = warp_sum(s.total);
  return s;
}

// Of all threads of a row; the row's first warp gets it.
template <typename F>
__device__ __forceinline__ Sums<double> over_row(const Sums<float>& mine, const DistillParams& p) {
  Sums<double> sums = over_lanes<F>(widened(mine), p);
  if (blockDim.x == kWarp) return sums;
  LISSOM_SHARED(Sums<double>, warps, [F::kThreads / kWarp]);  // one row a block then
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    sums = threadIdx.x < blockDim.x / kWarp ? warps[threadIdx.x] : no_sums<double>();
    sums = over_lanes<F>(sums, p);
  }
  return sums;
}

struct Means {
  double term, first, second;
};

// Likewise; kAll: every thread gets them.
template <typename F, bool kAll>
__device__ __forceinline__ Means over_row(Means means) {
  means.term = warp_sum(means.term);
  if (F::kMean) {
    means.first = warp_sum(means.first);
    means.second = warp_sum(means.second);
  }
  if (blockDim.x == kWarp) return means;
  LISSOM_SHARED(Means, warps, [F::kThreads / kWarp]);
  LISSOM_SHARED(Means, row, [1]);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = means;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    means = threadIdx.x < blockDim.x / kWarp ? warps[threadIdx.x] : Means{0.0, 0.0, 0.0};
    means.term = warp_sum(means.term);
    if (F::kMean) {
      means.first = warp_sum(means.first);
      means.second = warp_sum(means.second);
    }
  }
  if (kAll) {
    if (threadIdx.x == 0) row[0] = means;
    __syncthreads();
    means = row[0];
  }
  return means;
}

__device__ __forceinline__ void store_part(double* record, const Sums<double>& s, double label_logit) {
  record[0] = s.student_base;
  record[1] = s.teacher_base;
  record[2] = s.plain_base;
  record[3] = s.student;
  record[4] = s.teacher;
  record[5] = s.plain;
  record[6] = s.mean;
  record[7] = s.cross;
  record[8] = s.total;
  record[9] = label_logit;
}

// Of the parts of a row, lane i's first.
__device__ __forceinline__ Sums<double> load_part(const double* records, int parts) {
  const int part = threadIdx.x % kWarp;
  if (part >= parts) return no_sums<double>();
  const double* r = records + part * kFields;
  return {static_cast<float>(r[0]),
          static_cast<float>(r[1]),
          static_cast<float>(r[2]),
          r[3],
          r[4],
          r[5],
          r[6],
          r[7],
          r[8]};
}

__device__ __forceinline__ double sum_of_parts(const double* records, int parts, int field) {
  const int part = threadIdx.x % kWarp;
  return warp_sum(part < parts ? records[part * kFields + field] : 0.0);
}

// ---- what later passes need to know of a row ------------------------------------------------------------

struct Row {
  // q S = lift 2^y for y = t rate - teacher_base, S the student's sum of 2^x, so that
  // ln p - ln q = (x - y) ln 2 + shift. The bases hold what is left of the sums' quotient to be rounded.
  float student_base, teacher_base, plain_base, lift, shift, per_student, per_plain;
  float kl, entropy, entropy_shift, ce, smooth, label;  // factors of the gradient; ln p + H: (x + shift) ln 2
  float about;                                          // near reverse KL's mean, as y is off x
  double per_term;                                      // of the loss's terms
  double other_loss;                                    // what the loss is besides
};

// The loss but for the divergence's terms.
template <typename F>
__device__ __forceinline__ double other_terms(const Sums<double>& sums, double inverse,
                                              const DistillParams& p, double label_logit, double term_scale,
                                              double ce_scale) {
  constexpr double kLn2Double = 0.6931471805599453;
  double loss = 0.0;
  if (p.entropy) {
    loss += p.entropy_loss * term_scale * (log2_of_sum(sums.student) - sums.mean * inverse) * kLn2Double;
  }
  if (p.ce) {
    double target = label_logit;
    if (p.smooth) {
      const double mean = sums.total / static_cast<double>(p.a.vocab);
      target = p.a.label_smoothing * mean;
      if (p.a.label_smoothing != 1.0) target += (1.0 - p.a.label_smoothing) * label_logit;
    }
    const double base = p.plain ? sums.plain_base : sums.student_base;
    const double sum = p.plain ? sums.plain : sums.student;
    loss += p.ce_loss * ce_scale * (base + log2_of_sum(sum) - target * p.plain_rate) * kLn2Double;
  }
  return loss;
}

template <typename F>
__device__ __forceinline__ Row make_row(const Sums<double>& sums, const DistillParams& p, bool valid,
                                        double label_logit, double term_scale, double ce_scale) {
  Row row;
  valid = valid && sums.student > 0.0;
  double inverse = reciprocal(sums.student), shifted = sums.teacher_base;
  if (F::kTeacher) {
    valid = valid && sums.teacher > 0.0;
    shifted += log2_of_sum(sums.teacher * inverse);
  }
  const double nan = static_cast<double>(not_a_number());
  inverse = valid ? inverse : nan;
  row.per_term = p.kl_loss * term_scale * (F::kJs ? (valid ? 1.0 : nan) : inverse);
  row.student_base = sums.student_base;
  row.teacher_base = static_cast<float>(shifted);
  row.plain_base = F::kOptions && p.plain ? sums.plain_base : sums.student_base;
  const double rest = static_cast<double>(row.teacher_base) - shifted;
  row.lift = exp2_precise(static_cast<float>(rest));
  row.shift = static_cast<float>(rest * -0.6931471805599453);
  row.per_student = static_cast<float>(inverse);
  const float kl = valid ? static_cast<float>(p.kl_grad * term_scale) : not_a_number();
  row.kl = F::kDivergence == DistillDivergence::kForward ? kl * row.per_student : kl;
  row.about = 0.0f;
  if (F::kReverse) {
    row.about = static_cast<float>(sums.cross * inverse - static_cast<double>(sums.student_base) +
                                   static_cast<double>(row.teacher_base));
  }
  row.per_plain = row.per_student;
  row.other_loss = 0.0;
  row.entropy = row.entropy_shift = row.ce = row.smooth = row.label = 0.0f;
  if (F::kOptions) {
    if (p.plain) row.per_plain = valid ? static_cast<float>(reciprocal(sums.plain)) : not_a_number();
    row.entropy = valid ? static_cast<float>(p.entropy_grad * term_scale) : not_a_number();
    row.entropy_shift = static_cast<float>(-sums.mean * inverse);
    const double ce = p.ce_grad * ce_scale;
    row.ce = valid ? static_cast<float>(ce) : not_a_number();
    row.smooth = static_cast<float>(ce * p.a.label_smoothing / static_cast<double>(p.a.vocab));
    row.label = static_cast<float>(ce * (1.0 - p.a.label_smoothing));
    const double others = other_terms<F>(sums, inverse, p, label_logit, term_scale, ce_scale);
    row.other_loss = valid ? others : nan;
  }
  return row;
}

// As prepare() has it, in float64.
__device__ __forceinline__ double logit_of_label(const DistillParams& p, const void* row, int64_t label) {
  double z;
  if (p.a.student.type == DType::kFloat32) {
    z = static_cast<const float*>(row)[label];
  } else if (p.a.student.type == DType::kBFloat16) {
    z = to_float(static_cast<const BFloat16*>(row)[label]);
  } else {
    z = to_float(static_cast<const Float16*>(row)[label]);
  }
  return p.cap ? tanh(z * p.student_factor) : p.student_scaled ? z * p.student_factor : z;
}

// ---- pass 2: terms, and gradients that need no mean -----------------------------------------------------

// Sums of a thread, float32.
struct Terms {
  float difference, linear, first, second;
};

__device__ __forceinline__ float student_exponent(const DistillParams& p, const Row& row, float z) {
  return fmaf(z, p.student_rate, -row.student_base);
}
__device__ __forceinline__ float teacher_exponent(const DistillParams& p, const Row& row, float t) {
  return fmaf(t, p.teacher_rate, -row.teacher_base);
}
// ln p - ln q
__device__ __forceinline__ float log_quotient(const Row& row, float x, float y) {
  return fmaf(x - y, kLn2, row.shift);
}

// Adds a term, and of means what they are made of: for reverse KL p (d - about) / ln 2 and p, times S; for
// JS p ln(p / m) + m - p. p - q times S.
template <typename F>
__device__ __forceinline__ float add_term(Terms& terms, const DistillParams& p, const Row& row, float z,
                                          float t) {
  const float x = student_exponent(p, row, z), y = teacher_exponent(p, row, t);
  const float d = log_quotient(row, x, y);
  if constexpr (F::kCoarse) {
    const float of_student = exp2_approx(x), of_teacher = exp2_approx(y);  // without the lift
    const Comparison c = compare_coarse(of_student, of_teacher, d, row.lift);
    terms.difference += c.difference;
    if (of_teacher > 0.0f) terms.linear += c.linear;
    return c.difference;
  }
  float of_student = exp2_approx(x), of_teacher = exp2_approx(y) * row.lift;
  if constexpr (F::kJs) {
    of_student *= row.per_student;
    of_teacher *= row.per_student;
    const JsTerms js = js_terms(of_student, of_teacher, -d, p.beta);
    terms.difference += p.beta * js.teacher + (1.0f - p.beta) * js.student;
    terms.first += js.student;
    return 0.0f;
  } else if constexpr (F::kReverse) {
    const Comparison c = compare(of_teacher, of_student, -d);
    terms.difference += c.difference;
    if (of_student > 0.0f) terms.linear += c.linear;
    terms.first += of_student > 0.0f ? of_student * (x - (y + row.about)) : 0.0f;
    terms.second += of_student;
    return -c.difference;
  } else {
    const Comparison c = compare(of_student, of_teacher, d);
    terms.difference += c.difference;
    if (of_teacher > 0.0f) terms.linear += c.linear;
    return c.difference;
  }
}

// p, and of reverse KL p (d - mean) / ln 2, of JS p (ln(p / m) - mean). Of the two exponents that make d the
// mean is added to that of q, which is as large where it is large. high + low: the mean, or its like.
template <typename F>
__device__ __forceinline__ float2 about_mean(const DistillParams& p, const Row& row, float z, float t,
                                             float high, float low) {
  const float x = student_exponent(p, row, z), y = teacher_exponent(p, row, t);
  const float of_student = exp2_approx(x) * row.per_student;
  if (F::kReverse) {
    const float above = x - ((y + high) + low);
    return make_float2(of_student, of_student > 0.0f ? of_student * above : 0.0f);
  }
  const float of_teacher = exp2_approx(y) * (row.lift * row.per_student);
  const float d = log_quotient(row, x, y);
  return make_float2(of_student, js_deviation(of_student, of_teacher, -d, p.beta, high, low));
}

// The divergence's gradient g with those of the other terms, and back through the cap.
template <typename S>
__device__ __forceinline__ void finish(const DistillParams& p, const Row& row, const S& step, int label,
                                       const float (&z)[S::F::kValues], float (&g)[S::F::kValues]) {
  using F = typename S::F;
  if constexpr (F::kOptions) {
    // Branches are the whole grid's, and so around loops, not in them.
    float x[F::kValues], of_student[F::kValues];
#pragma unroll
    for (int i = 0; i < F::kValues; ++i) {
      x[i] = student_exponent(p, row, z[i]);
      of_student[i] = exp2_approx(x[i]) * row.per_student;
    }
    if (p.entropy) {
#pragma unroll
      for (int i = 0; i < F::kValues; ++i) {
        g[i] += of_student[i] * row.entropy * (fmaxf(x[i], -200.0f) + row.entropy_shift);
      }
    }
    if (p.plain) {
#pragma unroll
      for (int i = 0; i < F::kValues; ++i) {
        of_student[i] = exp2_approx(fmaf(z[i], p.plain_rate, -row.plain_base)) * row.per_plain;
      }
    }
    if (p.ce) {
#pragma unroll
      for (int i = 0; i < F::kValues; ++i) {
        g[i] += of_student[i] * row.ce - row.smooth;
        if (step.column[i / kGroup] + i % kGroup == label) g[i] -= row.label;
      }
    }
    if (p.cap) {
      float raw[F::kValues], unused[F::kValues];
      step.values(p, raw, unused);
#pragma unroll
      for (int i = 0; i < F::kValues; ++i) g[i] *= tanh_slope(raw[i] * p.student_factor, z[i]);
    }
  }
}

template <typename S>
__device__ __forceinline__ void store_step(const DistillParams& p, void* grad, const S& step,
                                           const float (&g)[S::F::kValues]) {
#pragma unroll
  for (int i = 0; i < S::F::kGroups; ++i) {
    if (S::kWhole || step.whole) {
      store_group<true>(typename S::F::T(), grad, p.a.student.type, step.column[i],
                        static_cast<int>(p.a.vocab), g + i * kGroup);
    } else {
      store_group<false>(typename S::F::T(), grad, p.a.student.type, step.column[i],
                         static_cast<int>(p.a.vocab), g + i * kGroup);
    }
  }
}

// Terms of a step, and its gradient where it can be written now.
template <typename S>
__device__ __forceinline__ void terms_step(Terms& terms, const DistillParams& p, void* grad, const Row& row,
                                           int label, const S& step) {
  using F = typename S::F;
  float z[F::kValues], t[F::kValues], g[F::kValues];
  logits(p, step, z, t);
#pragma unroll
  for (int i = 0; i < F::kValues; ++i) {
    g[i] = F::kTeacher ? add_term<F>(terms, p, row, z[i], t[i]) * row.kl : 0.0f;
  }
  if (F::kMean || p.a.grad == nullptr) return;
  finish(p, row, step, label, z, g);
  store_step(p, grad, step, g);
}

// Zeros in place of a gradient.
template <typename F>
__device__ __forceinline__ void clear_row(const DistillParams& p, const Walk& walk) {
  float zeros[F::kValues] = {};
  for (int k = 0; k < walk.steps; ++k) {
    Step<F, true> step;
#pragma unroll
    for (int j = 0; j < F::kGroups; ++j) {
      step.column[j] = walk.column(walk.first + (k * F::kGroups + j) * walk.stride);
    }
    store_step(p, walk.grad, step, zeros);
  }
  for (int i = 0; i < walk.left; ++i) {
    Step<OneGroup<F>, false> step;
    step.column[0] = walk.column(walk.left_group(i, F::kGroups));
    float none[kGroup] = {};
    store_step(p, walk.grad, step, none);
  }
}

__device__ __forceinline__ float high_part(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float low_part(double x) {
  return static_cast<float>(x - static_cast<double>(static_cast<float>(x)));
}

__device__ __forceinline__ int64_t label_of(const DistillParams& p, int64_t row) {
  return p.a.wide_labels ? static_cast<const int64_t*>(p.a.labels)[row]
                         : static_cast<const int32_t*>(p.a.labels)[row];
}
__device__ __forceinline__ bool is_ignored(const DistillParams& p, int64_t row) {
  return p.a.labels != nullptr && label_of(p, row) == p.a.ignore_index;
}

// ---- the kernel -----------------------------------------------------------------------------------------

// Passes first_pass to last_pass of a part of row `index`. A home is where the row's groups are between
// passes, and how what its threads know becomes what the row is:
//
//   each<hold, backward, last>(p, body)   body(step) for each step of a thread
//   sums(mine, p)                         of all of the row's threads; its first warp gets them
//   means<all>(mine)                      likewise, of the part; with `all` first and second of the row, for
//   all clear(p)                              zeros as the gradient of an ignored row leave() the row is done
//
// `grad` may be the student's logits: each thread reads what it writes, before; and labels' logits are read
// before the row's threads first meet.
template <typename F, typename Home>
__device__ __forceinline__ void row_passes(const DistillParams& p, Home& home, int64_t index, int part) {
  const bool split = Home::kSplits && p.parts > 1;
  const bool writes = p.a.grad != nullptr && p.last_pass >= (F::kMean ? 4 : 2);
  int64_t label = 0;
  if (p.a.labels != nullptr) {
    label = label_of(p, index);
    if (label == p.a.ignore_index) {  // a row that is ignored is not read
      if (p.last_pass >= 2 && p.first_pass <= 2 && threadIdx.x == 0) p.a.loss[index * p.parts + part] = 0.0;
      if (writes) home.clear(p);
      return;
    }
  }
  const bool valid = label >= 0 && label < p.a.vocab;
  const auto records = [&] { return p.a.partials + index * p.parts * kFields; };
  const auto record = [&] { return records() + part * kFields; };

  // ---- sums
  double label_logit = 0.0;
  Sums<double> sums = no_sums<double>();
  if (p.first_pass == 1) {
    if (F::kOptions && p.ce && valid && threadIdx.x < kWarp) {
      label_logit = logit_of_label(p, home.student, label);
    }
    Sums<float> mine = no_sums<float>();
    home.template each<Hold::kPut, false, false>(p, [&](const auto& step) { add_step(mine, p, step); });
    sums = home.sums(mine, p);
    if (p.last_pass == 1) {
      if (threadIdx.x == 0) store_part(record(), sums, label_logit);
      return;
    }
  } else if (threadIdx.x < kWarp) {
    sums = over_lanes<F>(load_part(records(), p.parts), p);
    label_logit = records()[9];
  }

  double term_scale = 1.0, ce_scale = 1.0;
  if (p.a.scales != nullptr) {
    term_scale = p.a.scales[0];
    ce_scale = p.a.scales[1];
  }
  Row row;
  if (threadIdx.x < kWarp) row = make_row<F>(sums, p, valid, label_logit, term_scale, ce_scale);
  if (blockDim.x == kWarp) {
    __syncwarp();  // all have read the label's logit
  } else {
    LISSOM_SHARED(Row, shared_row, [1]);
    if (threadIdx.x == 0) shared_row[0] = row;
    __syncthreads();
    row = shared_row[0];
  }

  // ---- terms
  Means means = {0.0, 0.0, 0.0};
  if (p.first_pass <= 2) {
    Terms terms = {0.0f, 0.0f, 0.0f, 0.0f};
    if (F::kTeacher || writes) {
      home.template each<Hold::kGet, true, !F::kMean>(
          p, [&](const auto& step) { terms_step(terms, p, home.grad, row, static_cast<int>(label), step); });
    }
    const float linear = F::kCoarse ? terms.linear * row.lift : terms.linear;
    means = {static_cast<double>(terms.difference) - linear, terms.first, terms.second};
    means = home.template means<F::kMean>(means);
    if (threadIdx.x == 0) {
      const double loss = F::kTeacher ? row.per_term * means.term : 0.0;
      p.a.loss[index * p.parts + part] = part == 0 ? loss + row.other_loss : loss;
      if (F::kMean && split) {
        record()[10] = means.first;
        record()[11] = means.second;
      }
    }
  }

  // ---- gradients that need a mean
  if constexpr (F::kMean) {
    if (p.last_pass < 3) return home.leave();
    if (p.first_pass > 2) {
      means.first = sum_of_parts(records(), p.parts, 10);
      means.second = sum_of_parts(records(), p.parts, 11);
    }
    double mean = means.first;
    if (F::kReverse) mean = static_cast<double>(row.about) + means.first / means.second;
    if (F::kJs) {
      if (p.first_pass <= 3) {
        Terms terms = {0.0f, 0.0f, 0.0f, 0.0f};
        home.template each<Hold::kGet, false, false>(p, [&](const auto& step) {
          using S = std::decay_t<decltype(step)>;
          float z[S::F::kValues], t[S::F::kValues];
          logits(p, step, z, t);
#pragma unroll
          for (int i = 0; i < S::F::kValues; ++i) {
            const float2 both = about_mean<F>(p, row, z[i], t[i], high_part(mean), low_part(mean));
            terms.first += both.y;
            terms.second += both.x;
          }
        });
        means = home.template means<true>(Means{0.0, terms.first, terms.second});
        if (split && threadIdx.x == 0) {
          record()[12] = means.first;
          record()[13] = means.second;
        }
      } else {
        means.first = sum_of_parts(records(), p.parts, 12);
        means.second = sum_of_parts(records(), p.parts, 13);
      }
      mean += means.first / means.second;
    }
    if (p.last_pass < 4) return home.leave();
    home.template each<Hold::kGet, true, true>(p, [&](const auto& step) {
      using S = std::decay_t<decltype(step)>;
      float z[S::F::kValues], t[S::F::kValues], g[S::F::kValues];
      logits(p, step, z, t);
#pragma unroll
      for (int i = 0; i < S::F::kValues; ++i) {
        g[i] = about_mean<F>(p, row, z[i], t[i], high_part(mean), low_part(mean)).y * row.kl;
      }
      finish(p, row, step, static_cast<int>(label), z, g);
      store_step(p, home.grad, step, g);
    });
  }
  home.leave();
}

// A block's, or a warp's: groups in shared memory and in L2.
template <typename F>
struct BlockHome {
  static constexpr bool kSplits = true;
  Walk walk;
  const void* student;
  void* grad;

  template <Hold kHold, bool kBackward, bool kLast, typename Body>
  __device__ __forceinline__ void each(const DistillParams& p, const Body& body) const {
    each_step<F, kHold, kBackward, kLast>(p, walk, body);
  }
  __device__ __forceinline__ Sums<double> sums(const Sums<float>& mine, const DistillParams& p) const {
    return over_row<F>(mine, p);
  }
  template <bool kAll>
  __device__ __forceinline__ Means means(const Means& mine) const {
    return over_row<F, kAll>(mine);
  }
  __device__ __forceinline__ void clear(const DistillParams& p) const { clear_row<F>(p, walk); }
  __device__ __forceinline__ void leave() const {}
};

// Block (x, y), grid (row / y, part): passes of y rows, x threads for each; of a part where there are
// several, one pass a launch.
template <typename F>
__global__ void __launch_bounds__(F::kThreads, 1) distill_kernel(DistillParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= p.a.rows) return;
  const int part = static_cast<int>(blockIdx.y);
  const Walk walk = make_walk<F>(p, index, part);
  BlockHome<F> home = {walk, walk.student, walk.grad};
  row_passes<F>(p, home, index, part);
}

}  // namespace lissom::cuda
