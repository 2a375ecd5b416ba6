// Forward, channels-last; forward_planar.cuh has the other. A block pools a chunk of channels of one box. Its weights are
// made once, in shared memory. Where there is no room for them (a box of thousands of pixels on a large map, hundreds of
// bins) bins are pooled sample by sample.
#pragma once

#include "marks.h"
#include "taps.cuh"

namespace doublehead::roi_align::device {

constexpr int32_t kWarps = 8;  // at most: each pools a row of bins at a time

// What a block works on.
template <typename T, typename W>
struct Work {
  const Map* map;
  Axes<W> axes;
  Window rows, columns;
  Slots row_slots, column_slots;
  const T* image;  // null: there is nothing to pool, the output is zero
  T* output;       // of the box: T[channels, bins, bins] in the strides of its layout
  bool fits;       // its tables fit into the room
};

template <typename T, typename W>
__device__ inline Work<T, W> find_work(const Problem<W>& problem, const Room& room, int64_t item) {
  const int64_t roi = item / problem.scales;
  const int32_t scale = int32_t(item % problem.scales);
  const Assignment assigned = assign_map(problem, roi);
  const Map& map = problem.maps[assigned.level < 0 ? 0 : assigned.level];
  Work<T, W> work;
  work.map = &map;
  work.axes = find_axes(problem, roi, scale, assigned.level);
  work.rows = window_of(work.axes.rows, problem.height, map.height);
  work.columns = window_of(work.axes.columns, problem.width, map.width);
  work.row_slots = slots_of(work.axes.rows, problem.height, problem.sampling_ratio, work.rows);
  work.column_slots = slots_of(work.axes.columns, problem.width, problem.sampling_ratio, work.columns);
  const bool any = work.rows.first < work.rows.last && work.columns.first < work.columns.last;
  work.image = any ? static_cast<const T*>(map.data) + assigned.image * map.image_stride : nullptr;
  work.output = static_cast<T*>(problem.pooled[scale]) + roi * problem.channels * problem.height * problem.width;
  work.fits = work.row_slots.total <= room.rows && work.column_slots.total <= room.columns &&
              problem.height + problem.width <= room.bins;
  return work;
}

// One bin of one channel, sample by sample; slow, and right for any box.
template <typename T, typename W>
__device__ inline W pool_by_samples(const T* channel, const Map& map, const Axes<W>& axes, int32_t ph, int32_t pw) {
  W total = 0;
  for (int32_t i = first_sample(axes.rows, ph); i < axes.rows.samples; ++i) {
    const W y = sample_position(axes.rows, ph, i);
    if (axes.rows.bin > W(0) && y > W(map.height)) break;
    if (!sample_counts(y, map.height)) continue;
    const Bilinear<W> row = bilinear(y, map.height);
    W sum = 0;
    for (int32_t j = first_sample(axes.columns, pw); j < axes.columns.samples; ++j) {
      const W x = sample_position(axes.columns, pw, j);
      if (axes.columns.bin > W(0) && x > W(map.width)) break;
      if (!sample_counts(x, map.width)) continue;
      const Bilinear<W> column = bilinear(x, map.width);
      const auto pixel = [&](int32_t at_y, int32_t at_x) {
        return static_cast<W>(channel[at_y * map.row_stride + at_x * map.pixel_stride]);
      };
      sum += row.low_weight * (column.low_weight * pixel(row.low, column.low) +
                               column.high_weight * pixel(row.low, column.high)) +
             row.high_weight * (column.low_weight * pixel(row.high, column.low) +
                                column.high_weight * pixel(row.high, column.high));
    }
    total += sum / W(axes.columns.samples);
  }
  return total / W(axes.rows.samples);
}

// `count` channels from `first` on, bin by bin; zeros where there is no image. Output element (channel, bin) is
// output[channel * channel_step + bin * bin_step].
template <typename T, typename W>
__device__ inline void pool_chunk_by_samples(const Problem<W>& problem, const Work<T, W>& work, int64_t first,
                                             int32_t count, int64_t channel_step, int64_t bin_step) {
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int64_t bins = int64_t(problem.height) * problem.width;
  for (int64_t i = thread; i < count * bins; i += threads) {
    const bool channels_last = channel_step == 1;  // neighbouring threads write neighbouring elements
    const int64_t channel = first + (channels_last ? i % count : i / bins), bin = channels_last ? i / count : i % bins;
    const W sum = work.image ? pool_by_samples(work.image + channel * work.map->channel_stride, *work.map, work.axes,
                                               int32_t(bin / problem.width), int32_t(bin % problem.width))
                             : W(0);
    work.output[channel * channel_step + bin * bin_step] = static_cast<T>(sum);
  }
}

// One row of bins that reads N rows of pixels, V channels: from column to column, the pixels of each combined as the row
// wants it and given to the bins that read the column. Neighbouring bins share up to two columns, which are kept.
template <int V, int N, typename T, typename W>
__device__ __forceinline__ void pool_rows(const T* pixels, const Tap<W>* rows, const Tables<W>& tables, int32_t bins,
                                          int64_t channels, T* output) {
  const T* from[N];
  W weights[N];
#pragma unroll
  for (int n = 0; n < N; ++n) from[n] = pixels + rows[n].offset, weights[n] = rows[n].weight;
  W older[V] = {}, newer[V] = {};
  int64_t older_at = -1, newer_at = -1;
#pragma unroll 1
  for (int32_t pw = 0; pw < bins; ++pw, output += channels) {
    const Bin bin = tables.column_bins[pw];
    W sum[V] = {};
#pragma unroll 1
    for (int32_t i = bin.begin; i < bin.begin + bin.count; ++i) {
      DOUBLEHEAD_MARK_BEGIN("roi_align: forward column");
      const Tap<W> column = tables.columns[i];
      if (column.offset == older_at) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] = std::fma(column.weight, older[v], sum[v]);
      } else {
        if (column.offset != newer_at) {
          older_at = newer_at;
          newer_at = column.offset;
#pragma unroll
          for (int v = 0; v < V; ++v) older[v] = newer[v], newer[v] = W(0);
          Vector<T, V> loaded[N];
#pragma unroll
          for (int n = 0; n < N; ++n) loaded[n] = load<V>(from[n] + column.offset);
#pragma unroll
          for (int n = 0; n < N; ++n) add_loaded<V>(loaded[n], weights[n], newer);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] = std::fma(column.weight, newer[v], sum[v]);
      }
      DOUBLEHEAD_MARK_END("roi_align: forward column");
    }
    store<V>(output, sum);
  }
}

