// What the CUDA kernels of RoIAlign share: their arguments, where a box lies, vectors of channels. No torch, no launch.
//
// `T` is the features' type, `W` the type to compute in: double for double features, else float. The compiler must not
// contract (-fmad=false, see roi_align.h); sums, on which no index depends, are written with std::fma.
#pragma once

#include "../roi_align.h"

namespace doublehead::roi_align::device {

constexpr int kMaxLevels = 16, kMaxScales = 8;  // of the tables below, which kernels get by value

// One level: T[images, channels, height, width] with any strides, in elements. Features in the forward, their gradient
// in the backward.
struct Map {
  void* data;
  int64_t image_stride, channel_stride, row_stride, pixel_stride;
  int32_t height, width;
  double scale;
};

// The operator's arguments, as kernels get them.
template <typename W>
struct Problem {
  Map maps[kMaxLevels];
  void* pooled[kMaxScales];  // T[rois, channels, bins, bins] for each box scale: the outputs, or their gradients
  W box_scales[kMaxScales];
  const W* rois;  // W[rois, 5]
  int64_t count, sampling_ratio, channels, images;
  int32_t levels, scales, height, width;  // height and width of an output, in bins
  bool aligned;
  W end_offset;
  LevelRule<W> level_rule;
};

// The map that a box is assigned to; level -1: none, it pools zeros.
struct Assignment {
  int32_t level, image;
};

template <typename W>
__device__ inline Assignment assign_map(const Problem<W>& problem, int64_t roi) {
  const W* box = problem.rois + roi * 5;
  if (!(box[0] > W(-1) && box[0] < W(problem.images))) return {-1, 0};
  return {int32_t(box_level(box + 1, problem.levels, problem.level_rule)), int32_t(box[0])};
}

template <typename W>
struct Axes {
  Axis<W> rows, columns;
};

// The axes of a box expanded by box scale number `scale`, on its level; without samples if it has none.
template <typename W>
__device__ inline Axes<W> find_axes(const Problem<W>& problem, int64_t roi, int32_t scale, int32_t level) {
  if (level < 0) return {{W(0), W(0), 0}, {W(0), W(0), 0}};
  const W* box = problem.rois + roi * 5 + 1;
  W x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
  sampled(x1, x2, problem.box_scales[scale], problem.end_offset);
  sampled(y1, y2, problem.box_scales[scale], problem.end_offset);
  const W spatial = W(problem.maps[level].scale);
  return {make_axis(y1, y2, spatial, problem.height, problem.sampling_ratio, problem.aligned),
          make_axis(x1, x2, spatial, problem.width, problem.sampling_ratio, problem.aligned)};
}

// No sample of bins [first, end) lies before `low` or after `high`. Each operation is one of sample_position and rounds
// alike, except that a sample's offset in its bin may be rounded up: hence a little more than a bin is added.
template <typename W>
struct Span {
  W low, high;
};

template <typename W>
__device__ inline Span<W> span_of(const Axis<W>& axis, int32_t first, int32_t end) {
  const W length = axis.bin * W(1.001);
  const W a = axis.start + W(first) * axis.bin, b = axis.start + W(end - 1) * axis.bin;
  return axis.bin < W(0) ? Span<W>{b + length, a} : Span<W>{a, b + length};
}

// Pixels [first, last), and no others, may be read along an axis.
struct Window {
  int32_t first, last;
};

template <typename W>
__device__ inline Window window_of(const Axis<W>& axis, int32_t bins, int32_t extent) {
  const Span<W> span = span_of(axis, 0, bins);
  if (axis.samples == 0 || extent == 0 || !(span.high >= W(-1)) || !(span.low <= W(extent))) return {0, 0};
  const int32_t first = span.low > W(0) ? int32_t(span.low) : 0;
  const int32_t last = span.high < W(extent - 1) ? (span.high > W(0) ? int32_t(span.high) : 0) + 2 : extent;
  return {first < extent - 1 ? first : extent - 1, last};
}

// V neighbouring channels, loaded and stored at once.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

// sum += weight * the V channels at `from`
template <int V, typename T, typename W>
__device__ __forceinline__ void add_loaded(const Vector<T, V>& loaded, W weight, W (&sum)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = std::fma(weight, static_cast<W>(loaded.at[v]), sum[v]);
}

template <int V, typename T>
__device__ __forceinline__ Vector<T, V> load(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <int V, typename T, typename W>
__device__ __forceinline__ void store(T* to, const W (&sum)[V]) {
  Vector<T, V> rounded;
#pragma unroll
  for (int v = 0; v < V; ++v) rounded.at[v] = static_cast<T>(sum[v]);
  *reinterpret_cast<Vector<T, V>*>(to) = rounded;
}

// The same to global memory alone, all at once: a plain assignment may be compiled into a store for each number.
template <int V, typename T, typename W>
__device__ __forceinline__ void store_global(T* to, const W (&sum)[V]) {
  if constexpr (sizeof(Vector<T, V>) == 16) {
    Vector<T, V> rounded;
#pragma unroll
    for (int v = 0; v < V; ++v) rounded.at[v] = static_cast<T>(sum[v]);
    uint4 bits;
    __builtin_memcpy(&bits, &rounded, sizeof bits);
    __stcg(reinterpret_cast<uint4*>(to), bits);
  } else {
    store<V>(to, sum);
  }
}

// sum += the pixels of a column at `from`, weighted: `count` taps, four loads at a time under way.
template <int V, int N, typename T, typename Tap, typename W>
__device__ __forceinline__ void add_taps(const T* from, const Tap* taps, W (&sum)[V]) {
  Vector<T, V> loaded[N];
#pragma unroll
  for (int n = 0; n < N; ++n) loaded[n] = load<V>(from + taps[n].offset);
#pragma unroll
  for (int n = 0; n < N; ++n) add_loaded<V>(loaded[n], taps[n].weight, sum);
}

template <int V, typename T, typename Tap, typename W>
__device__ __forceinline__ void add_all_taps(const T* from, const Tap* taps, int count, W (&sum)[V]) {
  for (; count >= 4; count -= 4, taps += 4) add_taps<V, 4>(from, taps, sum);
  if (count == 3) add_taps<V, 3>(from, taps, sum);
  if (count == 2) add_taps<V, 2>(from, taps, sum);
  if (count == 1) add_taps<V, 1>(from, taps, sum);
}

}  // namespace doublehead::roi_align::device
