#include "plain_call.h"

#include <cstdlib>
#include <cstring>

#include "cpu/block_sparse_linear.h"
#include "cpu/int4_linear.h"
#include "cpu/int8_embedding.h"
#include "cpu/int8_linear.h"
#include "torch_objects.h"

namespace py = pybind11;

namespace lissom {
namespace {

void require_automatic_backend() {
  const char* forced = std::getenv("LISSOM_BACKEND");  // os.environ writes through to the C environment
  require(torch.empty != nullptr && (forced == nullptr || *forced == '\0'));
}

// Anything but the three float types is not plain.
DType float_type(TensorType type) {
  require(type <= kFloat16);
  return static_cast<DType>(type);
}
DType float_type(PyObject* type) {
  int code = 0;
  while (code < 3 && type != torch.types[code]) ++code;
  require(code < 3);
  return static_cast<DType>(code);
}

int thread_count() {
  return static_cast<int>(PyLong_AsLong(steal(PyObject_CallNoArgs(torch.get_num_threads)).ptr()));
}

// A dense CPU tensor.
class Dense {
 public:
  explicit Dense(PyObject* object) : view_(object) {
    require(view_.device_type == kDLCPU);
    int64_t stride = 1;
    bool dense = true, empty = false;
    for (int64_t i = view_.dims - 1; i >= 0; --i) {
      dense = dense && (view_.shape[i] == 1 || view_.strides[i] == stride);
      stride *= view_.shape[i];
      empty = empty || view_.shape[i] == 0;
    }
    require(empty || (dense && view_.data != nullptr));
  }
  int64_t dims() const { return view_.dims; }
  int64_t size(int64_t dim) const { return view_.shape[dim]; }
  TensorType type() const { return view_.type; }
  bool is(TensorType wanted) const { return type() == wanted; }
  bool is_vector(int64_t length, TensorType wanted) const {
    return is(wanted) && dims() == 1 && size(0) == length;
  }
  template <typename T>
  const T* data() const {
    return static_cast<const T*>(view_.data);
  }

