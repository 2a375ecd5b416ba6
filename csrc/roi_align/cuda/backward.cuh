// Backward: a block sums up a tile of a level's gradient, for a chunk of channels, in registers. It goes through the
// boxes that touch the tile in order of their index and writes each element once: no atomics, no memset, and the same
// result every time.
#pragma once

#include "boxes.cuh"

namespace doublehead::roi_align::device {

constexpr int32_t kTile = 8;         // rows of a tile, and columns of a channels-last one; kTile numbers of a thread each
constexpr int32_t kPlanarTile = 32;  // columns of a planar tile
constexpr int32_t kGatherWarps = 8, kGatherThreads = 32 * kGatherWarps;
constexpr int32_t kMostBins = 32;    // of an axis whose weights are in shared memory at a time
constexpr int32_t kBatch = 16;       // boxes whose weights are in shared memory at a time

// Tiles of all levels and images, the coarsest level first: there boxes are packed most densely.
struct Tiles {
  int64_t end[kMaxLevels];     // of the tiles of a level, in this order: levels - 1, ..., 0
  int32_t across[kMaxLevels];  // tiles side by side in an image, by level
  int64_t each[kMaxLevels];    // tiles of an image
};

struct Tile {
  int32_t level, image, top, left;
};

__device__ inline Tile find_tile(const Tiles& tiles, int32_t levels, int64_t number, int32_t width) {
  int32_t level = levels - 1;
  while (number >= tiles.end[level]) --level;
  if (level < levels - 1) number -= tiles.end[level + 1];
  const int32_t image = int32_t(number / tiles.each[level]), rest = int32_t(number % tiles.each[level]);
  return {level, image, rest / tiles.across[level] * kTile, rest % tiles.across[level] * width};
}

// Bins [first, end) of a box's part read a pixel.
struct Bins {
  int32_t first, end;
};

// The weights of a batch of boxes on the tile, in dynamic shared memory. Of each box up to kMostBins bins of each axis:
// W[bins, kTile] for the tile's rows, W[bins, columns] for its columns.
template <typename T, typename W>
struct Batch {
  const T** grads;  // of the boxes
  Bins* bins;       // Bins[boxes, kTile + columns], of each row and column
  W* weights;       // W[boxes, row_bins * kTile + column_bins * columns]
  int32_t row_bins, column_bins, columns;

