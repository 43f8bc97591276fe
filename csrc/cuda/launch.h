// The host's side of every op: what the GPU is, and launching a kernel on it. Errors are std::runtime_error
// with the launch's name. The current device is the caller's (python/lissom/_cuda.py sets the tensors' own).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/check.h"

#if defined(LISSOM_CUDA_EMULATOR)
#include "cuda_names.h"
#else
#include <cuda_runtime.h>
#endif

namespace lissom::cuda {

// What heuristics ask about the current device; read once per device.
struct Device {
  int arch;  // compute capability as one number: 90 for Hopper
  int multiprocessors;
  int shared_bytes;  // that a block can have
  int64_t l2_bytes;
};
const Device& current_device();

// Whether kernels made of Hopper's own instructions may be chosen on the current device: on one, unless
// LISSOM_CUDA_HOPPER=0. In the emulator, where a test says that the device is one.
bool hopper_forms();

// Whether kernels that can begin before the last one has ended may do so: with LISSOM_CUDA_OVERLAP=1, on
// Hopper and later GPUs.
bool overlaps_launches();

// Why no kernel of this extension can run on the current device, or "".
std::string why_not();

using Stream = uintptr_t;  // cudaStream_t; 0 is the default stream

struct Launch {
  const char* name;  // for errors
  dim3 grid, block;
  Stream stream;
  int shared_bytes = 0;  // dynamic
  int cluster = 0;       // blocks along x that form a thread-block cluster (sm_90); 0: the kernel knows none
  // The kernel waits for the one before it itself (device.cuh, wait_for_previous_grid) and may begin earlier,
  // where overlaps_launches() says so.
  bool overlaps = false;
};

// A matrix of bytes as Hopper's copy engine (TMA) sees it, a CUtensorMap: kernels take it by value, as a
// __grid_constant__ parameter.
struct alignas(128) TensorMap {
  unsigned char opaque[128];
};

// A number of blocks along x as the hardware takes it.
inline unsigned grid_size(const char* name, int64_t blocks) {
  LISSOM_CHECK(blocks <= 0x7fffffff, name, ": ", blocks,
               " blocks are more than a launch can have; split the input");
  return static_cast<unsigned>(blocks);
}

#if defined(LISSOM_CUDA_EMULATOR)

// Tests choose what heuristics see.
void emulate_device(const Device& device);

template <typename... Parameters>
int clusters_at_a_time(const Launch& how, void (*)(Parameters...)) {
  return current_device().multiprocessors / how.cluster;
}

template <typename... Parameters, typename... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  LISSOM_CHECK(how.cluster > 0 || how.shared_bytes <= current_device().shared_bytes, how.name, ": ",
               how.shared_bytes, " bytes of shared memory, but a block has ", current_device().shared_bytes);
  emulator::run_grid(how.name, how.grid, how.block, static_cast<size_t>(how.shared_bytes),
                     static_cast<unsigned>(how.cluster > 0 ? how.cluster : 1),
                     [&] { kernel(static_cast<Parameters>(arguments)...); });
}

#else

inline void check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // an error that can be recovered from is not met again by whoever asks next
  throw std::runtime_error(std::string(name) + ": CUDA error " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// A Launch as the runtime takes it, for `kernel`, which may have as much shared memory from then on.
class Configuration {
 public:
  Configuration(const Launch& how, const void* kernel);
  Configuration(const Configuration&) = delete;
  cudaLaunchConfig_t config = {};

 private:
  cudaLaunchAttribute attributes_[2];
};

template <typename... Parameters, typename... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const Configuration configuration(how, reinterpret_cast<const void*>(kernel));
  check(cudaLaunchKernelEx(&configuration.config, kernel, static_cast<Parameters>(arguments)...), how.name);
}

// Clusters that the current device runs together: parts of it with a number of multiprocessors that clusters
// do not divide keep some idle. For kernels whose blocks stay. Asked once for a kernel and a size of cluster.
int clusters_at_a_time(const Launch& how, const void* kernel);
template <typename... Parameters>
int clusters_at_a_time(const Launch& how, void (*kernel)(Parameters...)) {
  return clusters_at_a_time(how, reinterpret_cast<const void*>(kernel));
}

// [rows, columns] bytes, rows `stride` bytes apart: stride and address are multiples of 16. copy_tile brings
// boxes of box_rows (up to 256) times box_columns (64 or 128) bytes, swizzled by as many; zeros where there
// is no matrix.
TensorMap tensor_map(const char* name, const void* matrix, int64_t rows, int64_t columns, int64_t stride,
                     int box_rows, int box_columns);

#endif

}  // namespace lissom::cuda
