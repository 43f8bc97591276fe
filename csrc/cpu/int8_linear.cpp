// int8 linear: check -> choose the ISA's kernel -> run it (linear.cpp). And the packing of weights.
#include "int8_linear.h"

#include <cstring>

#include "../common/check.h"
#include "isa.h"

namespace lissom {
namespace {

using KernelTable = const LinearKernel* (*)();

#if defined(LISSOM_X86)
constexpr KernelTable kTable[kIsaCount] = {int8_linear_scalar, int8_linear_avx2, int8_linear_avx512vnni};
#else
constexpr KernelTable kTable[kIsaCount] = {int8_linear_scalar, nullptr, nullptr};
#endif

}  // namespace

void int8_linear(const Int8LinearArgs& args, int threads) {
  check_linear("int8_linear", args, threads);
  LISSOM_CHECK(args.mode == InputMode::kWeightOnly || args.k <= INT32_MAX / (127 * 127),
               "int8_linear: K=", args.k, " could overflow the int32 sum");
  run_linear(kTable[static_cast<int>(active_isa())]()[args.mode == InputMode::kWeightOnly], args, threads);
}

void int8_pack(const int8_t* qweight, int64_t n, int64_t k, int8_t* packed) {
  LISSOM_CHECK(n >= 0 && k >= 0, "int8_pack: negative size: N=", n, " K=", k);
  const int64_t panel_bytes = int8_panel_bytes(k);
  for (int64_t panel = 0; panel < panel_count(n); ++panel) {
    int8_t* head = packed + panel * panel_bytes;
    std::memset(head, 0, static_cast<size_t>(panel_bytes));
    for (int i = 0; i < kPanel && panel * kPanel + i < n; ++i) {
      const int8_t* row = qweight + (panel * kPanel + i) * k;
      int8_t* to = head + kLine + i * kQuad;
      uint32_t sum = 0;  // wraps as int32 does
      for (int64_t j = 0; j < k; ++j) {
        to[j / kQuad * kLine + j % kQuad] = row[j];
        sum += static_cast<uint32_t>(static_cast<int32_t>(row[j]));
      }
      const uint32_t offset = sum * static_cast<uint32_t>(-kInt8ActivationOffset);
      std::memcpy(head + i * 4, &offset, 4);
    }
  }
}

}  // namespace lissom
