#include "plain_call.h"

#include <cstdlib>
#include <cstring>

#include "cpu/block_sparse_linear.h"
#include "cpu/int4_linear.h"
#include "cpu/int8_embedding.h"
#include "cpu/int8_linear.h"

namespace py = pybind11;

namespace lissom {
namespace {

// Borrowed for the life of the process; set by bind_torch.
struct Torch {
  PyObject* empty = nullptr;
  PyObject* get_num_threads = nullptr;
  PyObject* float_types[3] = {};  // in the order of DType
  PyObject *int8 = nullptr, *uint8 = nullptr, *int32 = nullptr, *int64 = nullptr;
  PyObject *tensor = nullptr, *parameter = nullptr;  // types
  PyObject* cpu = nullptr;  // named in every allocation: the user may have set another default device
} torch;

struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* item = PyUnicode_InternFromString("item");
  PyObject* keywords = Py_BuildValue("(ss)", "dtype", "device");
};
const Names& names() {
  static const Names all;
  return all;
}

// Thrown where the call is not the plain one, or Python raised: the full path finds out which.
struct NotPlain {};

void require(bool condition) {
  if (!condition) throw NotPlain();
}
py::object steal(PyObject* object) {
  require(object != nullptr);
  return py::reinterpret_steal<py::object>(object);
}
py::object attribute(PyObject* object, PyObject* name) { return steal(PyObject_GetAttr(object, name)); }
py::object call(PyObject* object, PyObject* name) { return steal(PyObject_CallMethodNoArgs(object, name)); }
bool is_true(const py::object& object) { return object.ptr() == Py_True; }

uintptr_t address_of(PyObject* tensor) {
  return static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(call(tensor, names().data_ptr).ptr()));
}

void require_automatic_backend() {
  const char* forced = std::getenv("LISSOM_BACKEND");  // os.environ writes through to the C environment
  require(torch.empty != nullptr && (forced == nullptr || *forced == '\0'));
}

// Anything but the three float types is not plain.
DType float_type(PyObject* type) {
  int code = 0;
  while (code < 3 && type != torch.float_types[code]) ++code;
  require(code < 3);
  return static_cast<DType>(code);
}

int thread_count() {
  return static_cast<int>(PyLong_AsLong(steal(PyObject_CallNoArgs(torch.get_num_threads)).ptr()));
}

// A dense CPU tensor, and no subclass: those need not have the memory that they seem to have.
struct Dense {
  explicit Dense(PyObject* object) : tensor(object) {
    const auto* type_of = reinterpret_cast<PyObject*>(Py_TYPE(object));
    require(type_of == torch.tensor || type_of == torch.parameter);
    require(is_true(attribute(object, names().is_cpu)) && is_true(call(object, names().is_contiguous)));
    shape = attribute(object, names().shape);
    require(PyTuple_Check(shape.ptr()));
    type = attribute(object, names().dtype);
  }
  int64_t dims() const { return PyTuple_GET_SIZE(shape.ptr()); }
  PyObject* size_object(int64_t dim) const { return PyTuple_GET_ITEM(shape.ptr(), dim); }
  int64_t size(int64_t dim) const { return PyLong_AsLongLong(size_object(dim)); }
  bool is(PyObject* wanted) const { return type.ptr() == wanted; }
  bool is_vector(int64_t length, PyObject* wanted) const {
    return is(wanted) && dims() == 1 && size(0) == length;
  }
  uintptr_t address() const { return address_of(tensor); }

  PyObject* tensor;
  py::object shape, type;
};

