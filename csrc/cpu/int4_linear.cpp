// int4 linear: check -> choose the kernel -> run it (linear.cpp).
#include "int4_linear.h"

#include "../common/check.h"
#include "isa.h"

namespace lissom {
namespace {

using KernelTable = const LinearKernel* (*)();

#if defined(LISSOM_X86)
constexpr KernelTable kTable[kIsaCount] = {int4_linear_scalar, int4_linear_avx2, int4_linear_avx512vnni};
#else
constexpr KernelTable kTable[kIsaCount] = {int4_linear_scalar, nullptr, nullptr};
#endif

}  // namespace

void int4_linear(const Int4LinearArgs& args, int threads) {
  const Int4Layout& layout = args.layout;
  check_linear("int4_linear", args, threads);
  LISSOM_CHECK(layout.segment == 32 || layout.segment == 64 || layout.segment == kInt4Segment,
               "int4_linear: segment of ", layout.segment, " must be 32, 64 or 128");
  LISSOM_CHECK(layout.k == args.k, "int4_linear: weights packed for K=", layout.k, " but x has K=", args.k);
  LISSOM_CHECK(!(layout.has_zero && layout.scope != TableScope::kNone),
               "int4_linear: zero-points and a codebook exclude each other");
  const int form = args.weight_only ? 2 : layout.scope != TableScope::kNone;
  run_linear(kTable[static_cast<int>(active_isa())]()[form], args, threads);
}

}  // namespace lissom