  __device__ int32_t size() const { return row_bins * kTile + column_bins * columns; }
  __device__ W* rows_of(int32_t box) const { return weights + box * size(); }
  __device__ W* columns_of(int32_t box) const { return rows_of(box) + row_bins * kTile; }
  __device__ Bins* bins_of(int32_t box) const { return bins + box * (kTile + columns); }
};

// The weight of a pixel in a bin.
template <typename W>
__device__ inline W weight_of(const Axis<W>& axis, int32_t bin, int32_t pixel, int32_t extent) {
  const W from = W(pixel - 1), to = W(pixel + 1);  // samples in between read the pixel, also where they are clamped
  const Span<W> span = span_of(axis, bin, bin + 1);
  if (span.high < from || span.low > to) return W(0);
  const W share = W(1) / W(axis.samples);
  W sum = 0;
  for (int32_t sample = first_sample(axis, bin, from); sample < axis.samples; ++sample) {
    const W position = sample_position(axis, bin, sample);
    if (axis.bin > W(0) && position > to) break;
    if (!sample_counts(position, extent)) continue;
    const Bilinear<W> between = bilinear(position, extent);
    if (between.low == pixel) sum += between.low_weight * share;
    if (between.high == pixel && between.high != between.low) sum += between.high_weight * share;
  }
  return sum;
}

// One pixel of one axis: its weights in bins [first, first + count), `step` apart.
template <typename W>
__device__ inline Bins fill_weights(const Axis<W>& axis, int32_t first, int32_t count, int32_t pixel, int32_t extent,
                                    W* weights, int32_t step) {
  Bins bins = {count, 0};
  for (int32_t b = 0; b < count; ++b) {
    const W weight = axis.samples && pixel < extent ? weight_of(axis, first + b, pixel, extent) : W(0);
    weights[b * step] = weight;
    if (weight == W(0)) continue;
    bins.first = bins.first < b ? bins.first : b;
    bins.end = b + 1;
  }
  return bins;
}

// All threads of the block; a barrier must follow. queue: numbers in `boxes` of the `count` boxes of the batch. Of each
// box the part of its output that begins at bin (top, left).
template <typename T, typename W>
__device__ inline void fill_batch(const Problem<W>& problem, const Boxes<W>& boxes, const Tile& tile,
                                  const int32_t* queue, int32_t count, int32_t top, int32_t left, bool channels_last,
                                  const Batch<T, W>& batch) {
  const Map& map = problem.maps[tile.level];
  const int32_t pixels = kTile + batch.columns;
  for (int32_t i = threadIdx.y * 32 + threadIdx.x; i < count * pixels; i += kGatherThreads) {
    const int32_t box = i / pixels, at = i % pixels;
    const Axes<W>& axes = boxes.axes[queue[box]];
    if (at < kTile) {
      const int32_t bins = problem.height - top < batch.row_bins ? problem.height - top : batch.row_bins;
      batch.bins_of(box)[at] =
          fill_weights(axes.rows, top, bins, tile.top + at, map.height, batch.rows_of(box) + at, kTile);
    } else {
      const int32_t x = at - kTile;
      const int32_t bins = problem.width - left < batch.column_bins ? problem.width - left : batch.column_bins;
      batch.bins_of(box)[at] =
          fill_weights(axes.columns, left, bins, tile.left + x, map.width, batch.columns_of(box) + x, batch.columns);
    }
    if (at == 0) {
      const int64_t item = boxes.items[queue[box]], roi = item / problem.scales;
      const T* const grads = static_cast<const T*>(problem.pooled[item % problem.scales]);
      const int64_t bin = int64_t(top) * problem.width + left;
      batch.grads[box] = grads + roi * problem.channels * problem.height * problem.width +
                         bin * (channels_last ? problem.channels : 1);
    }
  }
}

// Goes through the boxes that touch the tile, batch after batch, and calls add(box) for each box of a batch, in all
// threads. `shared` is the block's dynamic shared memory.
template <typename T, typename W, typename Add>
__device__ __forceinline__ void for_each_box(const Problem<W>& problem, const Boxes<W>& boxes, const Tile& tile,
                                             int32_t batch_size, bool channels_last, Batch<T, W>& batch, Add add) {
  __shared__ int32_t queue[kGatherThreads], warps[kGatherWarps];
  const int32_t thread = threadIdx.y * 32 + threadIdx.x;
  const Range range = boxes.ranges[tile.image * problem.levels + tile.level];
  for (int32_t first = range.begin; first < range.end; first += kGatherThreads) {
    bool touches = false;
    if (first + thread < range.end) {
      const BoxWindow window = boxes.windows[first + thread];
      touches = window.rows.first < tile.top + kTile && window.rows.last > tile.top &&
                window.columns.first < tile.left + batch.columns && window.columns.last > tile.left;
    }
    int32_t total = 0;
    const int32_t before = count_before<kGatherThreads>(touches, warps, total);
    if (touches) queue[before] = first + thread;
    __syncthreads();
    for (int32_t done = 0; done < total; done += batch_size) {
      const int32_t count = total - done < batch_size ? total - done : batch_size;
      for (int32_t top = 0; top < problem.height; top += batch.row_bins) {
        for (int32_t left = 0; left < problem.width; left += batch.column_bins) {
          fill_batch(problem, boxes, tile, queue + done, count, top, left, channels_last, batch);
          __syncthreads();
          for (int32_t box = 0; box < count; ++box) add(box);
          __syncthreads();
        }
      }
    }
  }
}

template <typename T, typename W>
__device__ inline Batch<T, W> lay_out_batch(W* shared, const Problem<W>& problem, int32_t batch_size, int32_t columns) {
  Batch<T, W> batch;
  batch.row_bins = problem.height < kMostBins ? problem.height : kMostBins;
  batch.column_bins = problem.width < kMostBins ? problem.width : kMostBins;
  batch.columns = columns;
  batch.weights = shared;
  batch.grads = reinterpret_cast<const T**>(shared + batch_size * batch.size());
  batch.bins = reinterpret_cast<Bins*>(batch.grads + batch_size);
  return batch;
}

// The bins that read any of the kTile pixels whose bins are at `of`, the same in all lanes.
__device__ inline Bins bins_of_all(const Bins* of) {
  const Bins mine = of[threadIdx.x % kTile];
  return {__reduce_min_sync(0xffffffffu, mine.first), __reduce_max_sync(0xffffffffu, mine.end)};
}

// sums[i] += weights[i] * value, for the pixels that the bin reaches: zero times infinity is not a number.
template <int V, typename W>
__device__ __forceinline__ void spread(const W* weights, const W (&value)[V], W (&sums)[kTile][V]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const W weight = weights[i];
    if (weight != W(0)) {
#pragma unroll
      for (int v = 0; v < V; ++v) sums[i][v] = std::fma(weight, value[v], sums[i][v]);
    }
  }
}

