// 64 bytes of float or double as one value, GCC's and Clang's vector extension: one AVX-512, two AVX2 or four SSE or
// NEON registers.
#pragma once

#include <cstdint>

#pragma GCC diagnostic ignored "-Wpsabi"  // lanes only pass through inlined functions

namespace doublehead {

template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct LanesOf<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;

template <typename T>
constexpr int64_t kLanes = 64 / int64_t(sizeof(T));

}  // namespace doublehead
