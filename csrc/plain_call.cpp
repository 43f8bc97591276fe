#include "plain_call.h"

#include <cstdlib>
#include <cstring>

#include "cpu/int8_linear.h"

namespace py = pybind11;

namespace lissom {
namespace {

// Borrowed for the life of the process; set by bind_torch.
struct Torch {
  PyObject* empty = nullptr;
  PyObject* get_num_threads = nullptr;
  PyObject* float_types[3] = {};  // in the order of DType
  PyObject* int8 = nullptr;
} torch;

struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* item = PyUnicode_InternFromString("item");
  PyObject* keywords = Py_BuildValue("(s)", "dtype");
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
  uintptr_t address() const {
    const py::object value = call(tensor, names().data_ptr);
    return static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(value.ptr()));
  }

  PyObject* tensor;
  py::object shape, type;
};

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
  const char* forced = std::getenv("LISSOM_BACKEND");  // os.environ writes through to the C environment
  require(torch.empty != nullptr && packed != Py_None && (forced == nullptr || *forced == '\0'));
  const Dense x(values[0]), qweight(values[1]), scale(values[2]), panels(packed);

  Int8LinearArgs args;
  require(qweight.is(torch.int8) && qweight.dims() == 2 && x.dims() >= 1);
  args.n = qweight.size(0);
  args.k = qweight.size(1);
  require(x.size(x.dims() - 1) == args.k && scale.is_vector(args.n, torch.float_types[0]));
  require(panels.is(torch.int8) && panels.dims() == 2 && panels.size(0) == int8_panels(args.n) &&
          panels.size(1) == int8_panel_bytes(args.k));
  int type = 0;
  while (type < 3 && !x.is(torch.float_types[type])) ++type;
  require(type < 3);
  args.x_type = args.y_type = static_cast<DType>(type);

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
  const py::object shape = steal(PyTuple_New(x.dims()));
  for (int64_t i = 0; i < x.dims(); ++i) {
    const bool last = i == x.dims() - 1;
    if (!last) args.m *= x.size(i);
    PyObject* size = PyTuple_GET_ITEM((last ? qweight : x).shape.ptr(), last ? 0 : i);
    Py_INCREF(size);
    PyTuple_SET_ITEM(shape.ptr(), i, size);
  }
  PyObject* empty_arguments[2] = {shape.ptr(), x.type.ptr()};
  py::object y = steal(PyObject_Vectorcall(torch.empty, empty_arguments, 1, names().keywords));
  args.y = reinterpret_cast<void*>(
      static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(call(y.ptr(), names().data_ptr).ptr())));
  const long threads = PyLong_AsLong(steal(PyObject_CallNoArgs(torch.get_num_threads)).ptr());
  require(!PyErr_Occurred());

  py::gil_scoped_release release;
  int8_linear(args, static_cast<int>(threads));
  return y;
}

PyObject* int8_linear_plain_entry(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (count != 9) {
    PyErr_SetString(PyExc_TypeError, "int8_linear_plain takes 9 arguments");
    return nullptr;
  }
  try {
    return int8_linear_plain(values).release().ptr();
  } catch (const NotPlain&) {
    PyErr_Clear();
    Py_RETURN_NONE;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyMethodDef int8_linear_plain_definition = {
    "int8_linear_plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(int8_linear_plain_entry)),
    METH_FASTCALL, "int8_linear(x, …, packed) where everything is plain, else None."};

}  // namespace

void add_plain_calls(py::module_& module) {
  module.def("bind_torch",
             [](const py::object& empty, const py::object& get_num_threads, const py::object& float32,
                const py::object& bfloat16, const py::object& float16, const py::object& int8) {
               torch.empty = empty.inc_ref().ptr();
               torch.get_num_threads = get_num_threads.inc_ref().ptr();
               torch.float_types[0] = float32.inc_ref().ptr();
               torch.float_types[1] = bfloat16.inc_ref().ptr();
               torch.float_types[2] = float16.inc_ref().ptr();
               torch.int8 = int8.inc_ref().ptr();
             });
  module.add_object("int8_linear_plain", py::reinterpret_steal<py::object>(PyCFunction_NewEx(
                                             &int8_linear_plain_definition, nullptr, nullptr)));
}

}  // namespace lissom
