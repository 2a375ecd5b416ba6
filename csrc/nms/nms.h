// What decides non-maximum suppression, shared by the CPU and the CUDA kernel.
//
// The rule: box a suppresses box b if IoU(a, b) > threshold, the IoU computed in T (float, or double for double boxes)
// in exactly the operations below, each rounded by itself, and then compared with the threshold in double, that is,
// without rounding the threshold to float. A NaN exceeds nothing. doublehead/ops/nms/reference.py is the definition.
// The compiler must not contract these into fused multiply-adds (-ffp-contract=off, nvcc -fmad=false).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define DOUBLEHEAD_NMS_FUNCTION __host__ __device__ __forceinline__
#else
#define DOUBLEHEAD_NMS_FUNCTION DOUBLEHEAD_INLINE
#endif

namespace doublehead::nms {

// T is a number, or a vector of numbers in GCC's and Clang's extension.
template <typename T>
struct Box {
  T x1, y1, x2, y2, area;
};

template <typename T>
DOUBLEHEAD_NMS_FUNCTION Box<T> make_box(T x1, T y1, T x2, T y2) {
  return {x1, y1, x2, y2, (x2 - x1) * (y2 - y1)};
}

// A GPU has an instruction for these, which differs in what it does with a NaN: see iou.
template <typename T>
DOUBLEHEAD_NMS_FUNCTION T larger(const T& a, const T& b) {
#if defined(__CUDA_ARCH__)
  return max(a, b);
#else
  return a > b ? a : b;
#endif
}

template <typename T>
DOUBLEHEAD_NMS_FUNCTION T smaller(const T& a, const T& b) {
#if defined(__CUDA_ARCH__)
  return min(a, b);
#else
  return a < b ? a : b;
#endif
}

template <typename T>
DOUBLEHEAD_NMS_FUNCTION T intersection(const Box<T>& a, const Box<T>& b) {
  const T width = smaller(a.x2, b.x2) - larger(a.x1, b.x1);
  const T height = smaller(a.y2, b.y2) - larger(a.y1, b.y1);
  return larger(width, T{}) * larger(height, T{});
}

// A box with a NaN coordinate has a NaN area, so that its IoU is NaN whatever the comparisons above made of it.
template <typename T>
DOUBLEHEAD_NMS_FUNCTION T iou(const Box<T>& a, const Box<T>& b) {
  const T common = intersection(a, b);
  return common / (a.area + b.area - common);
}

// Constants, as device code may not call functions that are for the host.
template <typename T>
constexpr T kLargest = std::numeric_limits<T>::max();
template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Unless the threshold is negative, a box without this neither suppresses nor is suppressed: its IoU is 0 or NaN.
template <typename T>
DOUBLEHEAD_NMS_FUNCTION bool has_area(const Box<T>& box) {
  return box.area > T(0) && box.area <= kLargest<T>;
}

// The largest T that is not above `threshold`: x > round_down(threshold) is x > threshold for every x of type T.
template <typename T>
inline T round_down(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return rounded > threshold ? std::nextafter(rounded, -kInfinity<T>) : rounded;
}

// Ascending keys are descending scores: NaN first, then from +inf to -inf, and -0 beside +0.
DOUBLEHEAD_NMS_FUNCTION uint32_t sort_key(float score) {
  if (score != score) return 0;
  if (score == 0.0f) score = 0.0f;
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

DOUBLEHEAD_NMS_FUNCTION uint64_t sort_key(double score) {
  if (score != score) return 0;
  if (score == 0.0) score = 0.0;
  uint64_t bits;
  memcpy(&bits, &score, sizeof bits);
  return bits >> 63 ? bits : ~bits & 0x7fffffffffffffffu;
}

}  // namespace doublehead::nms
