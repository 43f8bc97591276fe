// Distillation losses in plain C++. Runs anywhere.
#include <cstdint>

#include "distill_loss.h"

namespace lissom {
namespace scalar {
namespace {

#include "simd_scalar.h"
// clang-format off
#include "unroll.h"
using Wide = F16;
#include "distill_loss_kernel.h"
// clang-format on

}  // namespace
}  // namespace scalar

const DistillKernel& distill_loss_scalar() { return scalar::kKernel; }

}  // namespace lissom
