// Hopper: every row is read once and stays on chip, up to 256k columns and more.
//
// A row is a cluster's: each of its 1, 2, 4 or 8 blocks has a slice of both logits in shared memory. ::
//
//            student              teacher
//   block 0  |chunk 0 | … | n|    |chunk 0 | … | n|     a chunk of both: one barrier, one step of the threads
//   block 1  |chunk 0 | … | n|    |chunk 0 | … | n|
//
//   1  one thread asks the copy engine for all chunks, in order; sums follow chunk by chunk as they arrive
//   2  each block's sums become its record; the cluster meets; every block reads all records (distributed
//      shared memory) and works out the same row; means likewise, where there are any
//   3  all other passes read shared memory; the loss is a sum of blocks' parts
//
// A block waits twice: for its first chunk, and for the cluster. Two more blocks of other rows share its
// multiprocessor, where shared memory has room for three, and compute meanwhile: a row's load overlaps other
// rows' arithmetic without a loop over rows. By count, at 128256 columns of bfloat16 and 8 blocks a cluster:
// 64 KB a slice, three of them 192 of the 227 KB; 16 clusters side by side, since 132 multiprocessors come in
// groups of 16 or 18; 48 rows under way, each for 8.8 us where 8192 rows are to take 1.5 ms. A third of a
// multiprocessor's instructions for a slice are 2.6 us; the wait for the first chunk, and for the cluster
// with what one warp works out for all, are some 2 us each.
//
// What is computed is in distill_loss_kernel.cuh.
#pragma once

#include "distill_loss_kernel.cuh"
#include "hopper.cuh"

#if defined(LISSOM_CUDA_EMULATOR)
#include "hopper_primitives.h"
#endif

namespace lissom::cuda {

constexpr int kMostCluster = 8;  // that every Hopper GPU takes
constexpr int kMostChunks = 32;  // of a slice

// A block's share of a row, and where its chunks are: offsets in bytes from the start of shared memory.
struct Slice {
  int begin, end;                    // groups of the row
  int student_bytes, teacher_bytes;  // of a group
  int chunk_groups;

  LISSOM_HD static Slice of(int rank, int cluster, int groups, int student_bytes, int teacher_bytes,
                            int chunk_groups) {
    const int each = (groups + cluster - 1) / cluster;
    const int begin = rank * each < groups ? rank * each : groups;
    const int end = begin + each < groups ? begin + each : groups;
    return {begin, end, student_bytes, teacher_bytes, chunk_groups};
  }
  LISSOM_HD int groups() const { return end - begin; }
  LISSOM_HD int chunks() const { return (groups() + chunk_groups - 1) / chunk_groups; }
  LISSOM_HD int chunk_size(int chunk) const {  // groups
    const int left = groups() - chunk * chunk_groups;
    return left < chunk_groups ? left : chunk_groups;
  }
  // The student's groups, then the teacher's.
  LISSOM_HD int student_at(int group) const { return group * student_bytes; }
  LISSOM_HD int teacher_at(int group) const { return groups() * student_bytes + group * teacher_bytes; }
  LISSOM_HD int bytes() const { return groups() * (student_bytes + teacher_bytes); }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LISSOM_CUDA_EMULATOR)

// Pieces of a group of `count`, from shared memory.
template <int kPieces>
__device__ __forceinline__ void read_pieces(uint4 (&piece)[kPieces], int count, int offset) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (i < count) piece[i] = reinterpret_cast<const uint4*>(dynamic_shared() + offset)[i];
  }
}

template <typename F>
struct ClusterHome {
  using T = typename F::T;
  static constexpr bool kSplits = false;
  Slice slice;
  const void *student, *teacher;
  void* grad;
  uint64_t* barriers;
  int cluster;
  int meetings;  // of the cluster, still to come

  // kGroups groups of a slice, `stride` apart.
  template <typename S>
  __device__ __forceinline__ void read(S& step, const DistillParams& p, int group, int stride) const {
#pragma unroll
    for (int j = 0; j < S::F::kGroups; ++j) {
      const int at = group + j * stride;
      step.column[j] = (slice.begin + at) * kGroup;
      read_pieces(step.student[j].piece, pieces_of(T(), p.a.student.type), slice.student_at(at));
      if (F::kTeacher) {
        read_pieces(step.teacher[j].piece, pieces_of(T(), p.a.teacher.type), slice.teacher_at(at));
      }
    }
  }

  // One thread: all of the slice, chunk by chunk.
  __device__ __forceinline__ void load() const {
    for (int chunk = 0; chunk < slice.chunks(); ++chunk) {
      const int group = chunk * slice.chunk_groups, size = slice.chunk_size(chunk);
      const int64_t first = slice.begin + group;
      uint64_t* barrier = &barriers[chunk];
      mbarrier_expect(barrier, size * (slice.student_bytes + slice.teacher_bytes));
      copy_bulk(dynamic_shared() + slice.student_at(group),
                static_cast<const char*>(student) + first * slice.student_bytes, size * slice.student_bytes,
                barrier);
      if (F::kTeacher) {
        copy_bulk(dynamic_shared() + slice.teacher_at(group),
                  static_cast<const char*>(teacher) + first * slice.teacher_bytes, size * slice.teacher_bytes,
                  barrier);
      }
    }
  }