// torch.empty of the first `leading` sizes of `like`, then size `last`, a Python int.
py::object new_tensor(const Dense& like, int64_t leading, PyObject* last, const py::object& type) {
  const py::object shape = steal(PyTuple_New(leading + 1));
  for (int64_t i = 0; i <= leading; ++i) {
    PyObject* size = i < leading ? PyTuple_GET_ITEM(like.shape.ptr(), i) : last;
    Py_INCREF(size);
    PyTuple_SET_ITEM(shape.ptr(), i, size);
  }
  PyObject* arguments[3] = {shape.ptr(), type.ptr(), torch.cpu};
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
  args.x_type = args.y_type = float_type(x.type.ptr());
  args.x = reinterpret_cast<const void*>(x.address());
  args.x_stride = args.k;
  args.m = 1;
  for (int64_t i = 0; i + 1 < x.dims(); ++i) args.m *= x.size(i);
  args.rotated = rotated == Py_True;
  args.activation = activation_of(act_fn);
  args.bias = nullptr;
  if (bias != Py_None) {
    const Dense vector(bias);
    require(vector.is_vector(n, torch.float_types[0]));
    args.bias = reinterpret_cast<const float*>(vector.address());
  }
}

// Allocates the output, whose last size is `outputs`, and computes it.
template <typename Args>
py::object compute_linear(Args& args, const Dense& x, PyObject* outputs,
                          void (*linear)(const Args&, int threads)) {
  const py::object y = new_tensor(x, x.dims() - 1, outputs, x.type);
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
  require(qweight.is(torch.int8) && qweight.dims() == 2);

  Int8LinearArgs args;
  read_linear(args, x, qweight.size(0), values[3], values[6], values[8]);
  require(qweight.size(1) == args.k && scale.is_vector(args.n, torch.float_types[0]));
  require(panels.is(torch.int8) && panels.dims() == 2 && panels.size(0) == panel_count(args.n) &&
          panels.size(1) == int8_panel_bytes(args.k));
  args.packed = reinterpret_cast<const int8_t*>(panels.address());
  args.weight_scale = reinterpret_cast<const float*>(scale.address());

  args.mode = weight_only == Py_True ? InputMode::kWeightOnly : InputMode::kDynamic;
  args.input_scale = 0.0f;
  if (input_scale != Py_None) {
    const Dense value(input_scale);
    require(args.mode == InputMode::kDynamic && value.is(torch.float_types[0]) && value.dims() == 0);
    args.mode = InputMode::kStatic;
    args.input_scale = static_cast<float>(PyFloat_AsDouble(call(input_scale, names().item).ptr()));
  }
  require(args.mode == InputMode::kWeightOnly || args.k <= INT32_MAX / (127 * 127));
  require(!args.rotated || args.mode != InputMode::kWeightOnly);
  return compute_linear(args, x, qweight.size_object(0), int8_linear);
}

// What is read is `packed`; the canonical tensors only say what it must hold.
py::object int4_linear_plain(PyObject* const* values) {
  PyObject *zero_point = values[3], *codebook = values[4], *packed = values[10];
  require_automatic_backend();
  require(packed != Py_None && values[5] == Py_None);  // a group index permutes x
  const Dense x(values[0]), qweight(values[1]), scale(values[2]), panels(packed);
  require(qweight.is(torch.uint8) && qweight.dims() == 2 && scale.dims() == 2);

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
  float_type(scale.type.ptr());
  bool has_zero = false;
  if (zero_point != Py_None) {
    const Dense zero(zero_point);
    require(codebook == Py_None && zero.dims() == 2 && has_groups(zero));
    if (!zero.is(torch.uint8)) float_type(zero.type.ptr());
    has_zero = true;
  }
  TableScope scope = TableScope::kNone;
  if (codebook != Py_None) {
    const Dense table(codebook);
    require(table.is(torch.float_types[0]) && table.dims() >= 1 && table.dims() <= 3 &&
            table.size(table.dims() - 1) == 16);
    require(table.dims() != 2 || table.size(0) == args.n);
    require(table.dims() != 3 || has_groups(table));
    scope = table.dims() == 3 ? TableScope::kSegment : TableScope::kPanel;
  }
  const int segment = group_size == -1 ? kInt4Segment : static_cast<int>(group_size);
  args.layout = {args.k, segment, has_zero, scope, args.weight_only};
  require(panels.is(torch.uint8) && panels.dims() == 2 && panels.size(0) == panel_count(args.n) &&
          panels.size(1) == args.layout.panel_bytes());
  args.packed = reinterpret_cast<const uint8_t*>(panels.address());
  return compute_linear(args, x, qweight.size_object(0), int4_linear);
}

