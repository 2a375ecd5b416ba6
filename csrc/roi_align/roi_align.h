// RoIAlign's geometry, the only copy: pyramid level, expansion, samples and bilinear weights of a box, for CPU and CUDA.
//
// Average RoIAlign is separable: out = Ay X Ax^T, with one small weight matrix per axis of a box. Everything here deals
// with one axis. `W` is the type to compute in: double for double features, else float.
//
// The order of the operations is torchvision's, and none may be contracted into a fused multiply-add: which pixels a
// sample reads, and whether it counts at all, depends on the last bit.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DOUBLEHEAD_GEOMETRY __host__ __device__ inline
#else
#define DOUBLEHEAD_GEOMETRY inline
#endif

namespace doublehead::roi_align {

// One axis of a box on its level: `bins` bins of length `bin` from `start` on, `samples` samples in each.
template <typename W>
struct Axis {
  W start;
  W bin;
  int32_t samples;  // 0: the box pools nothing (it is not finite, or empty under adaptive sampling)
};

// More samples than this in a bin (a box some 10^9 pixels long) count as none: the map's share in such a mean is nil.
constexpr int32_t kMostSamples = 1 << 30;

template <typename W>
DOUBLEHEAD_GEOMETRY Axis<W> make_axis(W low, W high, W scale, int64_t bins, int64_t sampling_ratio, bool aligned) {
  const W offset = aligned ? W(0.5) : W(0);
  const W start = low * scale - offset, end = high * scale - offset;
  W length = end - start;
  if (!std::isfinite(start) || !std::isfinite(end) || !std::isfinite(length)) return {W(0), W(0), 0};
  if (!aligned && length < W(1)) length = W(1);
  const W bin = length / W(bins);
  if (sampling_ratio > 0) return {start, bin, int32_t(sampling_ratio)};
  const W samples = std::ceil(bin);
  return {start, bin, samples > W(0) && samples <= W(kMostSamples) ? int32_t(samples) : 0};
}

template <typename W>
DOUBLEHEAD_GEOMETRY W sample_position(const Axis<W>& axis, int32_t bin, int32_t sample) {
  return axis.start + W(bin) * axis.bin + W(W(sample) + W(0.5)) * axis.bin / W(axis.samples);
}

// The first sample of a bin that is not before `from`, as long as bins have a positive length: adaptive sampling of a
// huge box has mostly samples before the map, where a sample counts from -1 on.
template <typename W>
DOUBLEHEAD_GEOMETRY int32_t first_sample(const Axis<W>& axis, int32_t bin, W from = W(-1)) {
  if (axis.samples == 0 || axis.bin <= W(0) || sample_position(axis, bin, 0) >= from) return 0;
  int32_t before = 0, after = axis.samples;  // positions never decrease: bisect
  while (after - before > 1) {
    const int32_t middle = before + (after - before) / 2;
    (sample_position(axis, bin, middle) < from ? before : after) = middle;
  }
  return after;
}

// The two pixels a sample lies between, and their weights.
template <typename W>
struct Bilinear {
  int32_t low, high;
  W low_weight, high_weight;
};

// Further than one pixel outside, a sample counts 0; nearer, it takes the border's value.
template <typename W>
DOUBLEHEAD_GEOMETRY bool sample_counts(W position, int64_t extent) {
  return position >= W(-1) && position <= W(extent) && extent > 0;
}

template <typename W>
DOUBLEHEAD_GEOMETRY Bilinear<W> bilinear(W position, int64_t extent) {
  if (position <= W(0)) position = W(0);
  const int32_t low = int32_t(position);
  if (low >= extent - 1) return {int32_t(extent - 1), int32_t(extent - 1), W(1), W(0)};
  const W high_weight = position - W(low);
  return {low, low + 1, W(1) - high_weight, high_weight};
}

// Scales [low, high] about its centre; a factor of 1 leaves it untouched to the last bit.
template <typename W>
DOUBLEHEAD_GEOMETRY void expand(W& low, W& high, W factor) {
  if (factor == W(1)) return;
  const W centre = (low + high) * W(0.5);
  const W half = (high - low) * W(0.5) * factor;
  low = centre - half;
  high = centre + half;
}

// What is sampled of a box along one axis: it is expanded, and ends `end_offset` earlier.
template <typename W>
DOUBLEHEAD_GEOMETRY void sampled(W& low, W& high, W factor, W end_offset) {
  expand(low, high, factor);
  high -= end_offset;
}

// What the epsilon of a level rule is added to: the level before it is rounded down, the ratio of the box's size to the
// canonical size, or its ratio to the size that belongs on the finest level. As in Python, ops/roi_align/pooling.py.
enum AddedTo : int64_t { kLevel = 0, kCanonicalRatio = 1, kFinestRatio = 2 };

// How a box's level follows from its size.
template <typename W>
struct LevelRule {
  W canonical_size;
  W epsilon;
  int64_t canonical_level;
  int64_t lowest;    // the number of the finest level
  int64_t added_to;  // AddedTo
};

// The pyramid level of a box, 0 being the finest; -1 for a box with NaN or a negative area: it pools zeros. With a single
// level there is nothing to choose.
template <typename W>
DOUBLEHEAD_GEOMETRY int64_t box_level(const W* box, int64_t levels, const LevelRule<W>& rule) {
  if (levels == 1) return 0;
  const W size = std::sqrt((box[2] - box[0]) * (box[3] - box[1]));
  if (std::isnan(size)) return -1;
  W level;
  if (rule.added_to == kFinestRatio) {
    const W finest_size = std::ldexp(rule.canonical_size, int(rule.lowest - rule.canonical_level));
    level = std::floor(std::log2(size / finest_size + rule.epsilon));
  } else if (rule.added_to == kCanonicalRatio) {
    const W ratio = size / rule.canonical_size + rule.epsilon;
    level = std::floor(W(rule.canonical_level) + std::log2(ratio)) - W(rule.lowest);
  } else {
    const W ratio = size / rule.canonical_size;
    level = std::floor(W(rule.canonical_level) + std::log2(ratio) + rule.epsilon) - W(rule.lowest);
  }
  return level <= W(0) ? 0 : level >= W(levels - 1) ? levels - 1 : int64_t(level);
}

}  // namespace doublehead::roi_align