  template <Hold kHold, bool kBackward, bool kLast, typename Body>
  __device__ __forceinline__ void each(const DistillParams& p, const Body& body) const {
    const int stride = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int chunks = slice.chunks();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (kHold == Hold::kPut) mbarrier_wait(&barriers[chunk], 0);
      const int group = chunk * slice.chunk_groups + thread;
      if (group + (F::kGroups - 1) * stride < slice.groups()) {
        Step<F, true> step;
        read(step, p, group, stride);
        body(step);
      } else if (F::kGroups > 1) {
        for (int at = group; at < slice.groups(); at += stride) {
          Step<OneGroup<F>, true> step;
          read(step, p, at, stride);
          body(step);
        }
      }
    }
  }

  // Blocks' records become the lanes' of each one's first warp. None leaves before all have read all.
  template <typename Read>
  __device__ __forceinline__ void meet(const Read& read_record) {
    __syncwarp();
    cluster_sync();
    if (static_cast<int>(threadIdx.x) < cluster) read_record(static_cast<int>(threadIdx.x));
    __syncwarp();
    if (--meetings == 0) cluster_arrive();
  }
  __device__ __forceinline__ void leave() const {
    __syncwarp();
    if (cluster > 1) cluster_wait();
  }

  __device__ __forceinline__ Sums<double> sums(const Sums<float>& mine, const DistillParams& p) {
    Sums<double> sums = over_row<F>(mine, p);
    if (cluster == 1) return sums;
    LISSOM_SHARED(Sums<double>, record, [1]);
    if (threadIdx.x == 0) record[0] = sums;
    sums = no_sums<double>();
    meet([&](int block) {
      const Sums<double>& r = record[0];
      sums = {load_cluster(&r.student_base, block), load_cluster(&r.teacher_base, block),
              load_cluster(&r.plain_base, block),   load_cluster(&r.student, block),
              load_cluster(&r.teacher, block),      load_cluster(&r.plain, block),
              load_cluster(&r.mean, block),         load_cluster(&r.cross, block),
              load_cluster(&r.total, block)};
    });
    return threadIdx.x < kWarp ? over_lanes<F>(sums, p) : sums;
  }

  template <bool kAll>
  __device__ __forceinline__ Means means(const Means& mine) {
    if (!kAll || cluster == 1) return over_row<F, kAll>(mine);
    const Means part = over_row<F, false>(mine);
    LISSOM_SHARED(Means, records, [2]);  // of two meetings: nobody has to wait before the second
    LISSOM_SHARED(Means, row, [2]);
    const int which = meetings & 1;
    if (threadIdx.x == 0) records[which] = part;
    Means all = {0.0, 0.0, 0.0};
    meet([&](int block) {
      all.first = load_cluster(&records[which].first, block);
      all.second = load_cluster(&records[which].second, block);
    });
    if (threadIdx.x < kWarp) {
      all.first = warp_sum(all.first);
      all.second = warp_sum(all.second);
      if (threadIdx.x == 0) row[which] = all;
    }
    __syncthreads();
    return {part.term, row[which].first, row[which].second};
  }

  __device__ __forceinline__ void clear(const DistillParams& p) const {
    const float zeros[kGroup] = {};
    for (int at = static_cast<int>(threadIdx.x); at < slice.groups(); at += static_cast<int>(blockDim.x)) {
      store_group<true>(T(), grad, p.a.student.type, (slice.begin + at) * kGroup, 0, zeros);
    }
  }
};

#endif

// Grid: clusters of p.parts blocks, one a row. The body is what is guarded, since the host names kernels.
template <typename F>
__global__ void __launch_bounds__(F::kThreads, 1) distill_cluster_kernel([[maybe_unused]] DistillParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LISSOM_CUDA_EMULATOR)
  LISSOM_SHARED(uint64_t, barriers, [kMostChunks]);
  const int rank = p.parts > 1 ? cluster_rank() : 0;
  const int64_t index = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(p.parts));
  const int student_bytes = kGroup * static_cast<int>(type_bytes(p.a.student.type));
  const int teacher_bytes = F::kTeacher ? kGroup * static_cast<int>(type_bytes(p.a.teacher.type)) : 0;
  ClusterHome<F> home;
  home.slice = Slice::of(rank, p.parts, static_cast<int>(p.a.vocab / kGroup), student_bytes, teacher_bytes,
                         F::kGroups * static_cast<int>(blockDim.x));
  home.student = row_at(typename F::T(), p.a.student.data, p.a.student.type, p.a.student.stride, index);
  home.teacher = F::kTeacher
                     ? row_at(typename F::T(), p.a.teacher.data, p.a.teacher.type, p.a.teacher.stride, index)
                     : nullptr;
  home.grad =
      p.a.grad ? row_at(typename F::T(), p.a.grad, p.a.student.type, p.a.grad_stride, index) : nullptr;
  home.barriers = barriers;
  home.cluster = p.parts;
  home.meetings = 1 + (F::kMean ? 1 : 0) + (F::kJs && p.last_pass > 2 ? 1 : 0);
  if (threadIdx.x == 0) {
    for (int chunk = 0; chunk < home.slice.chunks(); ++chunk) mbarrier_init(&barriers[chunk], 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0 && !is_ignored(p, index)) home.load();
  row_passes<F>(p, home, index, rank);
#endif
}

}  // namespace lissom::cuda
