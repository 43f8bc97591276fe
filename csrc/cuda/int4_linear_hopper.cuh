// Many rows on Hopper: wgmma, its first operand, the codes, through registers. Its tests
// pass on an H200; it was not timed there (the benchmark's zero-points are floats, which it does not serve).
//
// A block computes 128 outputs of 128 rows of x; a stage is a chunk of 128 k-values:
//
//   warpgroup 0      copies: codes with the copy engine, a run of bytes for each panel; x with cp.async,
//   swizzled
//                    as wgmma reads it: any strides, and no tensor map
//   warpgroups 1, 2  64 outputs each, a panel to a warp: a lane's words of codes become its registers of A,
//   as
//                    on mma.sync, while the products of the step before run
//
// Group sums and totals of 64 x 128 are 64 registers each. A segment's products end before its sums are
// scaled; the other warpgroup has the tensor cores meanwhile. Full and empty stages are told by mbarriers.
#pragma once

#include "hopper.cuh"
#include "int4_linear_kernel.cuh"

#if defined(LISSOM_CUDA_EMULATOR)
#include "hopper_primitives.h"
#endif

namespace lissom::cuda {

constexpr int kInt4HopperThreads = 384, kInt4HopperRows = 128;
constexpr int kInt4HopperRowBytes = 128;  // 64 k-values of 16 bits, or 128 of int8

// Of x in a stage: [1 or 2 parts of k][128 rows][128 bytes].
template <typename T>
constexpr int kInt4HopperXBytes = kInt4HopperRows * kInt4Chunk * static_cast<int>(sizeof(T));

// x of all stages, or the sums that take its place; codes, terms of whole rows, barriers.
template <typename T>
LISSOM_HD constexpr int int4_hopper_codes_at(int stages) {
  constexpr int kSumBytes = kInt4HopperRows * kInt4SumStride * 4;
  return stages * kInt4HopperXBytes<T> > kSumBytes ? stages * kInt4HopperXBytes<T> : kSumBytes;
}
template <typename T>
LISSOM_HD constexpr int int4_hopper_shared_bytes(const Int4Fragments& layout, int stages) {
  return int4_hopper_codes_at<T>(stages) + stages * (kInt4Panels * layout.chunk_bytes() + 2 * 8) +
         (layout.one_group ? kInt4Panels * layout.term_bytes() : 0);
}

// Where a piece of 16 bytes of x lies in its stage.
LISSOM_HD constexpr int int4_hopper_place(int row, int piece) {
  return (piece / 8 * kInt4HopperRows + row) * kInt4HopperRowBytes + (piece % 8 ^ row % 8) * 16;
}

// kBlocks: of 32 k-values, of a segment. call.stages is at least 3.
template <typename T, int kBlocks>
__global__ void __launch_bounds__(kInt4HopperThreads, 1)
    int4_linear_hopper_kernel([[maybe_unused]] Int4Call call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LISSOM_CUDA_EMULATOR)
  constexpr int kCopying = 128, kMultiplying = kInt4HopperThreads - kCopying;  // threads
  constexpr int kBarrierOfMultiplying = 1;
  constexpr bool kInt8 = sizeof(T) == 1;
  constexpr int kXBytes = kInt4HopperXBytes<T>;
  const Int4Fragments& layout = call.layout;
  const int chunk_bytes = layout.chunk_bytes(), term_bytes = layout.term_bytes();
  const unsigned row_tiles = static_cast<unsigned>(ceil_div(call.outputs.m, kInt4HopperRows));
  const int64_t first_row = static_cast<int64_t>(blockIdx.x % row_tiles) * kInt4HopperRows;
  const int64_t first_panel = static_cast<int64_t>(blockIdx.x / row_tiles) * kInt4Panels;
  const int64_t first_chunk = blockIdx.y * call.chunks;
  const int steps = static_cast<int>(min(call.chunks, layout.chunks() - first_chunk));
  const int panels = static_cast<int>(min(int64_t{kInt4Panels}, panel_count(call.outputs.n) - first_panel));
  const uint8_t* packed = call.packed + first_panel * layout.panel_bytes();

