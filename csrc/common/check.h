// Checks at the boundary. A failed one throws std::invalid_argument, which pybind11 turns into ValueError.
#pragma once

#include <stdexcept>
#include <string>

namespace lissom {

// No stream: where a toolchain links libstdc++ into the extension, its locales would meet those of the
// libstdc++ that torch has loaded.
inline std::string text_of(const char* part) { return part; }
inline std::string text_of(const std::string& part) { return part; }
template <typename Number>
std::string text_of(Number part) {
  return std::to_string(part);
}

template <typename... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::string text;
  ((text += text_of(parts)), ...);
  throw std::invalid_argument(text + " [" + file + ':' + std::to_string(line) + ']');
}

}  // namespace lissom

#define LISSOM_CHECK(condition, ...)                                   \
  do {                                                                 \
    if (!(condition)) ::lissom::fail(__FILE__, __LINE__, __VA_ARGS__); \
  } while (false)
