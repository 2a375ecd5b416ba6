// Backward: the threads share the gradient, and each walks all boxes that touch its part in one and the same order. So
// there are no atomics, and the result does not depend on the number of threads. Every element is set to zero by the
// thread that sums it up, while it is in the cache. Gradients of 16-bit features are summed up in float, rounded once.
#pragma once

#include "channels_last.h"
#include "planar.h"
#include "tasks.h"

namespace doublehead::roi_align {

constexpr int64_t kPlanarChannelsPerSum = 4;    // backward, planar
constexpr int64_t kTileHeight = 8, kTileWidth = 64, kTileChannels = 256;  // backward, channels-last: 512 KiB of float

template <typename T, typename W>
DOUBLEHEAD_MULTIVERSION void round_to(const W* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<W> <= count; i += kLanes<W>) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

inline int64_t elements_of(const std::vector<Tensor>& tensors) {
  int64_t count = 0;
  for (const Tensor& tensor : tensors) count += tensor.numel();
  return count;
}

template <typename T>
void backward_planar(const std::vector<const T*>& grads, const Plan<compute_t<T>>& plan,
                     const std::vector<Tensor>& results) {
  using W = compute_t<T>;
  const Pooling& pooling = plan.pooling();
  const int64_t channels = results[0].size(1), area = pooling.height * pooling.width;
  const int64_t blocks = (channels + kPlanarChannelsPerSum - 1) / kPlanarChannelsPerSum;
  const std::vector<PlanarWeights<W>> weights = planar_weights(plan, results);
  parallel_tasks(int64_t(plan.groups().size()) * blocks, elements_of(results) + pooled_elements(plan, channels), [&](int64_t task) {
    const Group& group = plan.groups()[task / blocks];
    const int64_t first = task % blocks * kPlanarChannelsPerSum;
    const int64_t count = std::min(channels - first, kPlanarChannelsPerSum);
    const int64_t width = results[group.level].size(3), plane = results[group.level].size(2) * width;
    T* result = data<T>(results[group.level]) + (group.image * channels + first) * plane;
    const Scratch<W> scratch(planar_scratch<W>(pooling.height, pooling.width, width));
    const Scratch<W> rounded_later(std::is_same_v<T, W> ? 0 : count * plane);
    W* sums = rounded_later.get();
    if constexpr (std::is_same_v<T, W>) sums = result;
    std::fill_n(sums, count * plane, W(0));
    for (int64_t i = group.begin; i < group.end; ++i) {
      const Item& item = plan.items()[i];
      spread_planar<T>(grads[item.scale] + (item.roi * channels + first) * area, count, weights[i], scratch.get(), sums,
                       plane, width);
    }
    if constexpr (!std::is_same_v<T, W>) round_to(sums, count * plane, result);
  });
}

// The weights of one box as the channels-last backward wants them: by pixel, from pixel `first_...` on.
template <typename W>
struct PixelWeights {
  Sparse<W> rows, columns;
  int64_t first_row, first_column;
};

template <typename W>
std::vector<PixelWeights<W>> pixel_weights(const Plan<W>& plan) {
  std::vector<PixelWeights<W>> weights(plan.pooled());
  const std::vector<Group> parts = split(plan.groups(), 16);
  parallel_tasks(parts.size(), plan.pooled() * 256, [&](int64_t task) {
    AxisWeights<W> rows, columns;
    for (int64_t i = parts[task].begin; i < parts[task].end; ++i) {
      plan.weights(plan.items()[i], parts[task].level, rows, columns);
      weights[i] = {by_pixel(rows), by_pixel(columns), rows.first, columns.first};
    }
  });
  return weights;
}

// Calls body(y, x, pixels) for runs of pixels of a tile that are contiguous there: its rows, or else single pixels.
template <typename W, typename Body>
void for_each_run(const Tile<W>& tile, bool whole_pixels, const Body& body) {
  const int64_t width = tile.right - tile.left, step = whole_pixels ? width : 1;
  for (int64_t y = 0; y < tile.bottom - tile.top; ++y) {
    for (int64_t x = 0; x < width; x += step) body(y, x, step);
  }
}

struct TileTask {
  const Group* group;
  int64_t top, left, first_channel;
};

std::vector<TileTask> tile_tasks(const std::vector<Group>& groups, const std::vector<Tensor>& results) {
  std::vector<TileTask> tasks;
  for (const Group& group : groups) {
    const Tensor& result = results[group.level];
    for (int64_t top = 0; top < result.size(2); top += kTileHeight) {
      for (int64_t left = 0; left < result.size(3); left += kTileWidth) {
        for (int64_t c = 0; c < result.size(1); c += kTileChannels) tasks.push_back({&group, top, left, c});
      }
    }
  }
  return tasks;
}

template <typename T>
void backward_channels_last(const std::vector<const T*>& grads, const Plan<compute_t<T>>& plan,
                            const std::vector<Tensor>& results) {
  using W = compute_t<T>;
  const Pooling& pooling = plan.pooling();
  const int64_t channels = results[0].size(1), size = channels * pooling.height * pooling.width;
  const std::vector<PixelWeights<W>> weights = pixel_weights(plan);
  const std::vector<TileTask> tasks = tile_tasks(plan.groups(), results);
  parallel_tasks(tasks.size(), elements_of(results) + pooled_elements(plan, channels), [&](int64_t number) {
    const TileTask& task = tasks[number];
    const int64_t height = results[task.group->level].size(2), width = results[task.group->level].size(3);
    Tile<W> tile{task.top, std::min(height, task.top + kTileHeight), task.left, std::min(width, task.left + kTileWidth),
                 std::min(channels - task.first_channel, kTileChannels), nullptr, width * channels, channels};
    T* result = data<T>(results[task.group->level]) + task.first_channel +
                ((task.group->image * height + task.top) * width + task.left) * channels;
    const Scratch<W> combined(pooling.width * tile.channels);
    const Scratch<W> rounded_later(std::is_same_v<T, W> ? 0 : kTileHeight * kTileWidth * tile.channels);
    if constexpr (std::is_same_v<T, W>) {
      tile.data = result;
    } else {
      tile.data = rounded_later.get();
      tile.row_stride = kTileWidth * tile.channels;
      tile.pixel_stride = tile.channels;
    }
    const bool whole_pixels = tile.channels == channels;
    for_each_run(tile, whole_pixels, [&](int64_t y, int64_t x, int64_t pixels) {
      std::fill_n(tile.data + y * tile.row_stride + x * tile.pixel_stride, pixels * tile.channels, W(0));
    });
    for (int64_t i = task.group->begin; i < task.group->end; ++i) {
      const Item& item = plan.items()[i];
      spread_channels_last<T>(grads[item.scale] + item.roi * size + task.first_channel, channels, weights[i].rows,
                              weights[i].first_row, weights[i].columns, weights[i].first_column, pooling.width, tile,
                              combined.get());
    }
    if constexpr (!std::is_same_v<T, W>) {
      for_each_run(tile, whole_pixels, [&](int64_t y, int64_t x, int64_t pixels) {
        round_to(tile.data + y * tile.row_stride + x * tile.pixel_stride, pixels * tile.channels,
                 result + (y * width + x) * channels);
      });
    }
  });
}

}  // namespace doublehead::roi_align
