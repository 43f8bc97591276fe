// Registrations only. Addresses, sizes, strides and codes come in as integers (python/lissom/ops checks the
// tensors), the stream as PyTorch's cuda_stream; the GIL is released in every call that launches.
#include <pybind11/pybind11.h>

#include "block_sparse_linear.h"
#include "distill_loss.h"
#include "int4_linear.h"
#include "int8_embedding.h"
#include "int8_linear.h"
#include "launch.h"
#include "quantize_rows.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

lissom::Int4Fragments int4_fragments(int64_t k, int segment, bool one_group, int entry_bytes,
                                     bool weight_only) {
  using lissom::NibbleOrder;
  const NibbleOrder order = weight_only   ? NibbleOrder::kHalf
                            : entry_bytes ? NibbleOrder::kInt8Table
                                          : NibbleOrder::kInt8;
  return {k, segment, one_group, entry_bytes, order};
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
  m.def("hopper_forms", &cuda::hopper_forms, "Whether Hopper's own forms may be chosen here.");

#if defined(LISSOM_CUDA_EMULATOR)
  m.def(
      "seed", [](uint64_t seed) { emulator::machine().seed = seed; },
      "Orders of blocks and threads; 0: as they are.");
  m.def("device", [](int arch, int multiprocessors) {  // 99 KB: all but the largest of a generation
    cuda::Device device = cuda::current_device();
    device.arch = arch;
    device.multiprocessors = multiprocessors;
    device.shared_bytes = (arch == 90 ? 227 : arch == 80 ? 163 : 99) << 10;
    cuda::emulate_device(device);
  });
  add_selftest(m);
#endif

  m.def("block_sparse_plan", [](int value_type, int64_t m, int64_t lines, int64_t blocks, int height,
                                int width, uintptr_t) {
    const cuda::BlockSparsePlan plan =
        cuda::block_sparse_plan(static_cast<ValueType>(value_type), m, lines, blocks, height, width);
    return py::make_tuple(static_cast<int>(plan.form), plan.most_blocks, plan.tiles, plan.tile_elements);
  });
  m.def("block_sparse_linear",
        [](int form, uintptr_t x, int64_t m, int64_t columns, int64_t x_stride, uintptr_t x_scale,
           uintptr_t values, int value_type, int64_t blocks, int height, int width, uintptr_t block_columns,
           uintptr_t pieces, int64_t piece_count, uintptr_t weight_scale, uintptr_t bias, int bias_type,
           int activation, int64_t n, uintptr_t y, int y_type, uintptr_t partial, uintptr_t arrived,
           uintptr_t stream) {
          py::gil_scoped_release release;
          cuda::block_sparse_linear({pointer<const void>(x),
                                     m,
                                     columns,
                                     x_stride,
                                     pointer<const float>(x_scale),
                                     pointer<const void>(values),
                                     static_cast<ValueType>(value_type),
                                     blocks,
                                     height,
                                     width,
                                     pointer<const int32_t>(block_columns),
                                     pointer<const cuda::BlockSparsePiece>(pieces),
                                     piece_count,
                                     pointer<const float>(weight_scale),
                                     pointer<const void>(bias),
                                     static_cast<DType>(bias_type),
                                     static_cast<Activation>(activation),
                                     n,
                                     pointer<void>(y),
                                     static_cast<DType>(y_type),
                                     pointer<void>(partial),
                                     pointer<int32_t>(arrived),
                                     static_cast<cuda::BlockSparseForm>(form)},
                                    stream);
        });
  // Of this module alone: on a GPU the emulator may be loaded beside it.
  py::class_<cuda::DistillLogits>(m, "DistillLogits", py::module_local())
      .def(py::init([](uintptr_t data, int type, int64_t stride, double scale) {
             return cuda::DistillLogits{pointer<const void>(data), static_cast<DType>(type), stride, scale};
           }),
           py::arg("data"), py::arg("type"), py::arg("stride"), py::arg("scale"));
  py::class_<cuda::DistillLoss>(m, "DistillLoss", py::module_local())
      .def(py::init([](const cuda::DistillLogits& student, const cuda::DistillLogits& teacher,
                       uintptr_t labels, bool wide_labels, int64_t rows, int64_t vocab, int64_t ignore_index,
                       int divergence, double temperature, double kl_weight, double ce_weight,
                       double entropy_weight, double js_beta, double label_smoothing, double softcap,
                       double term_scale, double ce_scale, uintptr_t scales, uintptr_t grad,
                       int64_t grad_stride) {
             cuda::DistillLoss args = {};
             args.student = student;
             args.teacher = teacher;
             args.labels = pointer<const void>(labels);
             args.wide_labels = wide_labels;
             args.rows = rows;
             args.vocab = vocab;
             args.ignore_index = ignore_index;
             args.divergence = static_cast<cuda::DistillDivergence>(divergence);
             args.temperature = temperature;
             args.kl_weight = kl_weight;
             args.ce_weight = ce_weight;
             args.entropy_weight = entropy_weight;
             args.js_beta = js_beta;
             args.label_smoothing = label_smoothing;
             args.softcap = softcap;
             args.term_scale = term_scale;
             args.ce_scale = ce_scale;
             args.scales = pointer<const double>(scales);
             args.grad = pointer<void>(grad);
             args.grad_stride = grad_stride;
             return args;
           }),
           py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("labels"), py::arg("wide_labels"),
           py::arg("rows"), py::arg("vocab"), py::arg("ignore_index"), py::arg("divergence"),
           py::arg("temperature"), py::arg("kl_weight"), py::arg("ce_weight"), py::arg("entropy_weight"),
           py::arg("js_beta"), py::arg("label_smoothing"), py::arg("softcap"), py::arg("term_scale"),
           py::arg("ce_scale"), py::arg("scales"), py::arg("grad"), py::arg("grad_stride"));
  m.def(
      "distill_plan",
      [](const cuda::DistillLoss& args, uintptr_t) {
        const cuda::DistillPlan plan = cuda::distill_plan(args);
        return py::make_tuple(plan.parts, plan.fields);
      },
      "Parts of a row that have a loss each, and numbers of workspace for each of them.");
  m.def("distill_loss", [](cuda::DistillLoss args, uintptr_t loss, uintptr_t partials, uintptr_t stream) {
    args.loss = pointer<double>(loss);
    args.partials = pointer<double>(partials);
    py::gil_scoped_release release;
    cuda::distill_loss(args, stream);
  });

  m.def("int4_linear_workspace", [](int x_type, int64_t rows, int64_t n, int64_t k, int segment,
                                    bool one_group, int zeros, int entry_bytes, bool weight_only, uintptr_t) {
    cuda::Int4Linear args = {};
    args.x_type = static_cast<DType>(x_type);
    args.m = rows;
    args.n = n;
    args.layout = int4_fragments(k, segment, one_group, entry_bytes, weight_only);
    args.zeros = static_cast<cuda::Int4Zeros>(zeros);
    args.weight_only = weight_only;
    const cuda::Int4Workspace workspace = cuda::int4_linear_workspace(args);
    return py::make_tuple(workspace.floats, workspace.counters);
  });

  m.def("int4_linear", [](int x_type, int64_t rows, int64_t n, int64_t k, int segment, bool one_group,
                          int zeros, int entry_bytes, bool weight_only, uintptr_t x, int64_t x_stride,
                          uintptr_t packed, uintptr_t bias, int bias_type, bool rotated, int activation,
                          uintptr_t q, int64_t q_stride, uintptr_t x_scale, uintptr_t partial,
                          uintptr_t counters, uintptr_t y, uintptr_t stream) {
    py::gil_scoped_release release;
    cuda::int4_linear(
        {pointer<const void>(x), static_cast<DType>(x_type), x_stride, rows, n,
         int4_fragments(k, segment, one_group, entry_bytes, weight_only), static_cast<cuda::Int4Zeros>(zeros),
         pointer<const uint8_t>(packed), pointer<const void>(bias), static_cast<DType>(bias_type),
         weight_only, rotated, static_cast<Activation>(activation), pointer<int8_t>(q), q_stride,
         pointer<float>(x_scale), pointer<float>(partial), pointer<int>(counters), pointer<void>(y)},
        stream);
  });

  m.def("int8_embedding",
        [](uintptr_t indices, bool wide_indices, int64_t count, uintptr_t table, int64_t row_stride,
           int64_t rows, int64_t width, uintptr_t scale, uintptr_t y, int y_type, uintptr_t stream) {
          py::gil_scoped_release release;
          cuda::int8_embedding(
              {pointer<const void>(indices), wide_indices, count, pointer<const int8_t>(table), row_stride,
               rows, width, pointer<const float>(scale), pointer<void>(y), static_cast<DType>(y_type)},
              stream);
        });

  // 0 if it is done; else how many bytes of workspace it needs.
  m.def("int8_linear",
        [](uintptr_t x, int x_type, int64_t x_stride, int64_t rows, int64_t k, uintptr_t weight,
           int64_t weight_stride, int64_t n, uintptr_t weight_scale, uintptr_t bias, int bias_type, int mode,
           uintptr_t input_scale, bool rotated, int activation, int form, int splits, uintptr_t y,
           uintptr_t workspace, uintptr_t stream) {
          py::gil_scoped_release release;
          const cuda::Int8Linear args = {pointer<const void>(x),
                                         static_cast<DType>(x_type),
                                         x_stride,
                                         rows,
                                         k,
                                         pointer<const int8_t>(weight),
                                         weight_stride,
                                         n,
                                         pointer<const float>(weight_scale),
                                         pointer<const void>(bias),
                                         static_cast<DType>(bias_type),
                                         static_cast<InputMode>(mode),
                                         pointer<const float>(input_scale),
                                         rotated,
                                         static_cast<Activation>(activation),
                                         pointer<void>(y),
                                         pointer<void>(workspace),
                                         static_cast<cuda::Int8Form>(form),
                                         splits};
          const int64_t bytes = cuda::int8_linear_workspace(args);
          if (bytes > 0 && !workspace) return bytes;
          cuda::int8_linear(args, stream);
          return int64_t{0};
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
