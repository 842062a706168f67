// Errors that reach the user: one line that names the argument and its first bad entry.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace megatron_dwm {

// Becomes a ValueError in Python.
[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

// "name[index]" for error messages.
inline std::string entry(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

// Short for numbers of any size, where std::to_string writes all digits and no exponent.
inline std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", value);
  return text;
}

inline int64_t checked_add(int64_t a, int64_t b, const char* what) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) {
    fail(std::string(what) + ": " + std::to_string(a) + " + " + std::to_string(b) +
         " does not fit in a signed 64-bit integer");
  }
  return sum;
}

inline int64_t checked_multiply(int64_t a, int64_t b, const char* what) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) {
    fail(std::string(what) + ": " + std::to_string(a) + " * " + std::to_string(b) +
         " does not fit in a signed 64-bit integer");
  }
  return product;
}

inline void check_length(int32_t length, int64_t sequence) {
  if (length < 0) {
    fail(entry("sequence_lengths", sequence) + ": " + std::to_string(length) + " is negative");
  }
}

}  // namespace megatron_dwm
