#include "plain_call.h"

#include <cstdlib>
#include <cstring>

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
  PyObject *int8 = nullptr, *int32 = nullptr, *int64 = nullptr;
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

DType float_type(PyObject* type) {
  int code = 0;
  while (code < 3 && type != torch.float_types[code]) ++code;
  require(code < 3);
  return static_cast<DType>(code);
}

int thread_count() {
  return static_cast<int>(PyLong_AsLong(steal(PyObject_CallNoArgs(torch.get_num_threads)).ptr()));
}

// A dense CPU tensor.
struct Dense {
  explicit Dense(PyObject* object) : tensor(object) {
    require(is_true(attribute(object, names().is_cpu)) && is_true(call(object, names().is_contiguous)));
    shape = attribute(object, names().shape);
    require(PyTuple_Check(shape.ptr()));
    type = attribute(object, names().dtype);
  }
  int64_t dims() const { return PyTuple_GET_SIZE(shape.ptr()); }
  int64_t size(int64_t dim) const { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), dim)); }
  bool is(PyObject* wanted) const { return type.ptr() == wanted; }
  bool is_vector(int64_t length, PyObject* wanted) const {
    return is(wanted) && dims() == 1 && size(0) == length;
  }
  uintptr_t address() const { return address_of(tensor); }

  PyObject* tensor;
  py::object shape, type;
};

// torch.empty of the first `leading` sizes of `like`, then size `dim` of `last`.
py::object new_tensor(const Dense& like, int64_t leading, const Dense& last, int64_t dim,
                      const py::object& type) {
  const py::object shape = steal(PyTuple_New(leading + 1));
  for (int64_t i = 0; i <= leading; ++i) {
    PyObject* size =
        i < leading ? PyTuple_GET_ITEM(like.shape.ptr(), i) : PyTuple_GET_ITEM(last.shape.ptr(), dim);
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

py::object int8_linear_plain(PyObject* const* values) {
  PyObject *bias = values[3], *input_scale = values[4], *weight_only = values[5], *packed = values[7],
           *rotated = values[8];
  require_automatic_backend();
  require(packed != Py_None);
  const Dense x(values[0]), qweight(values[1]), scale(values[2]), panels(packed);

  Int8LinearArgs args;
  require(qweight.is(torch.int8) && qweight.dims() == 2 && x.dims() >= 1);
  args.n = qweight.size(0);
  args.k = qweight.size(1);
  require(x.size(x.dims() - 1) == args.k && scale.is_vector(args.n, torch.float_types[0]));
  require(panels.is(torch.int8) && panels.dims() == 2 && panels.size(0) == panel_count(args.n) &&
          panels.size(1) == int8_panel_bytes(args.k));
  args.x_type = args.y_type = float_type(x.type.ptr());

  args.mode = weight_only == Py_True ? InputMode::kWeightOnly : InputMode::kDynamic;
  args.input_scale = 0.0f;
  if (input_scale != Py_None) {
    const Dense value(input_scale);
    require(args.mode == InputMode::kDynamic && value.is(torch.float_types[0]) && value.dims() == 0);
    args.mode = InputMode::kStatic;
    args.input_scale = static_cast<float>(PyFloat_AsDouble(call(input_scale, names().item).ptr()));
  }
  require(args.mode == InputMode::kWeightOnly || args.k <= INT32_MAX / (127 * 127));
  args.rotated = rotated == Py_True;
  require(!args.rotated || args.mode != InputMode::kWeightOnly);
  args.activation = activation_of(values[6]);
  args.bias = nullptr;
  if (bias != Py_None) {
    const Dense vector(bias);
    require(vector.is_vector(args.n, torch.float_types[0]));
    args.bias = reinterpret_cast<const float*>(vector.address());
  }
  args.x = reinterpret_cast<const void*>(x.address());
  args.x_stride = args.k;
  args.packed = reinterpret_cast<const int8_t*>(panels.address());
  args.weight_scale = reinterpret_cast<const float*>(scale.address());

  args.m = 1;
  for (int64_t i = 0; i + 1 < x.dims(); ++i) args.m *= x.size(i);
  const py::object y = new_tensor(x, x.dims() - 1, qweight, 0, x.type);
  args.y = reinterpret_cast<void*>(address_of(y.ptr()));
  const int threads = thread_count();
  require(!PyErr_Occurred());

  {
    py::gil_scoped_release release;
    int8_linear(args, threads);
  }
  return y;
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
  const py::object y =
      new_tensor(indices, indices.dims(), table, 1, py::reinterpret_borrow<py::object>(values[3]));
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
    torch.int8 = keep("int8");
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
