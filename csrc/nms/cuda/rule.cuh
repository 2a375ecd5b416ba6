// nms.h's rule for CUDA: about 20 instructions a pair without a branch, and a division only next to the threshold. Shared
// by all kernels that suppress boxes; needs neither torch nor CUDA's runtime.
//
//   const Rule<float> rule = make_rule<float>(iou_threshold);       // on the host; an argument of the kernel
//   const Box<float> box = measure(x1, y1, x2, y2);                 // on the device; not nms.h's make_box
//   rule(a, b)                                                      // whether one measured box suppresses the other
//   suppressed_by(rule, box, [&](int j) { return boxes[j]; })       // bit j: the same for box and boxes[j], j < 32
//
// Exact. A box without area (nms.h's has_area) has an infinite one here: it suppresses nothing, unless the threshold is
// negative, when every pair is divided. Let c be what two boxes have in common and u their union, as computed. c is at
// most either area, as rounding keeps order, so u is positive, at least c, infinite or NaN. Then, for t in [1e-3, 1],
//   c > 1.000004 t u + 1e-30  makes c / u, rounded, exceed t: u is above 1e-30, since c is at most u;
//   c < 0.999996 t u - 1e-30  does not: u is above 1e-30 here too,
// and for such u the bounds are precise to 3e-7. An infinite u does not suppress, and a NaN satisfies neither.
#pragma once

#include "../nms.h"

namespace doublehead::nms {

template <typename T>
DOUBLEHEAD_NMS_FUNCTION Box<T> measure(T x1, T y1, T x2, T y2) {
  Box<T> box = make_box(x1, y1, x2, y2);
  if (!has_area(box)) box.area = std::numeric_limits<T>::infinity();
  return box;
}

// A pair's distances to the threshold: `above` is negative if it clearly suppresses, `below` if it clearly does not.
template <typename T>
struct Margins {
  T above, below;
};

template <typename T>
struct Rule {
  T threshold;        // nms.h's round_down
  T clearly, hardly;  // the threshold and a little more or less; 0 if all pairs are divided
  T slack;            // 1e-30, or infinite then

  DOUBLEHEAD_NMS_FUNCTION Margins<T> margins(const Box<T>& a, const Box<T>& b) const {
    const T common = intersection(a, b), all = a.area + b.area - common;
#if defined(__CUDA_ARCH__)  // products and sums in one rounding: the bounds need not be exact
    return {fma(clearly, all, slack) - common, common - fma(hardly, all, -slack)};
#else
    return {std::fma(clearly, all, slack) - common, common - std::fma(hardly, all, -slack)};
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
  constexpr T infinity = std::numeric_limits<T>::infinity();
  if (!(threshold >= 1e-3 && threshold <= 1)) return {round_down<T>(threshold), 0, 0, infinity};
  const T clearly = static_cast<T>(threshold * (1 + 4e-6)), hardly = static_cast<T>(threshold * (1 - 4e-6));
  return {round_down<T>(threshold), clearly, hardly, T(1e-30)};
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
#if defined(__CUDACC__)
#pragma unroll
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
