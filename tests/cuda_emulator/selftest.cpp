// The emulator's own tests: calls of selftest_kernel.cuh, and what needs no kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "block_sparse_linear_hopper.cuh"
#include "distill_loss_hopper.cuh"
#include "int4_linear_hopper.cuh"
#include "int8_linear.h"
#include "int8_linear_kernel.cuh"
#include "launch.h"
#include "selftest_kernel.cuh"

namespace py = pybind11;
using namespace lissom;
using namespace lissom::cuda;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void add_selftest(py::module_& m) {
  m.def("selftest_mma", [](int type, uintptr_t a, uintptr_t b, uintptr_t d) {
    launch({"mma", 1, 32, 0}, mma_kernel, type, pointer<const uint32_t>(a), pointer<const uint32_t>(b),
           pointer<uint32_t>(d));
  });
  m.def("selftest_ldmatrix", [](int count, bool transpose, uintptr_t data, uintptr_t rows, uintptr_t r) {
    launch({"ldmatrix", 1, 32, 0}, ldmatrix_kernel, count, transpose, pointer<const uint4>(data),
           pointer<const int>(rows), pointer<uint32_t>(r));
  });
  m.def("selftest_shuffle", [](uintptr_t in, int by, int width, uintptr_t out) {
    launch({"shuffle", 1, 32, 0}, shuffle_kernel, pointer<const int>(in), by, width, pointer<int>(out));
  });
  m.def("selftest_sum",
        [](uintptr_t x, int blocks, int pieces, uintptr_t partial, uintptr_t counter, uintptr_t sum) {
          launch({"sum", static_cast<unsigned>(blocks), 128, 0, 1024}, sum_kernel, pointer<const float>(x),
                 pieces, pointer<float>(partial), pointer<int>(counter), pointer<float>(sum));
        });
  m.def("selftest_named_barrier", [](int rounds, uintptr_t out) {
    launch({"named_barrier", 1, 128, 0}, named_barrier_kernel, rounds, pointer<int>(out));
  });
  m.def("selftest_cluster", [](int blocks, int size, uintptr_t out) {
    launch({"cluster", static_cast<unsigned>(blocks), 64, 0, 256, size}, cluster_kernel, size,
           pointer<float>(out));
  });
  m.def("selftest_activate", [](int function, uintptr_t x, int64_t count, uintptr_t y) {
    launch({"activate", static_cast<unsigned>(ceil_div(count, 1024)), 1024, 0}, activate_kernel,
           static_cast<Activation>(function), pointer<const float>(x), count, pointer<float>(y));
  });
  m.def("selftest_max2", [](int type, uintptr_t a, uintptr_t b, int64_t count, uintptr_t larger) {
    launch({"max2", static_cast<unsigned>(ceil_div(count, 1024)), 1024, 0}, max2_kernel, type,
           pointer<const uint32_t>(a), pointer<const uint32_t>(b), count, pointer<uint32_t>(larger));
  });
  m.def("selftest_exp2", [](uintptr_t x, int64_t count, uintptr_t y) {
    launch({"exp2", static_cast<unsigned>(ceil_div(count, 1024)), 1024, 0}, exp2_kernel, pointer<const float>(x),
           count, pointer<float>(y));
  });
  // Of a slice of a row: groups, where they begin; of a chunk: groups, where they lie.
  m.def("selftest_slice", [](int rank, int cluster, int groups, int student_bytes, int teacher_bytes, int chunk_groups) {
    const Slice s = Slice::of(rank, cluster, groups, student_bytes, teacher_bytes, chunk_groups);
    py::list chunks;
    for (int i = 0; i < s.chunks(); ++i) {
      chunks.append(py::make_tuple(s.chunk_size(i), s.student_at(i * chunk_groups), s.teacher_at(i * chunk_groups)));
    }
    return py::make_tuple(s.begin, s.end, s.bytes(), chunks);
  });
  m.def("selftest_fault", [](int fault, uintptr_t out) {
    launch({"fault", 1, 64, 0, 64}, fault_kernel, fault, pointer<float>(out));
  });
  m.def("selftest_convert", [](int type, uintptr_t in, int64_t count, uintptr_t out) {
    for (int64_t i = 0; i < count; ++i) {
      const float v = pointer<const float>(in)[i];
      pointer<uint16_t>(out)[i] = type == 0 ? from_float<BFloat16>(v).bits : from_float<Float16>(v).bits;
    }
  });
  m.def("selftest_widen", [](int type, uintptr_t in, int64_t count, uintptr_t out) {
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t v = pointer<const uint16_t>(in)[i];
      pointer<float>(out)[i] = type == 0 ? to_float(BFloat16{v}) : to_float(Float16{v});
    }
  });
  m.def("block_sparse_descriptor", &block_sparse_descriptor);
  m.def("block_sparse_turn", &block_sparse_turn);
  m.def("block_sparse_ring", [](int stages, const std::vector<int>& moves) {
    const auto place_of = [&](auto ring) {
      for (int move : moves) move == 1 ? ring.next() : ring.skip(move);
      return py::make_tuple(ring.stage, ring.phase);
    };
    switch (stages) {
      case 5: return place_of(Ring<5>());
      case 6: return place_of(Ring<6>());
      case 10: return place_of(Ring<10>());
      default: return place_of(Ring<12>());
    }
  });
  m.def("block_sparse_place", [](unsigned tile, unsigned pieces, unsigned subs, unsigned tile_rows, unsigned together) {
    const BlockSparsePlace place = block_sparse_place(tile, pieces, subs, tile_rows, together);
    return py::make_tuple(place.tile_row, place.piece, place.sub);
  });
  m.def("block_sparse_stage_offset", &stage_offset);
  m.def("int4_code_at", [](int64_t k, int segment, bool one_group, int entry_bytes, int order,
                           int row, int64_t column) {
    const Int4Fragments layout = {k, segment, one_group, entry_bytes, static_cast<NibbleOrder>(order)};
    const Int4Fragments::Place place = layout.code_at(row, column);
    return py::make_tuple(layout.panel_bytes(), place.byte, place.shift);
  });
  m.def("int4_hopper_place", [](int row, int piece) { return int4_hopper_place(row, piece); });
  m.def("int8_tile_place", [](int64_t tile, int64_t tiles_m, int64_t tiles_n) {
    const TilePlace place = tile_place(tile, tiles_m, tiles_n);
    return py::make_tuple(place.row, place.column);
  });
  m.def("int8_staged_x_at", [](int item_bytes, int row, int chunk) {
    return item_bytes == 1 ? staged_x_at<1>(row, chunk) : staged_x_at<2>(row, chunk);
  });
  m.def("int8_rows_pitch", [](int item_bytes, int columns) {
    return item_bytes == 1   ? rows_pitch<int8_t>(columns)
           : item_bytes == 2 ? rows_pitch<Float16>(columns)
                             : rows_pitch<float>(columns);
  });
  m.def("scratch_at", &scratch_at);
  m.def("selftest_bits", [](uint32_t a, uint32_t b, uint32_t c) {
    return py::make_tuple(lop3<0xea>(a, b, c), lop3<0x6a>(a, b, c), lop3<0xca>(a, b, c),
                          __byte_perm(a, b, c));
  });
}
