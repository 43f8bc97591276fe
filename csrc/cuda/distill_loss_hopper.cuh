// Forward KL on Hopper: every row is read once and stays on chip, whatever its length.
//
// A row is a cluster's: each of its 1, 2, 4 or 8 blocks has a slice of both logits in shared memory. ::
//
//            student            teacher
//   block 0  |chunk 0 | … | n|  |chunk 0 | … | n|     a chunk of both: one barrier, one step of the threads
//   block 1  |chunk 0 | … | n|  |chunk 0 | … | n|
//
//   1  one thread asks the copy engine for all chunks, in order; sums follow chunk by chunk as they arrive
//   2  each block's sums become its record; the cluster meets; every block reads all records (distributed
//      shared memory) and works out the same row
//   3  terms and gradient, from shared memory; the block's part of the loss
//
// A block waits twice: for its first chunk, and for the cluster. Two more blocks of other rows share its
// multiprocessor, where shared memory has room for three, and compute meanwhile: a row's load overlaps other
// rows' arithmetic without a loop over rows. By count, at 128256 columns of bfloat16 and 8 blocks a cluster:
// 64 KB a slice, three of them 192 of the 227 KB; 16 clusters, since 132 multiprocessors come in groups of 16
// or 18, of which 8 divide 16: 128 of them; 48 rows under way, each for 8.8 us where 8192 rows are to
// take 1.5 ms, of which the cluster's meeting takes one or two.
//
// The sums, terms and gradients are those of distill_loss_kernel.cuh.
#pragma once

#include "distill_loss_kernel.cuh"
#include "hopper.cuh"

namespace lissom::cuda {

constexpr int kMostCluster = 8;  // that every Hopper GPU takes
constexpr int kMostChunks = 16;  // of a slice

// Where a slice's chunks are; offsets in bytes from the start of shared memory.
struct Slice {
  int begin, end;  // groups of the row
  int group_bytes, chunk_groups;

  LISSOM_HD static Slice of(int rank, int cluster, int groups, int group_bytes, int chunk_groups) {
    const int each = (groups + cluster - 1) / cluster;
    const int begin = rank * each < groups ? rank * each : groups;
    return {begin, begin + each < groups ? begin + each : groups, group_bytes, chunk_groups};
  }
  LISSOM_HD int groups() const { return end - begin; }
  LISSOM_HD int chunks() const { return (groups() + chunk_groups - 1) / chunk_groups; }
  LISSOM_HD int chunk_size(int chunk) const {  // groups
    const int left = groups() - chunk * chunk_groups;
    return left < chunk_groups ? left : chunk_groups;
  }
  // The student's groups, then the teacher's.
  LISSOM_HD int student_at(int group) const { return group * group_bytes; }
  LISSOM_HD int teacher_at(int group) const { return (groups() + group) * group_bytes; }
  LISSOM_HD int bytes() const { return 2 * groups() * group_bytes; }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a block tells the others of its cluster.
struct SliceSums {
  double student_base, teacher_base, student, teacher;
};

// kGroups groups of a slice, each thread's `stride` apart.
template <typename F>
__device__ __forceinline__ void read_slice(Step<F, true>& step, const Slice& slice, int group, int stride) {
  constexpr int kPieces = Group<typename F::T>::kPieces;
#pragma unroll
  for (int j = 0; j < F::kGroups; ++j) {
    const int at = group + j * stride;
    step.column[j] = (slice.begin + at) * kGroup;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      step.student[j].piece[i] = reinterpret_cast<const uint4*>(dynamic_shared() + slice.student_at(at))[i];
      step.teacher[j].piece[i] = reinterpret_cast<const uint4*>(dynamic_shared() + slice.teacher_at(at))[i];
    }
  }
}

// Body(step) for each step of a thread; before the first look at a chunk, arrived(chunk).
template <typename F, typename Arrived, typename Body>
__device__ __forceinline__ void each_chunk(const Slice& slice, const Arrived& arrived, const Body& body) {
  const int stride = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int chunks = slice.chunks();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    arrived(chunk);
    const int group = chunk * slice.chunk_groups + thread;
    if (group + (F::kGroups - 1) * stride < slice.groups()) {
      Step<F, true> step;
      read_slice<F>(step, slice, group, stride);
      body(step);
    } else {
      for (int at = group; at < slice.groups(); at += stride) {
        Step<OneGroup<F>, true> step;
        read_slice<OneGroup<F>>(step, slice, at, stride);
        body(step);
      }
    }
  }
}

#endif

