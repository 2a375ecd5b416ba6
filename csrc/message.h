// Messages of errors, built without iostreams: a compiler that links libstdc++ statically into the module brings a second
// set of locales into the process, and printing a number through the wrong one crashes. Nothing of torch is included.
#pragma once

#include <array>
#include <concepts>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>

namespace doublehead {

inline void append(std::string& text, std::string_view part) { text += part; }
inline void append(std::string& text, char part) { text += part; }

template <std::integral Number>
void append(std::string& text, Number number) {
  text += std::to_string(number);
}

// As a stream prints it: 0.5, 1e-05, nan.
template <std::floating_point Number>
void append(std::string& text, Number number) {
  std::array<char, 32> digits;
  std::snprintf(digits.data(), digits.size(), "%g", static_cast<double>(number));
  text += digits.data();
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string message;
  (append(message, parts), ...);
  throw std::runtime_error(message);
}

}  // namespace doublehead
