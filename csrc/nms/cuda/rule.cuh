// nms.h's rule for CUDA: 16 instructions a pair without a branch, and a division only at the threshold. Shared
// by all kernels that suppress boxes; needs neither torch nor CUDA's runtime.
//
//   const Rule<float> rule = make_rule<float>(iou_threshold);       // on the host; an argument of the kernel
//   const Box<float> box = measure(x1, y1, x2, y2);                 // on the device; not nms.h's make_box
//   rule(a, b)                                                      // whether one measured box suppresses the other
//   suppressed_by(rule, box, [&](int j) { return boxes[j]; })       // bit j: the same for box and boxes[j], j < 32
//
// Exact. A box without area (nms.h's has_area) has an infinite one here: it suppresses nothing, unless the threshold is
// negative, when every pair is divided. Let c be what two boxes have in common and u their union, both as computed; c is at
// most either area, as rounding keeps order, so u is positive, infinite or NaN. With t the threshold rounded down and t' the
// next number of type T:
//   c > t' u  makes c / u at least t' after rounding too, as t' is a number of type T: it suppresses;
//   c < t u   makes it at most t likewise: it does not.
// Signs of c - t u in one rounding are those of the real number. An infinite u does not suppress; a NaN satisfies neither.
#pragma once

#include "../nms.h"

namespace doublehead::nms {

template <typename T>
DOUBLEHEAD_NMS_FUNCTION Box<T> measure(T x1, T y1, T x2, T y2) {
  Box<T> box = make_box(x1, y1, x2, y2);
  if (!has_area(box)) box.area = kInfinity<T>;
  return box;
}

// `above` is negative if a pair clearly suppresses each other, `below` if it clearly does not.
template <typename T>
struct Margins {
  T above, below;
};

template <typename T>
struct Rule {
  T threshold;        // nms.h's round_down
  T clearly, hardly;  // the next number above it, and itself; NaN if every pair is to be divided

  DOUBLEHEAD_NMS_FUNCTION Margins<T> margins(const Box<T>& a, const Box<T>& b) const {
    const T common = intersection(a, b), all = a.area + b.area - common;
#if defined(__CUDA_ARCH__)
    return {fma(clearly, all, -common), fma(-hardly, all, common)};
#else
    return {std::fma(clearly, all, -common), std::fma(-hardly, all, common)};
#endif
  }

  DOUBLEHEAD_NMS_FUNCTION bool exactly(const Box<T>& a, const Box<T>& b) const {
    return iou(make_box(a.x1, a.y1, a.x2, a.y2), make_box(b.x1, b.y1, b.x2, b.y2)) > threshold;
  }

  DOUBLEHEAD_NMS_FUNCTION bool operator()(const Box<T>& a, const Box<T>& b) const {
    const auto [above, below] = margins(a, b);
    return above < 0 || (!(below < 0) && exactly(a, b));
  }
};

template <typename T>
Rule<T> make_rule(double threshold) {
  const T rounded = round_down<T>(threshold), never = std::numeric_limits<T>::quiet_NaN();
  if (!(threshold >= 0)) return {rounded, never, never};
  return {rounded, std::nextafter(rounded, kInfinity<T>), rounded};
}

// Twice `bits`, and one more if x is negative, which a NaN is not.
template <typename T>
DOUBLEHEAD_NMS_FUNCTION uint32_t push_sign(uint32_t bits, T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) return __funnelshift_l(__float_as_uint(x), bits, 1);  // a device's NaN is 0x7fffffff
#endif
  return bits << 1 | uint32_t(x < 0);
}

// Bit j, j < kCount <= 32: whether `box` and at(j) suppress each other. What needs a division is done in the end.
template <int kCount = 32, typename T, typename At>
DOUBLEHEAD_NMS_FUNCTION uint32_t suppressed_by(const Rule<T>& rule, const Box<T>& box, const At& at) {
  uint32_t yes = 0, no = 0;
  [[maybe_unused]] constexpr int kUnroll = sizeof(T) == 4 ? kCount : 4;  // more doubles do not fit in registers
#if defined(__CUDACC__)
#pragma unroll kUnroll
#endif
  for (int j = kCount - 1; j >= 0; --j) {
    const auto [above, below] = rule.margins(box, at(j));
    yes = push_sign(yes, above);
    no = push_sign(no, below);
  }
  uint32_t unsure = ~(yes | no);
  if (kCount < 32) unsure &= (1u << (kCount % 32)) - 1;
  for (int j = 0; unsure; ++j, unsure >>= 1) {
    if ((unsure & 1) && rule.exactly(box, at(j))) yes |= 1u << j;
  }
  return yes;
}

}  // namespace doublehead::nms
