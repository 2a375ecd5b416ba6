// The weights of a box: for each bin of an axis the pixels it reads and their weights, with everything folded in: bilinear
// weights, clamping, samples that do not count, division by the number of samples. The forward makes them in shared
// memory, the backward once for all its blocks in global memory.
#pragma once

#include "device.cuh"

namespace doublehead::roi_align::device {

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

// Calls emit(pixel, weight) for each pixel that a bin reads. Samples come in order and each reads two neighbours, so that
// two pixels are open at a time: what later samples add to them is added here, and nothing has to be read back.
template <typename W, typename Emit>
__device__ __forceinline__ void sum_taps(const Axis<W>& axis, int32_t bin, int32_t extent, Emit emit) {
  const W share = axis.samples ? W(1) / W(axis.samples) : W(0);
  int32_t low = -3;  // with its upper neighbour, if that is there, the open pixels; -3: none
  bool high = false;
  W low_weight = W(0), high_weight = W(0);
  for (int32_t sample = first_sample(axis, bin); sample < axis.samples; ++sample) {
    const W position = sample_position(axis, bin, sample);
    if (axis.bin > W(0) && position > W(extent)) break;  // so are all that follow
    if (!sample_counts(position, extent)) continue;
    const Bilinear<W> between = bilinear(position, extent);
    const W add_low = between.low_weight * share, add_high = between.high_weight * share;
    const int32_t step = between.low - low;
    if (step == 0) {
      low_weight += add_low, high_weight += add_high;
      continue;
    }
    W passed_low = W(0), passed_high = W(0);  // what the pixel weighs already
    if (step == 1) {
      emit(low, low_weight);
      passed_low = high_weight;
    } else if (step == -1) {  // a box of negative length
      if (high) emit(low + 1, high_weight);
      passed_high = low_weight;
    } else {
      if (low >= 0) emit(low, low_weight);
      if (high) emit(low + 1, high_weight);
    }
    low = between.low, high = between.high != between.low;
    low_weight = passed_low + add_low, high_weight = passed_high + add_high;
  }
  if (low >= 0) emit(low, low_weight);
  if (high) emit(low + 1, high_weight);
}

// One thread, one bin. store(place, pixel, weight) puts a tap into its place among those of the axis.
template <typename W, typename Store>
__device__ __forceinline__ Bin fill_bin(const Axis<W>& axis, int32_t bin, int32_t extent, const Slots& slots,
                                        Store store) {
  int32_t begin = bin * slots.each, count = 0;
  sum_taps(axis, bin, extent, [&](int32_t pixel, W weight) {
    if (slots.adaptive && count == 0) begin = pixel - slots.window_first + 2 * bin;
    store(begin + count++, pixel, weight);
  });
  return {begin, count};
}

// One axis of both, chosen number by number: a reference to one of two structures would put both into local memory.
template <typename W>
__device__ inline Axis<W> choose_axis(const Axes<W>& axes, bool row) {
  return {row ? axes.rows.start : axes.columns.start, row ? axes.rows.bin : axes.columns.bin,
          row ? axes.rows.samples : axes.columns.samples};
}

__device__ inline Slots choose_slots(const Slots& rows, const Slots& columns, bool row) {
  return {rows.adaptive, row ? rows.each : columns.each, row ? rows.window_first : columns.window_first, 0};
}

// ---------------------------------------------------------------------------------------------
// In shared memory

// O: the type of offsets, within a plane of a planar map 32 bits.
template <typename W, typename O = int64_t>
struct alignas(sizeof(O) + sizeof(W) > 8 ? 16 : 8) Tap {
  O offset;  // of the pixel, in elements; -1: no pixel
  W weight;
};

// The two weight matrices of a box, in the block's dynamic shared memory.
template <typename W, typename O = int64_t>
struct Tables {
  Tap<W, O>*rows, *columns;
  Bin *row_bins, *column_bins;
  W* rest;  // the shared memory behind them
};

template <typename W, typename O>
__device__ inline Tables<W, O> place_tables(Tap<W, O>* shared, const Room& room, int32_t height) {
  Tap<W, O>* const columns = shared + room.rows;
  Bin* const bins = reinterpret_cast<Bin*>(columns + room.columns);
  return {shared, columns, bins, bins + height, reinterpret_cast<W*>(bins + room.bins)};
}

// The first `threads` threads of the block, a bin each; a barrier must follow.
template <typename W, typename O>
__device__ inline void fill_tables(const Problem<W>& problem, const Map& map, const Axes<W>& axes, const Slots& rows,
                                   const Slots& columns, const Tables<W, O>& tables, int32_t threads) {
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int32_t i = thread; i < problem.height + problem.width; i += threads) {
    const bool row = i < problem.height;
    const int32_t bin = row ? i : i - problem.height;
    const Slots slots = choose_slots(rows, columns, row);
    const O stride = O(row ? map.row_stride : map.pixel_stride);
    Tap<W, O>* const taps = row ? tables.rows : tables.columns;
    const Bin filled = fill_bin(choose_axis(axes, row), bin, row ? map.height : map.width, slots,
                                [&](int32_t place, int32_t pixel, W weight) { taps[place] = {pixel * stride, weight}; });
    for (int32_t place = filled.begin + filled.count; place < (bin + 1) * slots.each; ++place) taps[place].offset = -1;
    (row ? tables.row_bins : tables.column_bins)[bin] = filled;
  }
}

}  // namespace doublehead::roi_align::device
