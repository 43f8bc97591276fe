// Which instruction set the kernels use. One choice for all ops, made once; every op has one table that maps
// the choice to its kernels.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace lissom {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512Vnni = 2 };
constexpr int kIsaCount = 3;

// Best first: name, and whether it was built and this CPU and system run it.
std::vector<std::pair<std::string, bool>> isas();

Isa active_isa();
const char* isa_name(Isa isa);

// Chooses by name; "" is the best that runs here. Throws std::invalid_argument where the name is unknown or
// the CPU lacks it. Not to be called while a kernel runs.
void select_isa(const std::string& name);

}  // namespace lissom
