// Tensors as Python objects, read without linking torch: through DLPack's exchange API where torch has it
// (30 ns a tensor), otherwise through the attributes that any Python code would read (0.4 us).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace lissom {

// What is told apart; the floats in the order of lissom::DType.
enum TensorType { kFloat32, kBFloat16, kFloat16, kInt8, kUInt8, kInt32, kInt64, kTensorTypes };
constexpr const char* kTensorTypeNames[kTensorTypes] = {"float32", "bfloat16", "float16", "int8",
                                                        "uint8",   "int32",    "int64"};

// Thrown where a call is not one that is served here, or Python raised: the full path finds out which.
struct NotPlain {};

inline void require(bool condition) {
  if (!condition) throw NotPlain();
}
inline pybind11::object steal(PyObject* object) {
  require(object != nullptr);
  return pybind11::reinterpret_steal<pybind11::object>(object);
}
inline pybind11::object attribute(PyObject* object, PyObject* name) {
  return steal(PyObject_GetAttr(object, name));
}
inline pybind11::object call(PyObject* object, PyObject* name) {
  return steal(PyObject_CallMethodNoArgs(object, name));
}

// DLPack's exchange API (DLPack 1.2, torch >= 2.10): a table of C functions behind
// torch.Tensor.__dlpack_c_exchange_api__. Only what is used here is spelled out.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchange {
  uint32_t major, minor;
  void* older;
  void *allocate, *managed_from, *managed_to;
  int (*read)(void* object, DLTensor* out);  // owns nothing: valid while the tensor is
  void* stream;
};
constexpr int kDLCPU = 1, kDLCUDA = 2;  // DLDeviceType

// Borrowed for the life of the process; set by bind_torch.
struct Torch {
  PyObject* empty = nullptr;
  PyObject* get_num_threads = nullptr;
  PyObject* types[kTensorTypes] = {};
  PyObject *tensor = nullptr, *parameter = nullptr;  // classes
  PyObject* cpu = nullptr;  // named in every allocation: the user may have set another default device
  const DLPackExchange* dlpack = nullptr;  // null: attributes are read
};
inline Torch torch;

struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* item = PyUnicode_InternFromString("item");
  PyObject* keywords = Py_BuildValue("(ss)", "dtype", "device");
};
inline const Names& names() {
  static const Names all;
  return all;
}

inline uintptr_t address_of(PyObject* tensor) {
  return static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(call(tensor, names().data_ptr).ptr()));
}

// Where a tensor lies, and how; of no subclass: those need not have the memory that they seem to have.
struct TensorView {
  static constexpr int kMostDims = 8;

  explicit TensorView(PyObject* object) {
    require(is_tensor(object));
    if (torch.dlpack) {
      read(object);
    } else {
      ask(object);
    }
  }
  static bool is_tensor(PyObject* object) {
    const auto* type_of = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type_of == torch.tensor || type_of == torch.parameter;
  }

  int device_type, device;  // kDLCPU or kDLCUDA, and which one
  int64_t dims;
  int64_t shape[kMostDims], strides[kMostDims];
  TensorType type;
  const void* data;

 private:
  void read(PyObject* object) {
    DLTensor t;
    require(torch.dlpack->read(object, &t) == 0);
    require((t.device_type == kDLCPU || t.device_type == kDLCUDA) && t.lanes == 1 && t.ndim <= kMostDims);
    device_type = t.device_type;
    device = t.device_id;
    dims = t.ndim;
    for (int64_t i = 0; i < dims; ++i) {
      shape[i] = t.shape[i];
      strides[i] = t.strides[i];
    }
    data = t.data == nullptr ? nullptr : static_cast<const char*>(t.data) + t.byte_offset;
    enum { kInt, kUInt, kFloat, kBFloat = 4 };  // DLDataTypeCode
    switch (t.bits << 8 | t.code) {
      case 32 << 8 | kFloat: type = kFloat32; break;
      case 16 << 8 | kBFloat: type = kBFloat16; break;
      case 16 << 8 | kFloat: type = kFloat16; break;
      case 8 << 8 | kInt: type = kInt8; break;
      case 8 << 8 | kUInt: type = kUInt8; break;
      case 32 << 8 | kInt: type = kInt32; break;
      case 64 << 8 | kInt: type = kInt64; break;
      default: throw NotPlain();
    }
  }

  void ask(PyObject* object) {
    if (attribute(object, names().is_cpu).ptr() == Py_True) {
      device_type = kDLCPU;
      device = 0;
    } else {
      require(attribute(object, names().is_cuda).ptr() == Py_True);
      device_type = kDLCUDA;
      device = static_cast<int>(PyLong_AsLong(call(object, names().get_device).ptr()));
    }
    const pybind11::object sizes = attribute(object, names().shape), steps = call(object, names().stride),
                           dtype = attribute(object, names().dtype);
    require(PyTuple_Check(sizes.ptr()) && PyTuple_Check(steps.ptr()));
    dims = PyTuple_GET_SIZE(sizes.ptr());
    require(dims <= kMostDims && PyTuple_GET_SIZE(steps.ptr()) == dims);
    for (int64_t i = 0; i < dims; ++i) {
      shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i));
      strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(steps.ptr(), i));
    }
    int code = 0;
    while (code < kTensorTypes && dtype.ptr() != torch.types[code]) ++code;
    require(code < kTensorTypes);
    type = static_cast<TensorType>(code);
    data = reinterpret_cast<const void*>(address_of(object));
  }
};

}  // namespace lissom
