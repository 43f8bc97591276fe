// Distillation losses with AVX-512.
#include <cstdint>

#include "distill_loss.h"
#include "intrinsics_avx512.h"

namespace lissom {
namespace avx512vnni {
namespace {

#include "simd_avx512.h"
// clang-format off
#include "unroll.h"
#include "pair.h"
using Wide = Pair;
#include "distill_loss_kernel.h"
// clang-format on

}  // namespace
}  // namespace avx512vnni

const DistillKernel& distill_loss_avx512vnni() { return avx512vnni::kKernel; }

}  // namespace lissom
