// Checks at the boundary. A failed one throws std::invalid_argument, which pybind11 turns into ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace lissom {

template <typename... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  text << " [" << file << ':' << line << ']';
  throw std::invalid_argument(text.str());
}

}  // namespace lissom

#define LISSOM_CHECK(condition, ...)                                   \
  do {                                                                 \
    if (!(condition)) ::lissom::fail(__FILE__, __LINE__, __VA_ARGS__); \
  } while (false)
