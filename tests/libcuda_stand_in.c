// In place of NVIDIA's driver, for tests of what comes before it: tests/triton_launch.py, which adds empty
// functions for all else that Triton links to. Launches are noted, and nothing runs.
#include <stdint.h>
#include <string.h>

enum { kMost = 64 };

// Of the last launch: the grid, and the first 8 bytes of as many parameters as were said to be there.
unsigned stand_in_grid[3];
uint64_t stand_in_parameters[kMost];
int stand_in_count, stand_in_launches;

typedef struct {  // CUlaunchConfig
  unsigned grid[3], block[3], shared_bytes;
  void *stream, *attributes;
  unsigned attribute_count;
} LaunchConfig;

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  (void)function, (void)extra;
  ++stand_in_launches;
  memcpy(stand_in_grid, config->grid, sizeof stand_in_grid);
  for (int i = 0; i < stand_in_count && i < kMost; ++i) memcpy(&stand_in_parameters[i], parameters[i], 8);
  return 0;
}

int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  (void)attribute;
  memcpy(data, &pointer, 8);  // memory of a GPU is where it seems to be
  return 0;
}

// A tensor map begins with the address.
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, uint64_t address, ...) {
  (void)type, (void)rank;
  memset(map, 0, 128);
  memcpy(map, &address, 8);
  return 0;
}