// Grid: clusters of p.parts blocks, one a row; p.part_groups groups of a row for each but the last. The body
// is what is guarded, since the host names kernels.
template <typename F>
__global__ void __launch_bounds__(F::kThreads, 1) distill_cluster_kernel([[maybe_unused]] DistillParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using T = typename F::T;
  static_assert(!F::kOptions && F::kDivergence == DistillDivergence::kForward, "the sums that are exchanged");
  LISSOM_SHARED(uint64_t, barriers, [kMostChunks]);
  LISSOM_SHARED(SliceSums, mine, [1]);
  LISSOM_SHARED(Row, shared_row, [1]);
  const int cluster = p.parts, rank = cluster > 1 ? cluster_rank() : 0;
  const int64_t index = static_cast<int64_t>(blockIdx.x / cluster);
  const Slice slice = Slice::of(rank, cluster, static_cast<int>(p.a.vocab / kGroup), kGroup * sizeof(T),
                                F::kGroups * static_cast<int>(blockDim.x));
  void* grad = p.a.grad ? row_at(p.a.grad, p.a.student.type, p.a.grad_stride, index) : nullptr;

  bool valid = true;
  if (p.a.labels != nullptr) {
    const int64_t label = p.a.wide_labels ? static_cast<const int64_t*>(p.a.labels)[index]
                                          : static_cast<const int32_t*>(p.a.labels)[index];
    valid = label >= 0 && label < p.a.vocab;
    if (label == p.a.ignore_index) {  // the whole cluster leaves: nobody waits
      if (threadIdx.x == 0) p.a.loss[index * cluster + rank] = 0.0;
      for (int at = static_cast<int>(threadIdx.x); grad && at < slice.groups();
           at += static_cast<int>(blockDim.x)) {
        const float zeros[kGroup] = {};
        store_values<true>(static_cast<T*>(grad), (slice.begin + at) * kGroup, 0, zeros);
      }
      return;
    }
  }

  // ---- load
  if (threadIdx.x == 0) {
    for (int chunk = 0; chunk < slice.chunks(); ++chunk) mbarrier_init(&barriers[chunk], 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const char* student =
        static_cast<const char*>(row_at(p.a.student.data, p.a.student.type, p.a.student.stride, index));
    const char* teacher =
        static_cast<const char*>(row_at(p.a.teacher.data, p.a.teacher.type, p.a.teacher.stride, index));
    for (int chunk = 0; chunk < slice.chunks(); ++chunk) {
      const int group = chunk * slice.chunk_groups, bytes = slice.chunk_size(chunk) * slice.group_bytes;
      const int64_t from = static_cast<int64_t>(slice.begin + group) * slice.group_bytes;
      mbarrier_expect(&barriers[chunk], 2 * bytes);
      copy_bulk(dynamic_shared() + slice.student_at(group), student + from, bytes, &barriers[chunk]);
      copy_bulk(dynamic_shared() + slice.teacher_at(group), teacher + from, bytes, &barriers[chunk]);
    }
  }

  // ---- sums
  Sums<float> of_thread = no_sums<float>();
  each_chunk<F>(
      slice, [&](int chunk) { mbarrier_wait(&barriers[chunk], 0); },
      [&](const auto& step) { add_step(of_thread, p, step); });
  Sums<double> sums = over_row<F>(of_thread, p);

  // ---- the row
  if (cluster > 1) {
    if (threadIdx.x == 0) mine[0] = {sums.student_base, sums.teacher_base, sums.student, sums.teacher};
    __syncwarp();
    cluster_sync();
    if (threadIdx.x < kWarp) {
      sums = no_sums<double>();
      if (static_cast<int>(threadIdx.x) < cluster) {
        const int from = static_cast<int>(threadIdx.x);
        sums.student_base = static_cast<float>(load_cluster(&mine[0].student_base, from));
        sums.teacher_base = static_cast<float>(load_cluster(&mine[0].teacher_base, from));
        sums.student = load_cluster(&mine[0].student, from);
        sums.teacher = load_cluster(&mine[0].teacher, from);
      }
      __syncwarp();
      sums = over_lanes<F>(sums, p);
    }
    __syncwarp();
    cluster_arrive();  // this block has read; none leaves before all have
  }
  if (threadIdx.x < kWarp) {
    double term_scale = 1.0, ce_scale = 1.0;
    if (p.a.scales != nullptr) {
      term_scale = p.a.scales[0];
      ce_scale = p.a.scales[1];
    }
    const Row row = make_row<F>(sums, p, valid, 0.0, term_scale, ce_scale);
    if (threadIdx.x == 0) shared_row[0] = row;
  }
  __syncthreads();
  const Row row = shared_row[0];

  // ---- terms and gradient
  Terms terms = {0.0f, 0.0f, 0.0f, 0.0f};
  each_chunk<F>(slice, [](int) {}, [&](const auto& step) { terms_step(terms, p, grad, row, 0, step); });
  Means means = {static_cast<double>(terms.difference) - terms.linear, 0.0, 0.0};
  means = over_row<F, false>(means);
  if (threadIdx.x == 0) p.a.loss[index * cluster + rank] = row.per_term * means.term;
  __syncwarp();
  if (cluster > 1) cluster_wait();
#endif
}

}  // namespace lissom::cuda
