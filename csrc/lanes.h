// 32 bytes of float or double as one value, GCC's and Clang's vector extension: one AVX2 register, two of SSE or NEON.
// Not 64: where there is no AVX-512, GCC keeps such a value in memory, and every operation on it loads and stores it.
#pragma once

#include <cstdint>

#pragma GCC diagnostic ignored "-Wpsabi"  // lanes only pass through inlined functions

namespace doublehead {

template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float type __attribute__((vector_size(32)));
};
template <>
struct LanesOf<double> {
  typedef double type __attribute__((vector_size(32)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;

template <typename T>
constexpr int64_t kLanes = 32 / int64_t(sizeof(T));

}  // namespace doublehead