// Only with indices that were checked; int8 values only with their packed copy.
py::object block_sparse_linear_plain(PyObject* const* values) {
  PyObject *weight_scale = values[6], *packed = values[9];
  require_automatic_backend();
  require(values[10] == Py_True);
  const Dense x(values[0]), blocks(values[1]), crow(values[2]), col(values[3]);
  require(blocks.dims() == 3 && crow.is(torch.int32) && crow.dims() == 1 && col.dims() == 1);

  BlockSparseLinearArgs args;
  read_linear(args, x, PyLong_AsLongLong(values[4]), values[7], values[8], Py_False);
  BlockSparse& weight = args.weight;
  weight = {args.n,  args.k,  blocks.size(1),      blocks.size(2), nullptr,
            nullptr, nullptr, ValueType::kFloat32, blocks.size(0)};
  require(PyLong_AsLongLong(values[5]) == args.k && args.n >= 0 && weight.height > 0 && weight.width > 0);
  require(crow.size(0) == weight.block_rows() + 1 && col.is_vector(weight.blocks, torch.int32));
  weight.crow = reinterpret_cast<const int32_t*>(crow.address());
  weight.col = reinterpret_cast<const int32_t*>(col.address());
  args.weight_scale = nullptr;
  args.packed = nullptr;
  if (blocks.is(torch.int8)) {
    weight.type = ValueType::kInt8;
    const Dense scale(weight_scale), units(packed);
    require(scale.is_vector(args.n, torch.float_types[0]) && args.k <= INT32_MAX / (127 * 127));
    require(units.is(torch.uint8) && units.dims() == 1 && units.size(0) == packed_layout(weight).bytes());
    args.weight_scale = reinterpret_cast<const float*>(scale.address());
    args.packed = reinterpret_cast<const uint8_t*>(units.address());
  } else {
    require(weight_scale == Py_None && packed == Py_None);
    if (blocks.is(torch.float_types[1])) {
      weight.type = ValueType::kBFloat16;
    } else {
      require(blocks.is(torch.float_types[0]));
    }
    weight.values = reinterpret_cast<const void*>(blocks.address());
  }
  return compute_linear(args, x, values[4], block_sparse_linear);
}

// An index out of range is not plain: the full path names it.
py::object int8_embedding_plain(PyObject* const* values) {
  require_automatic_backend();
  const Dense indices(values[0]), table(values[1]), scale(values[2]);
  Int8EmbeddingArgs args;
  args.wide_indices = indices.is(torch.int64);
  require((args.wide_indices || indices.is(torch.int32)) && table.is(torch.int8) && table.dims() == 2);
  args.rows = table.size(0);
  args.width = table.size(1);
  require(scale.is_vector(args.rows, torch.float_types[0]));
  args.y_type = float_type(values[3]);
  args.count = 1;
  for (int64_t i = 0; i < indices.dims(); ++i) args.count *= indices.size(i);
  args.indices = reinterpret_cast<const void*>(indices.address());
  args.table = reinterpret_cast<const int8_t*>(table.address());
  args.scale = reinterpret_cast<const float*>(scale.address());
  const py::object y = new_tensor(indices, indices.dims(), table.size_object(1),
                                  py::reinterpret_borrow<py::object>(values[3]));
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
    torch.float_types[0] = keep("float32");
    torch.float_types[1] = keep("bfloat16");
    torch.float_types[2] = keep("float16");
    torch.tensor = keep("Tensor");
    torch.parameter = py::object(source.attr("nn").attr("Parameter")).release().ptr();
    torch.int8 = keep("int8");
    torch.uint8 = keep("uint8");
    torch.int32 = keep("int32");
    torch.int64 = keep("int64");
    torch.cpu = source.attr("device")("cpu").release().ptr();
  });
  for (PyMethodDef& definition : definitions) {
    module.add_object(definition.ml_name,
                      py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, nullptr, nullptr)));
  }
}

}  // namespace lissom
