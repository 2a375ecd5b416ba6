// The box of a candidate: a proposal moved by its class's deltas and clipped to the image. No torch, no launch.
//
// Every operation is doublehead/ops/boxes.py's, rounded by itself (-fmad=false), and a NaN goes where it goes there.
#pragma once

#include <cmath>
#include <cstdint>

#include "nms/cuda/device.cuh"

namespace doublehead::detections {

using Corners = nms::Corners<float>;

// Tensor[B, 2] of (height, width), of the types that sizes come in.
struct Sizes {
  enum Type : int32_t { kFloat, kDouble, kInt, kLong };
  const void* data;
  int64_t image, side;  // strides
  Type type;

  __device__ __forceinline__ float at(int64_t b, int64_t which) const {
    const int64_t i = b * image + which * side;
    switch (type) {
      case kFloat: return static_cast<const float*>(data)[i];
      case kDouble: return static_cast<float>(static_cast<const double*>(data)[i]);
      case kInt: return static_cast<float>(static_cast<const int32_t*>(data)[i]);
      default: return static_cast<float>(static_cast<const int64_t*>(data)[i]);
    }
  }
};

// Four numbers, loaded at once where they lie together.
template <typename T>
struct Four {
  const T* data;
  int64_t step;   // from one to the next
  bool together;  // in memory, on a boundary of their own size

  __device__ __forceinline__ void load(int64_t offset, float (&to)[4]) const {
    struct alignas(4 * sizeof(T)) Whole {
      T at[4];
    } whole;
    if (together) {
      whole = *reinterpret_cast<const Whole*>(data + offset);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) whole.at[i] = data[offset + i * step];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = static_cast<float>(whole.at[i]);
  }
};

struct BoxOptions {
  float weights[4];  // of (dx, dy, dw, dh)
  float min_size, least_side;
};

// deltas D[B, R, C, 4] and proposals P[B, R, 4], of any strides: those of deltas may be 0, where all classes share a box.
template <typename D, typename P>
struct Boxes {
  Four<D> deltas;
  int64_t delta_image, delta_roi, delta_label;
  Four<P> proposals;
  int64_t proposal_image, proposal_roi;
  Sizes sizes;
  BoxOptions options;
};

struct Interval {
  float low, high;
};

constexpr float kMaxLogRatio = 4.135166556742356f;  // log(1000 / 16), as in boxes.py

__device__ __forceinline__ Interval move_axis(float low, float high, float shift, float log_ratio, float shift_weight,
                                              float ratio_weight) {
  const float size = high - low;
  const float centre = shift / shift_weight * size + (low + 0.5f * size);
  const float bounded = log_ratio / ratio_weight;
  const float half = 0.5f * (std::exp(bounded > kMaxLogRatio ? kMaxLogRatio : bounded) * size);
  return {centre - half, centre + half};
}

__device__ __forceinline__ bool finite(const Interval& x) {
  return std::fabs(x.low) < INFINITY && std::fabs(x.high) < INFINITY;
}

// A side of NaN gives NaN, which is not large enough.
__device__ __forceinline__ Interval clip_axis(const Interval& x, float side, float least_side) {
  const float most = side - least_side;
  const float low = x.low < 0.0f ? 0.0f : x.low, high = x.high < least_side ? least_side : x.high;
  return {low < most ? low : most, high < side ? high : side};
}

// The box of this class of this RoI, and whether it can be a detection: finite as decoded, large enough as clipped.
template <typename D, typename P>
__device__ __forceinline__ bool make_box_of(const Boxes<D, P>& boxes, int64_t image, int64_t roi, int64_t label,
                                            Corners& box) {
  float delta[4], proposal[4];
  boxes.deltas.load(image * boxes.delta_image + roi * boxes.delta_roi + label * boxes.delta_label, delta);
  boxes.proposals.load(image * boxes.proposal_image + roi * boxes.proposal_roi, proposal);
  const float height = boxes.sizes.at(image, 0), width = boxes.sizes.at(image, 1);
  const BoxOptions& how = boxes.options;
  Interval x = move_axis(proposal[0], proposal[2], delta[0], delta[2], how.weights[0], how.weights[2]);
  Interval y = move_axis(proposal[1], proposal[3], delta[1], delta[3], how.weights[1], how.weights[3]);
  const bool is_finite = finite(x) && finite(y);
  x = clip_axis(x, width, how.least_side), y = clip_axis(y, height, how.least_side);
  box = {x.low, y.low, x.high, y.high};
  return is_finite && x.high - x.low >= how.min_size && y.high - y.low >= how.min_size;
}

}  // namespace doublehead::detections
