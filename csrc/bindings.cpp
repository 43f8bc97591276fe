// Registrations only. Addresses, sizes and codes come in as integers (python/lissom/ops checks the tensors);
// the GIL is released in every call that computes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "call_key.h"
#include "common/formats.h"
#include "common/parallel.h"
#include "cpu/block_sparse_linear.h"
#include "cpu/distill_loss.h"
#include "cpu/int4_embedding.h"
#include "cpu/int4_linear.h"
#include "cpu/int8_embedding.h"
#include "cpu/int8_linear.h"
#include "cpu/isa.h"
#include "plain_call.h"

#ifndef LISSOM_MODULE
#define LISSOM_MODULE _C
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A matrix in blocks; its indices were checked.
lissom::BlockSparse block_sparse(uintptr_t values, int value_type, uintptr_t crow, uintptr_t col, int64_t n,
                                 int64_t k, int64_t height, int64_t width, int64_t blocks) {
  return {n,
          k,
          height,
          width,
          pointer<const int32_t>(crow),
          pointer<const int32_t>(col),
          pointer<const void>(values),
          static_cast<lissom::ValueType>(value_type),
          blocks};
}

}  // namespace

PYBIND11_MODULE(LISSOM_MODULE, m, py::mod_gil_not_used()) {
  using namespace lissom;
  m.doc() = "lissom's native CPU kernels. Private: use lissom.ops.";
  m.attr("INT8_PANEL") = kPanel;
  m.attr("INT8_QUAD") = kQuad;

  m.def("isas", &isas, "Instruction sets, best first: (name, whether it runs here).");
  m.def("active_isa", [] { return isa_name(active_isa()); });
  m.def("select_isa", &select_isa, py::arg("name"), "Choose by name; '' is the best that runs here.");

  watch_forks();
  add_plain_calls(m);
  add_call_key(m);

  m.def("int8_pack", [](uintptr_t qweight, int64_t n, int64_t k, uintptr_t packed) {
    py::gil_scoped_release release;
    int8_pack(pointer<const int8_t>(qweight), n, k, pointer<int8_t>(packed));
  });

  m.def("int8_linear",
        [](uintptr_t x, int x_type, int64_t x_stride, int64_t rows, int64_t k, uintptr_t packed, int64_t n,
           uintptr_t weight_scale, uintptr_t bias, int mode, float input_scale, bool rotated, int activation,
           uintptr_t y, int y_type, int threads) {
          py::gil_scoped_release release;
          Int8LinearArgs args;
          args.x = pointer<const void>(x);
          args.x_type = static_cast<DType>(x_type);
          args.x_stride = x_stride;
          args.m = rows;
          args.n = n;
          args.k = k;
          args.packed = pointer<const int8_t>(packed);
          args.weight_scale = pointer<const float>(weight_scale);
          args.bias = pointer<const float>(bias);
          args.mode = static_cast<InputMode>(mode);
          args.input_scale = input_scale;
          args.rotated = rotated;
          args.activation = static_cast<Activation>(activation);
          args.y = pointer<void>(y);
          args.y_type = static_cast<DType>(y_type);
          int8_linear(args, threads);
        });

  m.def("int4_panel_bytes", [](int64_t k, int segment, bool has_zero, int table_scope, bool weight_only) {
    return Int4Layout{k, segment, has_zero, static_cast<TableScope>(table_scope), weight_only}.panel_bytes();
  });

  m.def("int4_linear",
        [](uintptr_t x, int x_type, int64_t x_stride, int64_t rows, int64_t k, uintptr_t packed, int64_t n,
           int segment, bool has_zero, int table_scope, uintptr_t bias, bool weight_only, bool rotated,
           int activation, uintptr_t y, int y_type, int threads) {
          py::gil_scoped_release release;
          Int4LinearArgs args;
          args.x = pointer<const void>(x);
          args.x_type = static_cast<DType>(x_type);
          args.x_stride = x_stride;
          args.m = rows;
          args.n = n;
          args.k = k;
          args.packed = pointer<const uint8_t>(packed);
          args.layout = {k, segment, has_zero, static_cast<TableScope>(table_scope), weight_only};
          args.weight_only = weight_only;
          args.bias = pointer<const float>(bias);
          args.rotated = rotated;
          args.activation = static_cast<Activation>(activation);
          args.y = pointer<void>(y);
          args.y_type = static_cast<DType>(y_type);
          int4_linear(args, threads);
        });

  m.def("int8_embedding",
        [](uintptr_t indices, bool wide_indices, int64_t count, uintptr_t table, int64_t rows, int64_t width,
           uintptr_t scale, uintptr_t y, int y_type, int threads) {
          py::gil_scoped_release release;
          Int8EmbeddingArgs args;
          args.indices = pointer<const void>(indices);
          args.wide_indices = wide_indices;
          args.count = count;
          args.table = pointer<const int8_t>(table);
          args.rows = rows;
          args.width = width;
          args.scale = pointer<const float>(scale);
          args.y = pointer<void>(y);
          args.y_type = static_cast<DType>(y_type);
          return int8_embedding(args, threads);
        });

  m.def("int4_embedding", [](uintptr_t indices, bool wide_indices, int64_t count, uintptr_t table,
                             int64_t rows, int64_t width, int64_t group_size, uintptr_t scale, int scale_type,
                             uintptr_t zero, int zero_type, uintptr_t y, int y_type, int threads) {
    py::gil_scoped_release release;
    Int4EmbeddingArgs args;
    args.indices = pointer<const void>(indices);
    args.wide_indices = wide_indices;
    args.count = count;
    args.table = pointer<const uint8_t>(table);
    args.rows = rows;
    args.width = width;
    args.group = group_size == -1 ? width : group_size;
    args.scale = pointer<const void>(scale);
    args.scale_type = static_cast<DType>(scale_type);
    args.zero = zero_type < 0 ? nullptr : pointer<const void>(zero);
    args.zero_type = zero_type;
    args.y = pointer<void>(y);
    args.y_type = static_cast<DType>(y_type);
    return int4_embedding(args, threads);
  });

  m.def("block_sparse_linear",
        [](uintptr_t x, int x_type, int64_t x_stride, int64_t rows, int64_t k, uintptr_t values,
           int value_type, uintptr_t crow, uintptr_t col, int64_t n, int64_t height, int64_t width,
           int64_t blocks, uintptr_t weight_scale, uintptr_t packed, uintptr_t bias, int activation,
           uintptr_t y, int y_type, int threads) {
          py::gil_scoped_release release;
          BlockSparseLinearArgs args;
          args.x = pointer<const void>(x);
          args.x_type = static_cast<DType>(x_type);
          args.x_stride = x_stride;
          args.m = rows;
          args.n = n;
          args.k = k;
          args.weight = block_sparse(values, value_type, crow, col, n, k, height, width, blocks);
          args.weight_scale = pointer<const float>(weight_scale);
          args.packed = pointer<const uint8_t>(packed);
          args.bias = pointer<const float>(bias);
          args.rotated = false;
          args.activation = static_cast<Activation>(activation);
          args.y = pointer<void>(y);
          args.y_type = static_cast<DType>(y_type);
          block_sparse_linear(args, threads);
        });

  m.def("block_sparse_grad_input",
        [](uintptr_t grad, int grad_type, int64_t grad_stride, int64_t rows, int64_t n, uintptr_t values,
           int value_type, uintptr_t weight_scale, uintptr_t crow, uintptr_t col, int64_t k, int64_t height,
           int64_t width, int64_t blocks, uintptr_t grad_x, int grad_x_type, int threads) {
          py::gil_scoped_release release;
          BlockSparseGradInputArgs args;
          args.weight = block_sparse(values, value_type, crow, col, n, k, height, width, blocks);
          args.weight_scale = pointer<const float>(weight_scale);
          args.grad = {pointer<const void>(grad), static_cast<DType>(grad_type), grad_stride};
          args.m = rows;
          args.grad_x = pointer<void>(grad_x);
          args.grad_x_type = static_cast<DType>(grad_x_type);
          block_sparse_grad_input(args, threads);
        });

  m.def("block_sparse_grad_values",
        [](uintptr_t grad, int grad_type, int64_t grad_stride, uintptr_t x, int x_type, int64_t x_stride,
           int64_t rows, int64_t n, int64_t k, uintptr_t crow, uintptr_t col, int64_t height, int64_t width,
           int64_t blocks, uintptr_t grad_values, int threads) {
          py::gil_scoped_release release;
          BlockSparseGradValuesArgs args;
          args.weight = block_sparse(0, 0, crow, col, n, k, height, width, blocks);
          args.grad = {pointer<const void>(grad), static_cast<DType>(grad_type), grad_stride};
          args.x = {pointer<const void>(x), static_cast<DType>(x_type), x_stride};
          args.m = rows;
          args.grad_values = pointer<float>(grad_values);
          block_sparse_grad_values(args, threads);
        });

  m.def("block_sparse_check",
        [](uintptr_t crow, uintptr_t col, int64_t block_rows, int64_t block_columns, int64_t blocks) {
          py::gil_scoped_release release;
          return block_sparse_check(pointer<const int32_t>(crow), pointer<const int32_t>(col), block_rows,
                                    block_columns, blocks);
        });

  m.def("distill_loss",
        [](uintptr_t student, int student_type, int64_t student_stride, uintptr_t teacher, int teacher_type,
           int64_t teacher_stride, uintptr_t labels, int64_t rows, int64_t vocab, float temperature,
           float kl_weight, float ce_weight, float entropy_weight, int divergence, float js_beta,
           int64_t ignore_index, float label_smoothing, float softcap, float student_scale,
           float teacher_scale, double term_scale, double ce_scale, uintptr_t row_loss, uintptr_t grad,
           int grad_type, int64_t grad_stride, int threads) {
          py::gil_scoped_release release;
          DistillArgs args{};
          args.student = {pointer<const void>(student), static_cast<DType>(student_type), student_stride,
                          student_scale};
          args.teacher = {pointer<const void>(teacher), static_cast<DType>(teacher_type), teacher_stride,
                          teacher_scale};
          args.labels = pointer<const int64_t>(labels);
          args.rows = rows;
          args.vocab = vocab;
          args.temperature = temperature;
          args.kl_weight = kl_weight;
          args.ce_weight = ce_weight;
          args.entropy_weight = entropy_weight;
          args.divergence = static_cast<Divergence>(divergence);
          args.js_beta = js_beta;
          args.ignore_index = ignore_index;
          args.label_smoothing = label_smoothing;
          args.softcap = softcap;
          args.term_scale = term_scale;
          args.ce_scale = ce_scale;
          args.row_loss = pointer<double>(row_loss);
          args.grad = pointer<void>(grad);
          args.grad_type = static_cast<DType>(grad_type);
          args.grad_stride = grad_stride;
          distill_loss(args, threads);
        });

  m.def("distill_exp", [](uintptr_t x, int64_t count, double rate, uintptr_t result) {
    distill_exp(pointer<const float>(x), count, rate, pointer<float>(result));
  });

  m.def("distill_topk",
        [](uintptr_t student, int student_type, int64_t student_stride, int64_t rows, int64_t vocab,
           uintptr_t log_probs, uintptr_t indices, int64_t k, uintptr_t labels, float temperature,
           float kl_weight, float ce_weight, float entropy_weight, int64_t ignore_index,
           float label_smoothing, float softcap, float student_scale, double term_scale, double ce_scale,
           uintptr_t row_loss, uintptr_t grad, int grad_type, int64_t grad_stride, int threads) {
          py::gil_scoped_release release;
          DistillArgs args{};
          args.student = {pointer<const void>(student), static_cast<DType>(student_type), student_stride,
                          student_scale};
          args.topk = {pointer<const float>(log_probs), pointer<const int64_t>(indices), k};
          args.labels = pointer<const int64_t>(labels);
          args.rows = rows;
          args.vocab = vocab;
          args.temperature = temperature;
          args.kl_weight = kl_weight;
          args.ce_weight = ce_weight;
          args.entropy_weight = entropy_weight;
          args.ignore_index = ignore_index;
          args.label_smoothing = label_smoothing;
          args.softcap = softcap;
          args.term_scale = term_scale;
          args.ce_scale = ce_scale;
          args.row_loss = pointer<double>(row_loss);
          args.grad = pointer<void>(grad);
          args.grad_type = static_cast<DType>(grad_type);
          args.grad_stride = grad_stride;
          distill_loss(args, threads);
        });
}
