#include "call_key.h"

#include <cstdlib>
#include <cstring>

#include "torch_objects.h"

namespace py = pybind11;

namespace lissom {
namespace {

bool cpu_too = false;  // for tests, which have no GPU

// Bytes on the stack: a call has less than a KiB of them.
class Writer {
 public:
  void put(const void* bytes, size_t count) {
    require(size_ + count <= sizeof bytes_);
    std::memcpy(bytes_ + size_, bytes, count);
    size_ += count;
  }
  template <typename T>
  void number(T value) {
    put(&value, sizeof value);
  }
  void text(const char* start, size_t length) {
    number(static_cast<uint32_t>(length));
    put(start, length);
  }
  PyObject* bytes() const { return PyBytes_FromStringAndSize(bytes_, static_cast<Py_ssize_t>(size_)); }

 private:
  char bytes_[4096];
  size_t size_ = 0;
};

void put_tensor(Writer& key, const TensorView& tensor) {
  require(tensor.device_type == kDLCUDA || cpu_too);
  key.number('t');
  key.number(static_cast<uint8_t>(tensor.type));
  key.number(static_cast<uint8_t>(tensor.dims));
  key.number(static_cast<uint8_t>(tensor.device_type));
  key.number(static_cast<uint8_t>(reinterpret_cast<uintptr_t>(tensor.data) % 64));
  key.number(tensor.device);
  for (int64_t i = 0; i < tensor.dims; ++i) {
    require(tensor.shape[i] > 0);
    key.number(tensor.shape[i]);
    key.number(tensor.strides[i]);
  }
  require(tensor.data != nullptr);
}

void put_other(Writer& key, PyObject* value) {
  if (value == Py_None) return key.number('n');
  if (value == Py_True) return key.number('y');
  if (value == Py_False) return key.number('f');
  if (PyLong_CheckExact(value)) {
    key.number('i');
    key.number(static_cast<int64_t>(PyLong_AsLongLong(value)));
    return require(!PyErr_Occurred());
  }
  if (PyUnicode_CheckExact(value)) {
    Py_ssize_t length = 0;
    const char* start = PyUnicode_AsUTF8AndSize(value, &length);
    require(start != nullptr);
    key.number('s');
    return key.text(start, static_cast<size_t>(length));
  }
  uint8_t code = 0;
  while (code < kTensorTypes && value != torch.types[code]) ++code;
  require(code < kTensorTypes);
  key.number('d');
  key.number(code);
}

void put_environment(Writer& key, const char* name) {
  const char* said = std::getenv(name);  // os.environ writes through to the C environment
  key.text(said ? said : "", said ? std::strlen(said) : 0);
}

PyObject* call_key(PyObject*, PyObject* arguments) {
  if (!PyTuple_Check(arguments)) {
    PyErr_SetString(PyExc_TypeError, "call_key takes a tuple");
    return nullptr;
  }
  constexpr int kMost = 16;
  try {
    Writer key;
    const void* addresses[kMost];
    int count = 0, device_type = 0, device = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) {
      PyObject* value = PyTuple_GET_ITEM(arguments, i);
      if (!TensorView::is_tensor(value)) {
        put_other(key, value);
        continue;
      }
      const TensorView tensor(value);
      put_tensor(key, tensor);
      require(count < kMost &&
              (count == 0 || (tensor.device_type == device_type && tensor.device == device)));
      device_type = tensor.device_type;
      device = tensor.device;
      addresses[count++] = tensor.data;
    }
    require(count > 0);
    put_environment(key, "LISSOM_BACKEND");
    put_environment(key, "LISSOM_AUTOTUNE");
    const py::object places = steal(PyTuple_New(count)), bytes = steal(key.bytes());
    for (int i = 0; i < count; ++i) {
      PyObject* place = PyLong_FromUnsignedLongLong(reinterpret_cast<uintptr_t>(addresses[i]));
      require(place != nullptr);
      PyTuple_SET_ITEM(places.ptr(), i, place);
    }
    return steal(PyTuple_Pack(2, bytes.ptr(), places.ptr())).release().ptr();
  } catch (const NotPlain&) {
    PyErr_Clear();
    Py_RETURN_NONE;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef definition = {"call_key", call_key, METH_O,
                          "What distinguishes a call, and where its tensors are."};

}  // namespace

void add_call_key(py::module_& module) {
  module.add_object("call_key",
                    py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, nullptr, nullptr)));
  module.def(
      "call_key_on_cpu", [](bool wanted) { cpu_too = wanted; }, "For tests: whether CPU tensors have one.");
}

}  // namespace lissom