  unsigned char* x_stages = dynamic_shared();
  unsigned char* code_stages = x_stages + int4_hopper_codes_at<T>(call.stages);
  unsigned char* row_terms = code_stages + call.stages * kInt4Panels * chunk_bytes;
  auto* full = reinterpret_cast<uint64_t*>(row_terms + (layout.one_group ? kInt4Panels * term_bytes : 0));
  uint64_t* empty = full + call.stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < call.stages; ++i) {
      mbarrier_init(full + i, kCopying + 1);  // each thread's x, and that codes are asked for
      mbarrier_init(empty + i, kMultiplying / kWarp);
    }
    mbarrier_init_fence();
  }
  if (layout.one_group) {
    const int pieces = term_bytes / 16;
    for (int i = threadIdx.x; i < panels * pieces; i += kInt4HopperThreads) {
      reinterpret_cast<uint4*>(row_terms)[i] = *reinterpret_cast<const uint4*>(
          packed + i / pieces * layout.panel_bytes() + layout.row_terms_at() + i % pieces * 16);
    }
  }
  __syncthreads();

  if (threadIdx.x < kCopying) {
    registers_down<40>();
    constexpr int kValues = 16 / static_cast<int>(sizeof(T)), kPieces = kInt4Chunk / kValues;
    constexpr int kAhead = 2;  // stages of x under way
    const int rows = static_cast<int>(min(int64_t{kInt4HopperRows}, call.outputs.m - first_row));
    const T* x = static_cast<const T*>(call.x) + first_row * call.x_stride;
    const auto arrive = [&](int slot) {
      fence_async_proxy();
      mbarrier_arrive(full + slot);
    };
    int slot = 0, done = 0, phase = 0;
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(empty + slot, phase ^ 1);
      if (threadIdx.x == 0) {
        mbarrier_expect(full + slot, panels * chunk_bytes);
        for (int p = 0; p < panels; ++p) {
          copy_bulk(
              code_stages + (slot * kInt4Panels + p) * chunk_bytes,
              packed + p * layout.panel_bytes() + layout.header_bytes() + (first_chunk + step) * chunk_bytes,
              chunk_bytes, full + slot);
        }
      }
      const int64_t column = (first_chunk + step) * kInt4Chunk;
      for (int i = threadIdx.x; i < rows * kPieces; i += kCopying) {
        const int row = i / kPieces, piece = i % kPieces;
        copy_piece(x_stages + slot * kXBytes + int4_hopper_place(row, piece), x + row * call.x_stride,
                   column + piece * kValues, call.x_columns, call.x_vector);
      }
      cp_async_commit();
      if (step >= kAhead) {
        cp_async_wait<kAhead>();
        arrive(done);
        done = done + 1 == call.stages ? 0 : done + 1;
      }
      if (++slot == call.stages) slot = 0, phase ^= 1;
    }
    cp_async_wait<0>();
    for (int step = max(0, steps - kAhead); step < steps; ++step) {
      arrive(done);
      done = done + 1 == call.stages ? 0 : done + 1;
    }
  } else {
    registers_up<232>();
    const int thread = threadIdx.x - kCopying, lane = thread % kWarp, panel = thread / kWarp;
    const int group = lane / 4;  // as the fragments' drawings have it
    const auto* units =
        reinterpret_cast<const float*>(packed + (panel < panels ? panel : 0) * layout.panel_bytes());
    Expand<T> outputs[1][2] = {{Expand<T>(units[group]), Expand<T>(units[group + 8])}};
    float total[64] = {};
    typename GroupSum<T>::Type sum[64] = {};
    [[maybe_unused]] bool far = false;
    int slot = 0, phase = 0;
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(full + slot, phase);
      const unsigned char* codes = code_stages + (slot * kInt4Panels + panel) * chunk_bytes;
      const unsigned char* terms = layout.one_group ? row_terms + panel * term_bytes : codes + kInt4CodeBytes;
      const auto terms_of = [&](int) { return reinterpret_cast<const Int4Term*>(terms); };
      const uint64_t x = wgmma_descriptor(shared_address(x_stages + slot * kXBytes));
      const uint4 units_of_codes[2] = {reinterpret_cast<const uint4*>(codes)[lane],
                                       reinterpret_cast<const uint4*>(codes + kInt4UnitBytes)[lane]};
      const uint32_t words[8] = {units_of_codes[0].x, units_of_codes[0].y, units_of_codes[0].z,
                                 units_of_codes[0].w, units_of_codes[1].x, units_of_codes[1].y,
                                 units_of_codes[1].z, units_of_codes[1].w};
      constexpr int kSteps = kInt8 ? 1 : 2;  // wgmma to 32 k-values
      uint32_t a[2][4];
#pragma unroll
      for (int s = 0; s < 4 * kSteps; ++s) {
        const bool starts = s % (kSteps * kBlocks) == 0, ends = (s + 1) % (kSteps * kBlocks) == 0;
        const int output = s / (kSteps * kBlocks) * kPanel + group;
        if constexpr (kInt8) {
          expand(a[s % 2], words[2 * s], words[2 * s + 1]);
        } else {
          if (starts && call.zeros == Int4Zeros::kInteger) far = take_zeros(outputs, terms_of, output);
          expand(a[s % 2], words[s], outputs[0]);
          if (far) move_far(a[s % 2], outputs[0]);
        }
        wgmma_fence();
        // Within a row of 128 bytes a step is 32 of them.
        wgmma_m64n128_of_registers<T>(
            sum, a[s % 2], x + (s / 4 * kInt4HopperRows * kInt4HopperRowBytes + s % 4 * 32) / 16, !starts);
        wgmma_commit();
        if (!ends) {
          wgmma_wait<1>();  // the other registers of A are free
          continue;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float scale = terms_of(0)[output + 8 * h].x;
          if constexpr (!kInt8) scale *= outputs[0][h].inverse_unit;
#pragma unroll
          for (int j = 0; j < kInt4HopperRows / 8; ++j) {
#pragma unroll
            for (int i = 4 * j + 2 * h; i < 4 * j + 2 * h + 2; ++i)
              total[i] = __fmaf_rn(static_cast<float>(sum[i]), scale, total[i]);
          }
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(empty + slot);
      if (++slot == call.stages) slot = 0, phase ^= 1;
    }

    // x of all stages has been read, by the other warpgroup too.
    const auto meet = [] { named_barrier_sync(kBarrierOfMultiplying, kMultiplying); };
    meet();
    float* sums = reinterpret_cast<float*>(x_stages);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      sums[row * kInt4SumStride + panel * kPanel + group + i % 4 / 2 * 8] = total[i];
    }
    meet();
    store_tile<kInt8, kInt4HopperRows, kInt4Outputs>(call, sums_of_tile(sums), first_row,
                                                     first_panel * kPanel, kShift<Int4Form::kPlain>, thread,
                                                     kMultiplying, meet);
  }
#endif
}

}  // namespace lissom::cuda
