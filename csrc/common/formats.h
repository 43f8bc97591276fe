// Packed layouts and the codes that cross the Python boundary. Shared by CPU and CUDA; the drawing of the
// int8 layout is in python/lissom/formats.py, its only other owner, and a test compares the two byte for
// byte.
#pragma once

#include <cstdint>

namespace lissom {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };
enum class InputMode : int { kDynamic = 0, kStatic = 1, kWeightOnly = 2 };

// Storage types of the two 16-bit formats: only bits, so that no compiler support is needed.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// One panel holds kInt8Panel outputs: a line of 16 int32 offsets, then ceil(K / 4) lines
//
//   | n0: k0 k1 k2 k3 | n1: k0 k1 k2 k3 | ... | n15: k0 k1 k2 k3 |   64 bytes
//
constexpr int kInt8Panel = 16;
constexpr int kInt8Quad = 4;
constexpr int kInt8Line = kInt8Panel * kInt8Quad;
// Activations may be stored as unsigned q + 128; the first line of a panel takes that offset out again.
constexpr int kInt8ActivationOffset = 128;

static_assert(kInt8Line == 64, "one line is one cache line and one 512-bit register");
static_assert(kInt8Panel * sizeof(int32_t) == kInt8Line, "the offsets fill exactly one line");
static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2, "16-bit storage");

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t int8_panels(int64_t n) { return ceil_div(n, kInt8Panel); }
constexpr int64_t int8_quads(int64_t k) { return ceil_div(k, kInt8Quad); }
constexpr int64_t int8_panel_bytes(int64_t k) { return (1 + int8_quads(k)) * kInt8Line; }

}  // namespace lissom
