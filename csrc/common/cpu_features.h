// What the CPU *and* the operating system support. Compiled with baseline flags and without LTO.
#pragma once

#include <cstdint>

namespace lissom {

enum CpuFeature : uint32_t {
  kAvx2Bundle = 1u << 0,        // AVX2, FMA, F16C, and the OS saves ymm registers
  kAvx512VnniBundle = 1u << 1,  // AVX-512 F, BW, DQ, VL and VNNI, and the OS saves zmm and mask registers
};

// Bit set of CpuFeature, detected once.
uint32_t cpu_features();

}  // namespace lissom
