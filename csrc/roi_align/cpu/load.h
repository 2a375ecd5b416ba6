// Features of any type as lanes: loading widens, storing rounds.
#pragma once

#include "common.h"
#include "lanes.h"

#include <cstring>

namespace doublehead::roi_align {

typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Mask __attribute__((vector_size(32)));

template <typename To, typename From>
DOUBLEHEAD_INLINE To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
DOUBLEHEAD_INLINE Lanes<compute_t<T>> load(const T* from) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    Lanes<T> lanes;
    std::memcpy(&lanes, from, sizeof(lanes));
    return lanes;
  } else {
    Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    const Words words = __builtin_convertvector(halves, Words);
    if constexpr (std::is_same_v<T, BFloat16>) {
      return reinterpret<Lanes<float>>(words << 16);
    } else {
      // Exponent and mantissa move to their place in a float, and 2^112 makes up for the difference in bias.
      const Lanes<float> magnitude = reinterpret<Lanes<float>>((words & 0x7fffu) << 13) * 0x1p112f;
      const Words special = reinterpret<Words>((words & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinity and NaN
      return reinterpret<Lanes<float>>(reinterpret<Words>(magnitude) | special | ((words & 0x8000u) << 16));
    }
  }
}

template <typename T>
DOUBLEHEAD_INLINE void store(T* to, const Lanes<compute_t<T>>& lanes) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    std::memcpy(to, &lanes, sizeof(lanes));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Words words = reinterpret<Words>(lanes);
    const Words rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const Words nan = reinterpret<Words>(lanes != lanes);
    const Halves halves = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Halves);
    std::memcpy(to, &halves, sizeof(halves));
  } else {
    for (int64_t i = 0; i < kLanes<float>; ++i) to[i] = T(lanes[i]);
  }
}

template <typename T>
DOUBLEHEAD_INLINE compute_t<T> widen(T value) {
  return static_cast<compute_t<T>>(value);
}

}  // namespace doublehead::roi_align
