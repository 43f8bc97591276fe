#include "launch.h"

#include <cstdlib>
#include <cstring>
#include <mutex>

namespace lissom::cuda {

#if defined(LISSOM_CUDA_EMULATOR)

namespace {
Device emulated = {80, 4, 163 << 10, 40 << 20};
}
const Device& current_device() { return emulated; }
void emulate_device(const Device& device) { emulated = device; }
bool hopper_forms() { return false; }
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