// The same for any number of rows of pixels.
template <int V, typename T, typename W>
__device__ __forceinline__ void pool_many_rows(const T* pixels, const Tap<W>* rows, int32_t row_count,
                                               const Tables<W>& tables, int32_t bins, int64_t channels, T* output) {
  W older[V] = {}, newer[V] = {};
  int64_t older_at = -1, newer_at = -1;
  for (int32_t pw = 0; pw < bins; ++pw, output += channels) {
    const Bin bin = tables.column_bins[pw];
    W sum[V] = {};
    for (int32_t i = bin.begin; i < bin.begin + bin.count; ++i) {
      const Tap<W> column = tables.columns[i];
      if (column.offset == older_at) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] = std::fma(column.weight, older[v], sum[v]);
        continue;
      }
      if (column.offset != newer_at) {
        older_at = newer_at;
        newer_at = column.offset;
#pragma unroll
        for (int v = 0; v < V; ++v) older[v] = newer[v], newer[v] = W(0);
        add_all_taps<V>(pixels + column.offset, rows, row_count, newer);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = std::fma(column.weight, newer[v], sum[v]);
    }
    store<V>(output, sum);
  }
}

template <int V, typename T, typename W>
__device__ __forceinline__ void pool_row(const T* pixels, const Tap<W>* rows, int32_t row_count,
                                         const Tables<W>& tables, int32_t bins, int64_t channels, T* output) {
  switch (row_count) {
    case 1: return pool_rows<V, 1>(pixels, rows, tables, bins, channels, output);
    case 2: return pool_rows<V, 2>(pixels, rows, tables, bins, channels, output);
    case 3: return pool_rows<V, 3>(pixels, rows, tables, bins, channels, output);
    case 4: return pool_rows<V, 4>(pixels, rows, tables, bins, channels, output);
    default: return pool_many_rows<V>(pixels, rows, row_count, tables, bins, channels, output);
  }
}

// What the compiler may take. A box of 7 or 14 rows has blocks of 7 warps: with 72 registers a thread four of them fit on
// a multiprocessor, with 80 three.
#if defined(__CUDACC_VER_MAJOR__) && 100 * __CUDACC_VER_MAJOR__ + __CUDACC_VER_MINOR__ >= 1204
#define DOUBLEHEAD_POOL_BOUNDS __maxnreg__(sizeof(W) == 8 ? 192 : 72)
#else
#define DOUBLEHEAD_POOL_BOUNDS __launch_bounds__(32 * kWarps, sizeof(W) == 8 ? 1 : 3)
#endif

// Channels-last. Grid: boxes * scales * chunks of 32 V channels; block: 32 lanes, a warp for each of some rows of bins.
// The warps of a block read neighbouring rows of pixels at about the same time: what two of them read comes from memory
// once, the second time from the L1 cache.
template <typename T, typename W, int V>
__global__ void DOUBLEHEAD_POOL_BOUNDS
    pool_channels_last(const __grid_constant__ Problem<W> problem, const Room room) {
  using Shared = Tap<W>;
  DOUBLEHEAD_DYNAMIC_SHARED(Shared, shared);
  const int64_t chunks = (problem.channels + 32 * V - 1) / (32 * V);
  const int64_t first = blockIdx.x % chunks * (32 * V), channel = first + threadIdx.x * V;
  const Work<T, W> work = find_work<T>(problem, room, blockIdx.x / chunks);
  if (!work.image || !work.fits) {
    const int64_t left = problem.channels - first;
    pool_chunk_by_samples(problem, work, first, int32_t(left < 32 * V ? left : 32 * V), 1, problem.channels);
    return;
  }
  const Tables<W> tables = place_tables<W, int64_t>(shared, room, problem.height);
  fill_tables(problem, *work.map, work.axes, work.row_slots, work.column_slots, tables, blockDim.x * blockDim.y);
  __syncthreads();
  if (channel >= problem.channels) return;
  for (int32_t ph = threadIdx.y; ph < problem.height; ph += blockDim.y) {
    const Bin row = tables.row_bins[ph];
    pool_row<V>(work.image + channel, tables.rows + row.begin, row.count, tables, problem.width, problem.channels,
                work.output + int64_t(ph) * problem.width * problem.channels + channel);
  }
}

}  // namespace doublehead::roi_align::device
