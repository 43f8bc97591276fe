#include "launch.h"

#if !defined(LISSOM_CUDA_EMULATOR)
#include <cuda.h>  // types only: no libcuda is linked
#endif

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace lissom::cuda {

#if defined(LISSOM_CUDA_EMULATOR)

namespace {
Device emulated = {80, 4, 163 << 10, 40 << 20};
}
const Device& current_device() { return emulated; }
void emulate_device(const Device& device) { emulated = device; }
bool hopper_forms() { return emulated.arch == 90; }
bool overlaps_launches() { return false; }
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
  static const bool compiled = std::strstr(LISSOM_CUDA_ARCHITECTURES, "90a") != nullptr;
  return compiled && !(asked != nullptr && std::strcmp(asked, "0") == 0) && current_device().arch == 90;
}

bool overlaps_launches() {
  static const char* asked = std::getenv("LISSOM_CUDA_OVERLAP");
  return asked != nullptr && std::strcmp(asked, "1") == 0 && current_device().arch >= 90;
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

namespace {

// Lets `kernel` have so much dynamic shared memory on the current device. What another thread, or a captured
// graph, was allowed before is never taken back.
void allow_shared(const char* name, const void* kernel, int bytes) {
  constexpr int kByDefault = 32 << 10;  // 48 KB with what the kernel has of fixed size; more is asked for
  if (bytes <= kByDefault) return;
  static std::mutex lock;
  static std::map<std::pair<int, const void*>, int> allowed;
  int device = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> held(lock);
  int& most = allowed[{device, kernel}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  most = bytes;
}

}  // namespace

Configuration::Configuration(const Launch& how, const void* kernel) {
  allow_shared(how.name, kernel, how.shared_bytes);
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(how.stream);
  config.attrs = attributes_;
  // Of one block as well: cudaOccupancyMaxActiveClusters wants a size.
  if (how.cluster > 0 && current_device().arch >= 90) {
    cudaLaunchAttribute& cluster = attributes_[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(how.cluster);
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
  }
  if (how.overlaps && overlaps_launches()) {
    cudaLaunchAttribute& overlap = attributes_[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
}

int clusters_at_a_time(const Launch& how, const void* kernel) {
  static std::mutex lock;
  static std::map<std::tuple<int, const void*, int>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), how.name);
  const std::lock_guard<std::mutex> held(lock);
  const auto [at, is_new] = known.try_emplace({device, kernel, how.cluster});
  if (is_new) {
    const Configuration configuration(how, kernel);
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&at->second, kernel, &configuration.config);
    if (status != cudaSuccess) known.erase(at);
    check(status, how.name);
  }
  return at->second;
}

TensorMap tensor_map(const char* name, const void* matrix, int64_t rows, int64_t columns, int64_t stride,
                     int box_rows, int box_columns) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [name] {  // the driver's, which the runtime knows
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    check(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status),
        name);
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status), name);
#endif
    if (status != cudaDriverEntryPointSuccess || found == nullptr) {
      throw std::runtime_error(std::string(name) + ": the driver has no cuTensorMapEncodeTiled; update it");
    }
    return reinterpret_cast<Encode>(found);
  }();
  TensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT8, 2,
             const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_columns == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(name) + ": cuTensorMapEncodeTiled: CUresult " +
                             std::to_string(static_cast<int>(result)) + " for [" + std::to_string(rows) +
                             ", " + std::to_string(columns) + "] bytes, rows " + std::to_string(stride) +
                             " apart");
  }
  return map;
}

#endif

}  // namespace lissom::cuda