 private:
  TensorView view_;
};

// torch.empty of the first `leading` sizes of `like`, then size `last`.
py::object new_tensor(const Dense& like, int64_t leading, int64_t last, PyObject* type) {
  const py::object shape = steal(PyTuple_New(leading + 1));
  for (int64_t i = 0; i <= leading; ++i) {
    PyObject* size = PyLong_FromLongLong(i < leading ? like.size(i) : last);
    require(size != nullptr);
    PyTuple_SET_ITEM(shape.ptr(), i, size);
  }
  PyObject* arguments[3] = {shape.ptr(), type, torch.cpu};
  return steal(PyObject_Vectorcall(torch.empty, arguments, 1, names().keywords));
}

Activation activation_of(PyObject* act_fn) {
  if (act_fn == Py_None) return Activation::kNone;
  const char* name = PyUnicode_Check(act_fn) ? PyUnicode_AsUTF8(act_fn) : nullptr;
  require(name != nullptr);
  if (std::strcmp(name, "relu") == 0) return Activation::kRelu;
  if (std::strcmp(name, "gelu") == 0) return Activation::kGelu;
  if (std::strcmp(name, "gelu_tanh") == 0) return Activation::kGeluTanh;
  require(std::strcmp(name, "silu") == 0);
  return Activation::kSilu;
}

// What the linear ops have in common.
void read_linear(LinearArgs& args, const Dense& x, int64_t n, PyObject* bias, PyObject* act_fn,
                 PyObject* rotated) {
  require(x.dims() >= 1);
  args.n = n;
  args.k = x.size(x.dims() - 1);
  args.x_type = args.y_type = float_type(x.type());
  args.x = x.data<void>();
  args.x_stride = args.k;
  args.m = 1;
  for (int64_t i = 0; i + 1 < x.dims(); ++i) args.m *= x.size(i);
  args.rotated = rotated == Py_True;
  args.activation = activation_of(act_fn);
  args.bias = nullptr;
  if (bias != Py_None) {
    const Dense vector(bias);
    require(vector.is_vector(n, kFloat32));
    args.bias = vector.data<float>();
  }
}

// Allocates the output and computes it.
template <typename Args>
py::object compute_linear(Args& args, const Dense& x, void (*linear)(const Args&, int threads)) {
  const py::object y = new_tensor(x, x.dims() - 1, args.n, torch.types[x.type()]);
  args.y = reinterpret_cast<void*>(address_of(y.ptr()));
  const int threads = thread_count();
  require(!PyErr_Occurred());
  {
    py::gil_scoped_release release;
    linear(args, threads);
  }
  return y;
}

py::object int8_linear_plain(PyObject* const* values) {
  PyObject *input_scale = values[4], *weight_only = values[5], *packed = values[7];
  require_automatic_backend();
  require(packed != Py_None);
  const Dense x(values[0]), qweight(values[1]), scale(values[2]), panels(packed);
  require(qweight.is(kInt8) && qweight.dims() == 2);

  Int8LinearArgs args;
  read_linear(args, x, qweight.size(0), values[3], values[6], values[8]);
  require(qweight.size(1) == args.k && scale.is_vector(args.n, kFloat32));
  require(panels.is(kInt8) && panels.dims() == 2 && panels.size(0) == panel_count(args.n) &&
          panels.size(1) == int8_panel_bytes(args.k));
  args.packed = panels.data<int8_t>();
  args.weight_scale = scale.data<float>();

  args.mode = weight_only == Py_True ? InputMode::kWeightOnly : InputMode::kDynamic;
  args.input_scale = 0.0f;
  if (input_scale != Py_None) {
    const Dense value(input_scale);
    require(args.mode == InputMode::kDynamic && value.is(kFloat32) && value.dims() == 0);
    args.mode = InputMode::kStatic;
    args.input_scale = static_cast<float>(PyFloat_AsDouble(call(input_scale, names().item).ptr()));
  }
  require(args.mode == InputMode::kWeightOnly || args.k <= INT32_MAX / (127 * 127));
  require(!args.rotated || args.mode != InputMode::kWeightOnly);
  return compute_linear(args, x, int8_linear);
}

// What is read is `packed`; the canonical tensors only say what it must hold.
py::object int4_linear_plain(PyObject* const* values) {
  PyObject *zero_point = values[3], *codebook = values[4], *packed = values[10];
  require_automatic_backend();
  require(packed != Py_None && values[5] == Py_None);  // a group index permutes x
  const Dense x(values[0]), qweight(values[1]), scale(values[2]), panels(packed);
  require(qweight.is(kUInt8) && qweight.dims() == 2 && scale.dims() == 2);

  Int4LinearArgs args;
  read_linear(args, x, qweight.size(0), values[6], values[9], values[11]);
  args.weight_only = values[8] == Py_True;
  require(!args.rotated || !args.weight_only);
  const int64_t group_size = PyLong_AsLongLong(values[7]);
  require(group_size == -1 || group_size == 32 || group_size == 64 || group_size == kInt4Segment);
  const int64_t groups = group_size == -1 ? 1 : ceil_div(args.k, group_size);
  require(qweight.size(1) == ceil_div(args.k, 2));
  const auto has_groups = [&](const Dense& tensor) {
    return tensor.size(0) == args.n && tensor.size(1) == groups;
  };
  require(has_groups(scale));
  float_type(scale.type());
  bool has_zero = false;
  if (zero_point != Py_None) {
    const Dense zero(zero_point);
    require(codebook == Py_None && zero.dims() == 2 && has_groups(zero));
    if (!zero.is(kUInt8)) float_type(zero.type());
    has_zero = true;
  }
  TableScope scope = TableScope::kNone;
  if (codebook != Py_None) {
    const Dense table(codebook);
    require(table.is(kFloat32) && table.dims() >= 1 && table.dims() <= 3 &&
            table.size(table.dims() - 1) == 16);
    require(table.dims() != 2 || table.size(0) == args.n);
    require(table.dims() != 3 || has_groups(table));
    scope = table.dims() == 3 ? TableScope::kSegment : TableScope::kPanel;
  }
  const int segment = group_size == -1 ? kInt4Segment : static_cast<int>(group_size);
  args.layout = {args.k, segment, has_zero, scope, args.weight_only};
  require(panels.is(kUInt8) && panels.dims() == 2 && panels.size(0) == panel_count(args.n) &&
          panels.size(1) == args.layout.panel_bytes());
  args.packed = panels.data<uint8_t>();
  return compute_linear(args, x, int4_linear);
}

// Only with indices that were checked; int8 values only with their packed copy.
py::object block_sparse_linear_plain(PyObject* const* values) {
  PyObject *weight_scale = values[6], *packed = values[9];
  require_automatic_backend();
  require(values[10] == Py_True);
  const Dense x(values[0]), blocks(values[1]), crow(values[2]), col(values[3]);
  require(blocks.dims() == 3 && crow.is(kInt32) && crow.dims() == 1 && col.dims() == 1);

  BlockSparseLinearArgs args;
  read_linear(args, x, PyLong_AsLongLong(values[4]), values[7], values[8], Py_False);
  BlockSparse& weight = args.weight;
  weight = {args.n,  args.k,  blocks.size(1),      blocks.size(2), nullptr,
            nullptr, nullptr, ValueType::kFloat32, blocks.size(0)};
  require(PyLong_AsLongLong(values[5]) == args.k && args.n >= 0 && weight.height > 0 && weight.width > 0);
  require(crow.size(0) == weight.block_rows() + 1 && col.is_vector(weight.blocks, kInt32));
  weight.crow = crow.data<int32_t>();
  weight.col = col.data<int32_t>();
  args.weight_scale = nullptr;
  args.packed = nullptr;
  if (blocks.is(kInt8)) {
    weight.type = ValueType::kInt8;
    const Dense scale(weight_scale), units(packed);
    require(scale.is_vector(args.n, kFloat32) && args.k <= INT32_MAX / (127 * 127));
    require(units.is(kUInt8) && units.dims() == 1 && units.size(0) == packed_layout(weight).bytes());
    args.weight_scale = scale.data<float>();
    args.packed = units.data<uint8_t>();
  } else {
    require(weight_scale == Py_None && packed == Py_None);
    switch (float_type(blocks.type())) {
      case DType::kFloat32: weight.type = ValueType::kFloat32; break;
      case DType::kBFloat16: weight.type = ValueType::kBFloat16; break;
      case DType::kFloat16: weight.type = ValueType::kFloat16; break;
    }
    weight.values = blocks.data<void>();
  }
  return compute_linear(args, x, block_sparse_linear);
}

// An index out of range is not plain: the full path names it.
py::object int8_embedding_plain(PyObject* const* values) {
  require_automatic_backend();
  const Dense indices(values[0]), table(values[1]), scale(values[2]);
  Int8EmbeddingArgs args;
  args.wide_indices = indices.is(kInt64);
  require((args.wide_indices || indices.is(kInt32)) && table.is(kInt8) && table.dims() == 2);
  args.rows = table.size(0);
  args.width = table.size(1);
  require(scale.is_vector(args.rows, kFloat32));
  args.y_type = float_type(values[3]);
  args.count = 1;
  for (int64_t i = 0; i < indices.dims(); ++i) args.count *= indices.size(i);
  args.indices = indices.data<void>();
  args.table = table.data<int8_t>();
  args.scale = scale.data<float>();
  const py::object y = new_tensor(indices, indices.dims(), table.size(1), values[3]);
  args.y = reinterpret_cast<void*>(address_of(y.ptr()));
  const int threads = thread_count();
  require(!PyErr_Occurred());

  bool in_range;
  {
    py::gil_scoped_release release;
    in_range = int8_embedding(args, threads) < 0;
  }
  require(in_range);
  return y;
}

// The Python entry of a plain call of kCount arguments.
template <py::object (*kCall)(PyObject* const*), Py_ssize_t kCount>
PyObject* entry(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", kCount, count);
    return nullptr;
  }
  try {
    return kCall(values).release().ptr();
  } catch (const NotPlain&) {
    PyErr_Clear();
    Py_RETURN_NONE;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

template <py::object (*kCall)(PyObject* const*), Py_ssize_t kCount>
PyMethodDef define(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry<kCall, kCount>)),
          METH_FASTCALL, doc};
}

