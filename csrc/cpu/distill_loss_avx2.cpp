// Distillation losses with AVX2 and FMA.
#include <immintrin.h>

#include <cstdint>

#include "distill_loss.h"

namespace lissom {
namespace avx2 {
namespace {

#include "simd_avx2.h"
// clang-format off
#include "unroll.h"
using Wide = F16;
#include "distill_loss_kernel.h"
// clang-format on

}  // namespace
}  // namespace avx2

const DistillKernel& distill_loss_avx2() { return avx2::kKernel; }

}  // namespace lissom