// Channels-last. Grid: tiles * chunks of 32 V channels. A warp has a row of the tile: of every box, bin column after bin
// column, it combines the bins of that row of pixels and gives the sum to the pixels that the bins reach.
template <typename T, typename W, int V>
__global__ void __launch_bounds__(kGatherThreads, 2)
    gather_channels_last(const __grid_constant__ Problem<W> problem, const __grid_constant__ Tiles tiles,
                         const Boxes<W> boxes, const int32_t batch_size) {
  DOUBLEHEAD_DYNAMIC_SHARED(W, shared);
  const int64_t chunks = (problem.channels + 32 * V - 1) / (32 * V);
  const Tile tile = find_tile(tiles, problem.levels, blockIdx.x / chunks, kTile);
  const int64_t channel = blockIdx.x % chunks * (32 * V) + threadIdx.x * V;
  const bool inside = channel < problem.channels;
  const int32_t row = threadIdx.y;
  const int64_t bin_row = int64_t(problem.width) * problem.channels;
  Batch<T, W> batch = lay_out_batch<T>(shared, problem, batch_size, kTile);
  W sums[kTile][V] = {};

  for_each_box(problem, boxes, tile, batch_size, true, batch, [&](int32_t box) {
    const Bins* const bins = batch.bins_of(box);
    const Bins rows = bins[row], columns = bins_of_all(bins + kTile);
    if (rows.first >= rows.end || columns.first >= columns.end || !inside) return;
    const T* grad = batch.grads[box] + channel + rows.first * bin_row + columns.first * problem.channels;
    const W* const row_weights = batch.rows_of(box) + row;
    const W* column_weights = batch.columns_of(box) + columns.first * kTile;
#pragma unroll 1
    for (int32_t pw = columns.first; pw < columns.end; ++pw) {
      W value[V] = {};
      const T* from = grad;
#pragma unroll 2
      for (int32_t ph = rows.first; ph < rows.end; ++ph, from += bin_row) {
        add_loaded<V>(load<V>(from), row_weights[ph * kTile], value);
      }
      spread<V>(column_weights, value, sums);
      grad += problem.channels;
      column_weights += kTile;
    }
  });

  const Map& map = problem.maps[tile.level];
  if (!inside || tile.top + row >= map.height) return;
  T* to = static_cast<T*>(map.data) + tile.image * map.image_stride + (tile.top + row) * map.row_stride +
          tile.left * map.pixel_stride + channel;
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (tile.left + i < map.width) store<V>(to + i * map.pixel_stride, sums[i]);
  }
}

// Planar. Grid: tiles * chunks of kGatherWarps Q channels. A lane has a column of the tile, a warp Q channels: of every
// box, bin row after bin row, a lane combines the bins of its column and gives the sum to the pixels that they reach.
template <typename T, typename W, int Q>
__global__ void __launch_bounds__(kGatherThreads, 2)
    gather_planar(const __grid_constant__ Problem<W> problem, const __grid_constant__ Tiles tiles,
                  const Boxes<W> boxes, const int32_t batch_size) {
  DOUBLEHEAD_DYNAMIC_SHARED(W, shared);
  const int64_t chunks = (problem.channels + kGatherWarps * Q - 1) / (kGatherWarps * Q);
  const Tile tile = find_tile(tiles, problem.levels, blockIdx.x / chunks, kPlanarTile);
  const int64_t channel = blockIdx.x % chunks * (kGatherWarps * Q) + threadIdx.y * Q;
  const int64_t area = int64_t(problem.height) * problem.width;
  int64_t offsets[Q];  // of the channels; those that do not exist read the last one, and are not written
#pragma unroll
  for (int q = 0; q < Q; ++q) offsets[q] = (channel + q < problem.channels ? channel + q : problem.channels - 1) * area;
  Batch<T, W> batch = lay_out_batch<T>(shared, problem, batch_size, kPlanarTile);
  W sums[kTile][Q] = {};

  for_each_box(problem, boxes, tile, batch_size, false, batch, [&](int32_t box) {
    const Bins* const bins = batch.bins_of(box);
    const Bins columns = bins[kTile + threadIdx.x], rows = bins_of_all(bins);
    const W* const column_weights = batch.columns_of(box) + threadIdx.x;
    for (int32_t ph = rows.first; ph < rows.end; ++ph) {
      const T* const from = batch.grads[box] + int64_t(ph) * problem.width;
      W value[Q] = {};
      for (int32_t pw = columns.first; pw < columns.end; ++pw) {
        const W weight = column_weights[pw * kPlanarTile];
#pragma unroll
        for (int q = 0; q < Q; ++q) value[q] = std::fma(weight, static_cast<W>(from[offsets[q] + pw]), value[q]);
      }
      spread<Q>(batch.rows_of(box) + ph * kTile, value, sums);
    }
  });

  const Map& map = problem.maps[tile.level];
  const int32_t x = tile.left + threadIdx.x;
  if (x >= map.width) return;
  T* const to = static_cast<T*>(map.data) + tile.image * map.image_stride + x;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (channel + q >= problem.channels) break;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const int64_t y = tile.top + i;
      if (y >= map.height) break;
      to[(channel + q) * map.channel_stride + y * map.row_stride] = static_cast<T>(sums[i][q]);
    }
  }
}

}  // namespace doublehead::roi_align::device
