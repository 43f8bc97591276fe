#include "launch.h"

#include <cstdlib>
#include <cstring>
#include <mutex>

#if !defined(LISSOM_CUDA_EMULATOR)
#include <cuda.h>  // types only: the driver is not linked
#endif

namespace lissom::cuda {

#if defined(LISSOM_CUDA_EMULATOR)

namespace {
Device emulated = {80, 4, 163 << 10, 40 << 20};
}
const Device& current_device() { return emulated; }
void emulate_device(const Device& device) { emulated = device; }
bool hopper_forms() { return false; }
TensorMap tensor_map(const char* name, const void*, int, int64_t, int64_t, int64_t, int, int) {
  LISSOM_CHECK(false, name, ": the emulator has no copy engine");
  return {};
}
std::string why_not() { return ""; }

#else

namespace {

// Every kernel is compiled for the same architectures: where this one has code, all have.
__global__ void probe() {}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "device");
  return value;
}

std::string version(int number) {
  return std::to_string(number / 1000) + '.' + std::to_string(number % 1000 / 10);
}

}  // namespace

const Device& current_device() {
  constexpr int kMost = 64;
  static Device devices[kMost];
  static std::once_flag once[kMost];
  int id = 0;
  check(cudaGetDevice(&id), "device");
  LISSOM_CHECK(id < kMost, "device ", id, ": only the first ", kMost, " are served");
  std::call_once(once[id], [id] {
    devices[id] = {attribute(cudaDevAttrComputeCapabilityMajor, id) * 10 +
                       attribute(cudaDevAttrComputeCapabilityMinor, id),
                   attribute(cudaDevAttrMultiProcessorCount, id),
                   attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, id),
                   attribute(cudaDevAttrL2CacheSize, id)};
  });
  return devices[id];
}

bool hopper_forms() {
  static const char* asked = std::getenv("LISSOM_CUDA_HOPPER");
  return asked != nullptr && std::strcmp(asked, "1") == 0 && current_device().arch == 90;
}

TensorMap tensor_map(const char* name, const void* data, int item_bytes, int64_t rows, int64_t columns,
                     int64_t row_bytes, int box_rows, int box_columns) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [name] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
        name);
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), name);
#endif
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(std::string(name) + ": the driver has no cuTensorMapEncodeTiled; update it");
    }
    return reinterpret_cast<Encode>(found);
  }();
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "launch.h has its size");
  const int box_bytes = box_columns * item_bytes;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult status =
      encode(&map, item_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
             const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
             : box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                               : CU_TENSOR_MAP_SWIZZLE_32B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(name) + ": no tensor map of " + std::to_string(rows) + " x " +
                             std::to_string(columns) + " elements, rows " + std::to_string(row_bytes) +
                             " bytes apart (CUDA error " + std::to_string(status) + ")");
  }
  TensorMap result;
  std::memcpy(&result, &map, sizeof result);
  return result;
}

std::string why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe);
  if (status == cudaSuccess) return "";
  (void)cudaGetLastError();
  int driver = 0;
  (void)cudaDriverGetVersion(&driver);
  if (status == cudaErrorInsufficientDriver) {
    return "the driver serves CUDA " + version(driver) + ", the kernels were built with CUDA " +
           version(CUDART_VERSION) + "; update the driver, or build them with an older CUDA";
  }
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion) {
    return "no kernel was compiled for compute capability " + std::to_string(current_device().arch / 10) +
           '.' + std::to_string(current_device().arch % 10) + " (only for " LISSOM_CUDA_ARCHITECTURES ")";
  }
  return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
}

#endif

}  // namespace lissom::cuda
