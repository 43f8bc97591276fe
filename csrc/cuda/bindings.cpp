// Registrations only. Addresses, sizes, strides and codes come in as integers (python/lissom/ops checks the
// tensors), the stream as PyTorch's cuda_stream; the GIL is released in every call that launches.
#include <pybind11/pybind11.h>

#include "int8_embedding.h"
#include "launch.h"
#include "quantize_rows.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

#if defined(LISSOM_CUDA_EMULATOR)
void add_selftest(py::module_& m);  // tests/cuda_emulator/selftest.cpp
#endif

PYBIND11_MODULE(LISSOM_MODULE, m, py::mod_gil_not_used()) {
  using namespace lissom;
  m.doc() = "lissom's CUDA kernels. Private: use lissom.ops.";
  m.attr("ARCHITECTURES") = LISSOM_CUDA_ARCHITECTURES;
  m.def("why_not", &cuda::why_not, "Why no kernel can run on the current device, or ''.");

#if defined(LISSOM_CUDA_EMULATOR)
  m.def(
      "seed", [](uint64_t seed) { emulator::machine().seed = seed; },
      "Orders of blocks and threads; 0: as they are.");
  m.def("device", [](int arch, int multiprocessors) {
    cuda::Device device = cuda::current_device();
    device.arch = arch;
    device.multiprocessors = multiprocessors;
    cuda::emulate_device(device);
  });
  add_selftest(m);
#endif

  m.def("int8_embedding",
        [](uintptr_t indices, bool wide_indices, int64_t count, uintptr_t table, int64_t row_stride,
           int64_t rows, int64_t width, uintptr_t scale, uintptr_t y, int y_type, uintptr_t stream) {
          py::gil_scoped_release release;
          cuda::int8_embedding(
              {pointer<const void>(indices), wide_indices, count, pointer<const int8_t>(table), row_stride,
               rows, width, pointer<const float>(scale), pointer<void>(y), static_cast<DType>(y_type)},
              stream);
        });

  m.def("quantize_rows",
        [](uintptr_t x, int x_type, int64_t x_stride, int64_t rows, int64_t k, uintptr_t input_scale,
           bool rotated, uintptr_t q, int64_t q_stride, uintptr_t scale, uintptr_t stream) {
          py::gil_scoped_release release;
          cuda::quantize_rows({pointer<const void>(x), static_cast<DType>(x_type), x_stride, rows, k,
                               pointer<const float>(input_scale), rotated, pointer<int8_t>(q), q_stride,
                               pointer<float>(scale)},
                              stream);
        });
}
