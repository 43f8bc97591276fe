#include "isa.h"

#include <atomic>

#include "../common/check.h"
#include "../common/cpu_features.h"

namespace lissom {
namespace {

struct Entry {
  Isa isa;
  const char* name;
  bool built;
  uint32_t required;
};

#if defined(LISSOM_X86)
constexpr bool kX86 = true;
#else
constexpr bool kX86 = false;
#endif
#if defined(LISSOM_SIMDE)
constexpr uint32_t kAvx512Required = 0;  // emulated: runs anywhere
#else
constexpr uint32_t kAvx512Required = kAvx512VnniBundle;
#endif

constexpr Entry kEntries[kIsaCount] = {
    {Isa::kAvx512Vnni, "avx512vnni", kX86, kAvx512Required},
    {Isa::kAvx2, "avx2", kX86, kAvx2Bundle},
    {Isa::kScalar, "scalar", true, 0},
};

bool runs(const Entry& entry) { return entry.built && (cpu_features() & entry.required) == entry.required; }

Isa best() {
  for (const Entry& entry : kEntries) {
    if (runs(entry)) return entry.isa;
  }
  return Isa::kScalar;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

std::vector<std::pair<std::string, bool>> isas() {
  std::vector<std::pair<std::string, bool>> result;
  for (const Entry& entry : kEntries) result.emplace_back(entry.name, runs(entry));
  return result;
}

Isa active_isa() { return chosen().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  for (const Entry& entry : kEntries) {
    if (entry.isa == isa) return entry.name;
  }
  return "unknown";
}

void select_isa(const std::string& name) {
  if (name.empty()) {
    chosen() = best();
    return;
  }
  std::string usable;
  for (const Entry& entry : kEntries) {
    if (runs(entry)) usable += (usable.empty() ? "" : ", ") + std::string(entry.name);
  }
  for (const Entry& entry : kEntries) {
    if (name != entry.name) continue;
    LISSOM_CHECK(runs(entry), "instruction set '", name,
                 "' is not available on this CPU; use one of: ", usable);
    chosen() = entry.isa;
    return;
  }
  LISSOM_CHECK(false, "instruction set '", name, "' is unknown; use one of: ", usable);
}

}  // namespace lissom
