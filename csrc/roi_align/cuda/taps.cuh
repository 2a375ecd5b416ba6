// Forward: the weights of a box, in shared memory. For each bin of an axis the pixels it reads and their weights, with
// everything folded in: bilinear weights, clamping, samples that do not count, division by the number of samples.
#pragma once

#include "device.cuh"

namespace doublehead::roi_align::device {

template <typename W>
struct alignas(16) Tap {
  int64_t offset;  // of the pixel, in elements; -1: no pixel
  W weight;
};

struct Bin {
  int32_t begin, count;  // of its taps
};

// Taps of an axis in shared memory that a launch makes room for, and bins of both axes together.
struct Room {
  int32_t rows, columns, bins;
};

// Where the taps of an axis stand. Under fixed sampling each bin has a slot that always suffices. Under adaptive sampling
// a bin reads neighbouring pixels, and shares at most two with the next bin: so bin b's taps stand from 2 b + (its first
// pixel's place in the window) on. No thread has to know what the others found.
struct Slots {
  bool adaptive;
  int32_t each, window_first, total;
};

template <typename W>
__device__ inline Slots slots_of(const Axis<W>& axis, int64_t bins, int64_t sampling_ratio, Window window) {
  if (sampling_ratio > 0) {
    const int64_t total = 2 * sampling_ratio * bins;
    return {false, int32_t(2 * sampling_ratio), 0, total < INT32_MAX ? int32_t(total) : INT32_MAX};
  }
  // Where coordinates are so large that a pixel is lost in rounding, bins may share more: no room suffices.
  const Span<W> span = span_of(axis, 0, bins);
  const bool exact = span.low > -W(1 << 20) && span.high < W(1 << 20);
  return {true, 0, window.first, exact ? int32_t(window.last - window.first + 2 * bins) : INT32_MAX};
}

// Appends a tap, or merges it with one of the last two: samples come in order.
template <typename W>
__device__ inline int32_t add_tap(Tap<W>* taps, int32_t count, int64_t offset, W weight) {
  for (int32_t i = count - 1; i >= 0 && i >= count - 2; --i) {
    if (taps[i].offset == offset) {
      taps[i].weight += weight;
      return count;
    }
  }
  taps[count] = {offset, weight};
  return count + 1;
}

// One thread, one bin.
template <typename W>
__device__ inline Bin fill_bin(const Axis<W>& axis, int32_t bin, int32_t extent, int64_t stride, const Slots& slots,
                               Tap<W>* taps) {
  int32_t begin = bin * slots.each, count = 0;
  const W share = axis.samples ? W(1) / W(axis.samples) : W(0);
  for (int32_t sample = first_sample(axis, bin); sample < axis.samples; ++sample) {
    const W position = sample_position(axis, bin, sample);
    if (axis.bin > W(0) && position > W(extent)) break;  // so are all that follow
    if (!sample_counts(position, extent)) continue;
    const Bilinear<W> between = bilinear(position, extent);
    if (slots.adaptive && count == 0) begin = between.low - slots.window_first + 2 * bin;
    count = add_tap(taps + begin, count, int64_t(between.low) * stride, between.low_weight * share);
    if (between.high != between.low) {
      count = add_tap(taps + begin, count, int64_t(between.high) * stride, between.high_weight * share);
    }
  }
  if (!slots.adaptive) {
    for (int32_t i = count; i < slots.each; ++i) taps[begin + i].offset = -1;
  }
  return {begin, count};
}

// The two weight matrices of a box, in the block's dynamic shared memory.
template <typename W>
struct Tables {
  Tap<W>*rows, *columns;
  Bin *row_bins, *column_bins;
  W* rest;  // the shared memory behind them
};

template <typename W>
__device__ inline Tables<W> place_tables(Tap<W>* shared, const Room& room, int32_t height) {
  Tap<W>* const columns = shared + room.rows;
  Bin* const bins = reinterpret_cast<Bin*>(columns + room.columns);
  return {shared, columns, bins, bins + height, reinterpret_cast<W*>(bins + room.bins)};
}

// All threads of the block; a barrier must follow.
template <typename W>
__device__ inline void fill_tables(const Problem<W>& problem, const Map& map, const Axes<W>& axes, const Slots& rows,
                                   const Slots& columns, const Tables<W>& tables) {
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int32_t i = thread; i < problem.height + problem.width; i += threads) {
    const bool row = i < problem.height;
    const int32_t bin = row ? i : i - problem.height;
    // Chosen number by number: a reference to one of two structures would put both into local memory.
    const Axis<W> axis = {row ? axes.rows.start : axes.columns.start, row ? axes.rows.bin : axes.columns.bin,
                          row ? axes.rows.samples : axes.columns.samples};
    const Slots slots = {rows.adaptive, row ? rows.each : columns.each,
                         row ? rows.window_first : columns.window_first, 0};
    const Bin filled = fill_bin(axis, bin, row ? map.height : map.width, row ? map.row_stride : map.pixel_stride, slots,
                                row ? tables.rows : tables.columns);
    (row ? tables.row_bins : tables.column_bins)[bin] = filled;
  }
}

}  // namespace doublehead::roi_align::device