PyMethodDef definitions[] = {
    define<int8_linear_plain, 9>("int8_linear_plain", "int8_linear where everything is plain, else None."),
    define<int4_linear_plain, 12>("int4_linear_plain", "int4_linear where everything is plain, else None."),
    define<block_sparse_linear_plain, 11>("block_sparse_linear_plain",
                                          "block_sparse_linear where everything is plain, else None."),
    define<int8_embedding_plain, 4>("int8_embedding_plain",
                                    "int8_embedding where everything is plain, else None."),
};

}  // namespace

void add_plain_calls(py::module_& module) {
  module.def("bind_torch", [](const py::module_& source) {
    const auto keep = [&](const char* name) { return py::object(source.attr(name)).release().ptr(); };
    torch.empty = keep("empty");
    torch.get_num_threads = keep("get_num_threads");
    for (int code = 0; code < kTensorTypes; ++code) torch.types[code] = keep(kTensorTypeNames[code]);
    torch.tensor = keep("Tensor");
    torch.parameter = py::object(source.attr("nn").attr("Parameter")).release().ptr();
    const py::object api = py::getattr(source.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(api.ptr(), "dlpack_exchange_api")) {
      const auto* exchange =
          static_cast<const DLPackExchange*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
      if (exchange->major == 1 && exchange->read != nullptr) torch.dlpack = exchange;
    }
    torch.cpu = source.attr("device")("cpu").release().ptr();
  });
  // For tests: whether tensors are read through DLPack's exchange API from now on, where torch has it.
  static const DLPackExchange* available = nullptr;
  module.def("read_by_dlpack", [](bool wanted) {
    if (torch.dlpack) available = torch.dlpack;
    torch.dlpack = wanted ? available : nullptr;
    return torch.dlpack != nullptr;
  });
  for (PyMethodDef& definition : definitions) {
    module.add_object(definition.ml_name,
                      py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, nullptr, nullptr)));
  }
}

}  // namespace lissom
