// Forward, planar: as in forward.cuh, with lanes along the columns of a box's window.
#pragma once

#include "forward.cuh"

namespace doublehead::roi_align::device {

constexpr int32_t kPlanarThreads = 128;
constexpr int32_t kPlanarChannels = 64;        // of a block
constexpr int32_t kPlanarSumBytes = 16 << 10;  // shared memory for combined rows

// Division by a multiplication, of numbers whose product with the divisor is below 2^32.
struct Divisor {
  uint32_t by, inverse;

  __device__ static Divisor make(uint32_t by) { return {by, by > 1 ? 0xffffffffu / by + 1 : 0}; }
  __device__ uint32_t divide(uint32_t number) const { return by > 1 ? __umulhi(number, inverse) : number; }
};

// What a block pools, in shared memory: one warp finds it out.
struct PlanarWork {
  bool tabled;                 // else it is pooled bin by bin, or zeros
  bool empty_rows;             // some bins read no pixel
  int32_t level, scale;
  int64_t image, output;       // where the first channel begins. Numbers: pointers would not be known to be global
  int64_t plane;               // from a channel to the next
  int32_t columns, first;      // columns to combine, side by side from `first` on; first < 0: those of the column taps
  int32_t some_rows, some_channels;  // that there is room for at a time: rows of bins, channels
  Divisor by_columns;
};

// A tap of the rows, of any bin. Bins follow each other without gaps. `row`: the row of the bin whose last tap this is,
// times the columns, or -1.
template <typename W>
struct alignas(16) RowTap {
  int32_t offset, row;
  W weight;
};

constexpr int kRowTaps = 8;  // of two channels: sixteen loads under way

// A warp: the taps of all rows of bins, one after the other, and where each row's begin, into its Bin. Behind the last one
// stand kRowTaps that are read and weigh nothing. Returns whether each bin has one.
template <typename W>
__device__ inline bool line_up(const Tables<W, int32_t>& tables, int32_t bins, int32_t columns, RowTap<W>* taps) {
  int32_t begin = 0;
  bool all = true;
  for (int32_t first = 0; first < bins; first += 32) {
    const int32_t row = first + threadIdx.x;
    const Bin bin = row < bins ? tables.row_bins[row] : Bin{0, 0};
    int32_t upto = bin.count;
    for (int32_t step = 1; step < 32; step *= 2) {
      const int32_t before = __shfl_up_sync(0xffffffffu, upto, step);
      if (int32_t(threadIdx.x) >= step) upto += before;
    }
    const int32_t mine = begin + upto - bin.count;
    for (int32_t t = 0; t < bin.count; ++t) {
      const Tap<W, int32_t> tap = tables.rows[bin.begin + t];
      taps[mine + t] = {tap.offset, t + 1 == bin.count ? row * columns : -1, tap.weight};
    }
    if (row < bins) tables.row_bins[row].begin = mine;
    all = all && __all_sync(0xffffffffu, row >= bins || bin.count > 0);
    begin += __shfl_sync(0xffffffffu, upto, 31);
  }
  if (threadIdx.x < kRowTaps) taps[begin + threadIdx.x] = {0, -1, W(0)};
  return all;
}

// A lane: goes through a column of two channels once, and leaves the sums of `rows` rows of bins, from `first` on. Both
// numbers are rows times columns.
template <typename T, typename W>
__device__ __forceinline__ void combine_rows(const T* pixels, const T* pixels_2, const RowTap<W>* taps, int32_t count,
                                             uint32_t first, uint32_t rows, W* to, W* to_2) {
  W sum = 0, sum_2 = 0;
#pragma unroll 1
  for (const RowTap<W>* end = taps + count; taps < end; taps += kRowTaps) {
    DOUBLEHEAD_MARK_BEGIN("roi_align: taps of a column");
    RowTap<W> tap[kRowTaps];
    T loaded[kRowTaps], loaded_2[kRowTaps];
#pragma unroll
    for (int j = 0; j < kRowTaps; ++j) {
      tap[j] = taps[j];
      loaded[j] = pixels[uint32_t(tap[j].offset)];
      loaded_2[j] = pixels_2[uint32_t(tap[j].offset)];
    }
#pragma unroll
    for (int j = 0; j < kRowTaps; ++j) {
      sum = std::fma(tap[j].weight, static_cast<W>(loaded[j]), sum);
      sum_2 = std::fma(tap[j].weight, static_cast<W>(loaded_2[j]), sum_2);
      if (tap[j].row < 0) continue;
      const uint32_t row = uint32_t(tap[j].row) - first;
      if (row < rows) to[row] = sum, to_2[row] = sum_2;
      sum = sum_2 = W(0);
    }
    DOUBLEHEAD_MARK_END("roi_align: taps of a column");
  }
}

// Grid: boxes * scales * chunks of channels. Lanes lie along the columns of the window, channel after channel: first each
// column's pixels are combined for the rows of bins, into shared memory, then the columns for the bins.
template <typename T, typename W>
__global__ void __launch_bounds__(kPlanarThreads, sizeof(W) == 8 ? 3 : 5)
    pool_planar(const __grid_constant__ Problem<W> problem, const Room room) {
  using Shared = Tap<W, int32_t>;
  DOUBLEHEAD_DYNAMIC_SHARED(Shared, shared);
  __shared__ PlanarWork work;
  constexpr int32_t kSums = kPlanarSumBytes / sizeof(W);
  const int64_t chunks = (problem.channels + kPlanarChannels - 1) / kPlanarChannels;
  const int64_t first = blockIdx.x % chunks * kPlanarChannels, left = problem.channels - first;
  const int32_t channels = int32_t(left < kPlanarChannels ? left : kPlanarChannels);
  const int32_t bins = problem.height * problem.width;
  const Tables<W, int32_t> tables = place_tables<W, int32_t>(shared, room, problem.height);
  RowTap<W>* const taps = reinterpret_cast<RowTap<W>*>(tables.rest);
  W* const sums = reinterpret_cast<W*>(taps + room.rows + kRowTaps);  // W[channels, rows of bins, columns], some at a time
  if (threadIdx.x < 32) {
    const Work<T, W> found = find_work<T>(problem, room, blockIdx.x / chunks);
    // The columns to combine: those of the window, or, where fewer are read, those of the taps.
    const int32_t width = found.columns.last - found.columns.first;
    const bool dense = found.column_slots.adaptive || width <= found.column_slots.total;
    const int32_t columns = dense ? width : found.column_slots.total;
    const bool small = found.map->row_stride <= INT32_MAX / (found.map->height + 1);  // a plane's offsets are
    const bool tabled = found.image && found.fits && columns <= kSums / 2 && small;
    bool all = true;
    if (tabled) {
      fill_tables(problem, *found.map, found.axes, found.row_slots, found.column_slots, tables, 32);
      __syncwarp();
      all = line_up(tables, problem.height, columns, taps);
    }
    if (threadIdx.x == 0) {
      work.empty_rows = !all;
      const int32_t some_rows = 2 * problem.height * columns <= kSums ? problem.height : kSums / (2 * columns);
      work.tabled = tabled;
      work.level = int32_t(found.map - problem.maps);
      work.scale = int32_t(blockIdx.x / chunks % problem.scales);
      work.image = !tabled ? 0 : found.image - static_cast<const T*>(found.map->data) + first * found.map->channel_stride;
      work.output = found.output - static_cast<T*>(problem.pooled[work.scale]) + first * bins;
      work.plane = found.map->channel_stride;
      work.columns = columns, work.first = dense ? found.columns.first : -1;
      work.some_rows = some_rows, work.some_channels = tabled ? kSums / (some_rows * columns) / 2 * 2 : 0;
      work.by_columns = Divisor::make(uint32_t(columns));
    }
  }
  __syncthreads();
  if (!work.tabled) {
    const Work<T, W> found = find_work<T>(problem, room, blockIdx.x / chunks);
    pool_chunk_by_samples(problem, found, first, channels, bins, 1);
    return;
  }
  const T* const image = static_cast<const T*>(problem.maps[work.level].data) + work.image;
  T* const output = static_cast<T*>(problem.pooled[work.scale]) + work.output;
  const int32_t columns = work.columns, some_rows = work.some_rows, first_column = work.first;
  const Divisor by_width = Divisor::make(uint32_t(problem.width));
#pragma unroll 1
  for (int32_t c0 = 0; c0 < channels; c0 += work.some_channels) {
    const int32_t c_count = channels - c0 < work.some_channels ? channels - c0 : work.some_channels;
    const int32_t half = (c_count + 1) / 2;  // a lane has channels c and c + half; the last one may be there twice
#pragma unroll 1
    for (int32_t ph0 = 0; ph0 < problem.height; ph0 += some_rows) {
      const int32_t rows = problem.height - ph0 < some_rows ? problem.height - ph0 : some_rows;
      const Divisor by_rows = Divisor::make(uint32_t(rows));
      const Bin last = tables.row_bins[ph0 + rows - 1];
      const int32_t begin = tables.row_bins[ph0].begin, end = last.begin + last.count;
      if (work.empty_rows) {
        for (int32_t i = threadIdx.x; i < c_count * rows * columns; i += kPlanarThreads) sums[i] = W(0);
        __syncthreads();
      }
#pragma unroll 1
      for (int32_t i = threadIdx.x; i < half * columns; i += kPlanarThreads) {
        const int32_t c = int32_t(work.by_columns.divide(uint32_t(i))), column = i - c * columns;
        const int32_t x = first_column >= 0 ? first_column + column : tables.columns[column].offset;
        if (x < 0) continue;  // a slot without a tap
        const int32_t other = c + half < c_count ? half : 0;
        const T* const pixels = image + (c0 + c) * work.plane + x;
        W* const to = sums + c * rows * columns + column;
        combine_rows(pixels, pixels + other * work.plane, taps + begin, end - begin, uint32_t(ph0 * columns),
                     uint32_t(rows * columns), to, to + other * rows * columns);
      }
      __syncthreads();
#pragma unroll 1
      for (int32_t i = threadIdx.x; i < c_count * rows * problem.width; i += kPlanarThreads) {
        DOUBLEHEAD_MARK_BEGIN("roi_align: planar output");
        const int32_t line = int32_t(by_width.divide(uint32_t(i))), pw = i - line * problem.width;  // channel and row
        const Bin bin = tables.column_bins[pw];
        const W* const from = sums + line * columns;
        W sum = 0;
#pragma unroll 1
        for (int32_t t = bin.begin; t < bin.begin + bin.count; t += 4) {
#pragma unroll
          for (int32_t j = t; j < t + 4; ++j) {
            if (j >= bin.begin + bin.count) break;
            const Tap<W, int32_t> tap = tables.columns[j];
            sum = std::fma(tap.weight, from[first_column >= 0 ? tap.offset - first_column : j], sum);
          }
        }
        T* to = output + int64_t(c0) * bins + i;
        if (rows < problem.height) {
          const int32_t c = int32_t(by_rows.divide(uint32_t(line)));
          to += c * (problem.height - rows) * problem.width + ph0 * problem.width;
        }
        *to = static_cast<T>(sum);
        DOUBLEHEAD_MARK_END("roi_align: planar output");
      }
      __syncthreads();
    }
  }
}

}  // namespace doublehead::roi_align::device
