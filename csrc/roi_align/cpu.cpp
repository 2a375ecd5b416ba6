// RoIAlign on the CPU: checks, memory, and the division of the work among threads. The arithmetic is in the headers.
//
// Forward: the threads share the boxes. Backward: they share the gradient, and each walks all boxes that touch its part
// in one and the same order, so there are no atomics, and the result does not depend on the number of threads.
#include "channels_last.h"
#include "plan.h"
#include "planar.h"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace doublehead::roi_align {
namespace {

using torch::headeronly::MemoryFormat;

constexpr int64_t kBoxesPerTask = 8;            // forward, channels-last
constexpr int64_t kPlanarBoxesPerTask = 256;    // forward, planar: with
constexpr int64_t kPlanarChannelsPerTask = 16;  // so many channels
constexpr int64_t kPlanarChannelsPerSum = 4;    // backward, planar
constexpr int64_t kTileHeight = 8, kTileWidth = 64, kTileChannels = 256;  // backward, channels-last: 512 KiB of float

// Runs body(task) for every task on torch's threads; whichever thread is free takes the next one.
template <typename Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(tasks, num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) body(task);
  });
}

// Uninitialised memory on a cache line's boundary.
template <typename W>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<W*>(::operator new(count * sizeof(W), kAlignment))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, kAlignment); }
  W* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  W* data_;
};

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Tensor make_output(std::vector<int64_t> sizes, ScalarType type, bool channels_last) {
  return torch::stable::empty(sizes, type, std::nullopt, std::nullopt, std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A large result is new memory, and half of the backward's time would go into the page faults of its 4 KiB pages. All
// of it will be written, so large pages take no more memory.
template <typename T>
void ask_for_large_pages([[maybe_unused]] const std::vector<Tensor>& outputs) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096, worthwhile = uintptr_t(4) << 20;
  for (const Tensor& output : outputs) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(output.data_ptr());
    const uintptr_t begin = (address + page - 1) / page * page;
    const uintptr_t end = (address + output.numel() * sizeof(T)) / page * page;
    if (begin + worthwhile <= end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

// A range of a group's items.
std::vector<Group> split(const std::vector<Group>& groups, int64_t most) {
  std::vector<Group> parts;
  for (const Group& group : groups) {
    for (int64_t begin = group.begin; begin < group.end; begin += most) {
      parts.push_back({group.level, group.image, begin, std::min(group.end, begin + most)});
    }
  }
  return parts;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

template <typename T>
void forward_channels_last(const std::vector<Tensor>& features, const Plan<compute_t<T>>& plan,
                           const std::vector<T*>& outputs) {
  const int64_t channels = features[0].size(1), area = plan.pooling().height * plan.pooling().width;
  const std::vector<Group> parts = split(plan.groups(), kBoxesPerTask);
  parallel_tasks(parts.size(), [&](int64_t task) {
    const Group& part = parts[task];
    const Tensor& feature = features[part.level];
    const T* image = data<T>(feature) + part.image * feature.stride(0);
    AxisWeights<compute_t<T>> rows, columns;
    for (int64_t i = part.begin; i < part.end; ++i) {
      const Item& item = plan.items()[i];
      plan.weights(item, part.level, rows, columns);
      pool_channels_last<T>(image, feature.stride(2), feature.stride(3), channels, rows.bins, columns.bins,
                            outputs[item.scale] + item.roi * channels * area);
    }
  });
}

template <typename W>
std::vector<PlanarWeights<W>> planar_weights(const Plan<W>& plan, const std::vector<Tensor>& maps) {
  std::vector<PlanarWeights<W>> weights(plan.pooled());
  const std::vector<Group> parts = split(plan.groups(), 16);
  parallel_tasks(parts.size(), [&](int64_t task) {
    for (int64_t i = parts[task].begin; i < parts[task].end; ++i) {
      PlanarWeights<W>& w = weights[i];
      plan.weights(plan.items()[i], parts[task].level, w.rows, w.columns);
      w.uniform = make_uniform(w.rows.bins);
      w.strip = make_strip(w.columns, maps[parts[task].level].size(3));
    }
  });
  return weights;
}

template <typename T>
void forward_planar(const std::vector<Tensor>& features, const Plan<compute_t<T>>& plan,
                    const std::vector<T*>& outputs) {
  using W = compute_t<T>;
  const Pooling& pooling = plan.pooling();
  const int64_t channels = features[0].size(1), area = pooling.height * pooling.width;
  const int64_t blocks = (channels + kPlanarChannelsPerTask - 1) / kPlanarChannelsPerTask;
  const std::vector<PlanarWeights<W>> weights = planar_weights(plan, features);
  const std::vector<Group> parts = split(plan.groups(), kPlanarBoxesPerTask);
  parallel_tasks(int64_t(parts.size()) * blocks, [&](int64_t task) {
    const Group& part = parts[task / blocks];
    const int64_t first = task % blocks * kPlanarChannelsPerTask;
    const int64_t count = std::min(channels - first, kPlanarChannelsPerTask);
    const Tensor& feature = features[part.level];
    const T* planes = data<T>(feature) + part.image * feature.stride(0) + first * feature.stride(1);
    const Scratch<W> scratch(planar_scratch<W>(pooling.height, pooling.width, feature.size(3)));
    for (int64_t i = part.begin; i < part.end; ++i) {
      const Item& item = plan.items()[i];
      pool_planar<T>(planes, feature.stride(1), feature.stride(2), count, weights[i], scratch.get(),
                     outputs[item.scale] + (item.roi * channels + first) * area);
    }
  });
}

template <typename T>
void forward(const std::vector<Tensor>& features, const Plan<compute_t<T>>& plan, bool channels_last,
             const std::vector<Tensor>& results) {
  ask_for_large_pages<T>(results);
  std::vector<T*> outputs;
  for (const Tensor& result : results) outputs.push_back(data<T>(result));
  const int64_t size = features[0].size(1) * plan.pooling().height * plan.pooling().width;
  for (size_t i = plan.pooled(); i < plan.items().size(); ++i) {
    const Item& item = plan.items()[i];
    std::fill_n(outputs[item.scale] + item.roi * size, size, static_cast<T>(0.0f));
  }
  channels_last ? forward_channels_last<T>(features, plan, outputs) : forward_planar<T>(features, plan, outputs);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. Gradients of 16-bit features are summed up in float and rounded once.

template <typename T>
void backward_planar(const std::vector<const T*>& grads, const Plan<compute_t<T>>& plan,
                     const std::vector<Tensor>& results) {
  using W = compute_t<T>;
  const Pooling& pooling = plan.pooling();
  const int64_t channels = results[0].size(1), area = pooling.height * pooling.width;
  const int64_t blocks = (channels + kPlanarChannelsPerSum - 1) / kPlanarChannelsPerSum;
  const std::vector<PlanarWeights<W>> weights = planar_weights(plan, results);
  parallel_tasks(int64_t(plan.groups().size()) * blocks, [&](int64_t task) {
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
    if constexpr (!std::is_same_v<T, W>) {
      for (int64_t i = 0; i < count * plane; ++i) result[i] = static_cast<T>(sums[i]);
    }
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
  parallel_tasks(parts.size(), [&](int64_t task) {
    AxisWeights<W> rows, columns;
    for (int64_t i = parts[task].begin; i < parts[task].end; ++i) {
      plan.weights(plan.items()[i], parts[task].level, rows, columns);
      weights[i] = {by_pixel(rows), by_pixel(columns), rows.first, columns.first};
    }
  });
  return weights;
}

// Sets a tile's pixels to zero, or, with a destination of other strides, rounds them into it.
template <typename W>
void clear(const Tile<W>& tile) {
  const int64_t width = tile.right - tile.left;
  for (int64_t y = 0; y < tile.bottom - tile.top; ++y) {
    W* row = tile.data + y * tile.row_stride;
    if (tile.pixel_stride == tile.channels) {
      std::fill_n(row, width * tile.channels, W(0));
    } else {
      for (int64_t x = 0; x < width; ++x) std::fill_n(row + x * tile.pixel_stride, tile.channels, W(0));
    }
  }
}

template <typename T, typename W>
void round_into(const Tile<W>& tile, T* result, int64_t row_stride, int64_t pixel_stride) {
  for (int64_t y = 0; y < tile.bottom - tile.top; ++y) {
    for (int64_t x = 0; x < tile.right - tile.left; ++x) {
      const W* from = tile.data + y * tile.row_stride + x * tile.pixel_stride;
      T* to = result + y * row_stride + x * pixel_stride;
      for (int64_t c = 0; c < tile.channels; ++c) to[c] = static_cast<T>(from[c]);
    }
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
  parallel_tasks(tasks.size(), [&](int64_t number) {
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
    clear(tile);
    for (int64_t i = task.group->begin; i < task.group->end; ++i) {
      const Item& item = plan.items()[i];
      spread_channels_last<T>(grads[item.scale] + item.roi * size + task.first_channel, channels, weights[i].rows,
                              weights[i].first_row, weights[i].columns, weights[i].first_column, pooling.width, tile,
                              combined.get());
    }
    if constexpr (!std::is_same_v<T, W>) round_into(tile, result, width * channels, channels);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators. Python checks the arguments in detail; here is what keeps every access inside its tensor.

void check_pooling(const Pooling& pooling, size_t levels) {
  DOUBLEHEAD_CHECK(levels > 0, "roi_align: features must hold at least one level");
  DOUBLEHEAD_CHECK(pooling.spatial_scales.size() == levels, "roi_align: spatial_scales must have one scale for each of ",
                   levels, " levels, got ", pooling.spatial_scales.size());
  for (double scale : pooling.spatial_scales) {
    DOUBLEHEAD_CHECK(scale > 0, "roi_align: spatial_scales must be positive, got ", scale);
  }
  DOUBLEHEAD_CHECK(!pooling.box_scales.empty(), "roi_align: box_scales must hold at least one scale");
  DOUBLEHEAD_CHECK(pooling.height > 0 && pooling.width > 0, "roi_align: output_size must be positive, got (",
                   pooling.height, ", ", pooling.width, ")");
}

Tensor check_rois(const Tensor& rois, ScalarType features) {
  check_cpu(rois, "roi_align: rois");
  check_dim(rois, 2, "roi_align: rois");
  check_size(rois, 1, 5, "roi_align: rois");
  check_dtype(rois, features == ScalarType::Double ? ScalarType::Double : ScalarType::Float, "roi_align: rois");
  return torch::stable::contiguous(rois);
}

// All levels in one layout: channels-last if the first is, else planar. Copies those that are neither.
std::vector<Tensor> check_features(const std::vector<Tensor>& features, bool channels_last) {
  std::vector<Tensor> checked;
  for (const Tensor& feature : features) {
    check_cpu(feature, "roi_align: features");
    check_dim(feature, 4, "roi_align: features");
    check_dtype(feature, features[0].scalar_type(), "roi_align: features");
    check_size(feature, 0, features[0].size(0), "roi_align: features");
    check_size(feature, 1, features[0].size(1), "roi_align: features");
    const bool fits = feature.stride(channels_last ? 1 : 3) == 1;
    checked.push_back(fits ? feature
                           : torch::stable::contiguous(feature, channels_last ? MemoryFormat::ChannelsLast
                                                                              : MemoryFormat::Contiguous));
  }
  return checked;
}

Pooling make_pooling(std::vector<double> spatial_scales, std::vector<double> box_scales,
                     const std::vector<int64_t>& output_size, int64_t sampling_ratio, bool aligned,
                     double canonical_size, int64_t canonical_level, int64_t level_rule) {
  DOUBLEHEAD_CHECK(output_size.size() == 2, "roi_align: output_size must be (height, width)");
  return {std::move(spatial_scales), std::move(box_scales), output_size[0],  output_size[1], sampling_ratio,
          aligned,                   canonical_size,        canonical_level, level_rule};
}

std::vector<Tensor> multiscale_roi_align(std::vector<Tensor> features, Tensor rois, std::vector<double> spatial_scales,
                                         std::vector<double> box_scales, std::vector<int64_t> output_size,
                                         int64_t sampling_ratio, bool aligned, double canonical_size,
                                         int64_t canonical_level, int64_t level_rule) {
  const Pooling pooling = make_pooling(std::move(spatial_scales), std::move(box_scales), output_size, sampling_ratio,
                                       aligned, canonical_size, canonical_level, level_rule);
  check_pooling(pooling, features.size());
  check_dim(features[0], 4, "roi_align: features");
  const bool channels_last = features[0].stride(1) == 1 && !features[0].is_contiguous();
  features = check_features(features, channels_last);
  const ScalarType type = features[0].scalar_type();
  rois = check_rois(rois, type);
  std::vector<std::pair<int64_t, int64_t>> extents;
  for (const Tensor& feature : features) extents.push_back({feature.size(2), feature.size(3)});
  std::vector<Tensor> results;
  for (size_t s = 0; s < pooling.box_scales.size(); ++s) {
    results.push_back(make_output({rois.size(0), features[0].size(1), pooling.height, pooling.width}, type, channels_last));
  }
  dispatch_floating(type, "roi_align: features", [&]<typename T>() {
    using W = compute_t<T>;
    const Plan<W> plan(data<W>(rois), rois.size(0), extents, features[0].size(0), pooling);
    forward<T>(features, plan, channels_last, results);
  });
  return results;
}

// feature_sizes: batch size, channels, then height and width of every level.
std::vector<Tensor> multiscale_roi_align_backward(std::vector<Tensor> grads, Tensor rois,
                                                  std::vector<int64_t> feature_sizes, bool channels_last,
                                                  std::vector<double> spatial_scales, std::vector<double> box_scales,
                                                  std::vector<int64_t> output_size, int64_t sampling_ratio,
                                                  bool aligned, double canonical_size, int64_t canonical_level,
                                                  int64_t level_rule) {
  const Pooling pooling = make_pooling(std::move(spatial_scales), std::move(box_scales), output_size, sampling_ratio,
                                       aligned, canonical_size, canonical_level, level_rule);
  const size_t levels = pooling.spatial_scales.size();
  check_pooling(pooling, levels);
  DOUBLEHEAD_CHECK(feature_sizes.size() == 2 + 2 * levels, "roi_align: feature_sizes must have ", 2 + 2 * levels,
                   " numbers, got ", feature_sizes.size());
  DOUBLEHEAD_CHECK(grads.size() == pooling.box_scales.size(), "roi_align: there must be as many grads as box_scales, ",
                   pooling.box_scales.size(), ", got ", grads.size());
  const ScalarType type = grads[0].scalar_type();
  rois = check_rois(rois, type);
  const int64_t images = feature_sizes[0], channels = feature_sizes[1];
  const int64_t expected[] = {rois.size(0), channels, pooling.height, pooling.width};
  for (Tensor& grad : grads) {
    check_cpu(grad, "roi_align: grads");
    check_dim(grad, 4, "roi_align: grads");
    check_dtype(grad, type, "roi_align: grads");
    for (int64_t d = 0; d < 4; ++d) check_size(grad, d, expected[d], "roi_align: grads");
    grad = torch::stable::contiguous(grad, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  std::vector<std::pair<int64_t, int64_t>> extents;
  std::vector<Tensor> results;
  for (size_t l = 0; l < levels; ++l) {
    extents.push_back({feature_sizes[2 + 2 * l], feature_sizes[3 + 2 * l]});
    results.push_back(make_output({images, channels, extents[l].first, extents[l].second}, type, channels_last));
  }
  dispatch_floating(type, "roi_align: grads", [&]<typename T>() {
    using W = compute_t<T>;
    const Plan<W> plan(data<W>(rois), rois.size(0), extents, images, pooling);
    ask_for_large_pages<T>(results);
    std::vector<const T*> data_of_grads;
    for (const Tensor& grad : grads) data_of_grads.push_back(data<T>(grad));
    channels_last ? backward_channels_last<T>(data_of_grads, plan, results)
                  : backward_planar<T>(data_of_grads, plan, results);
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(doublehead, CPU, m) {
  m.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align));
  m.impl("multiscale_roi_align_backward", TORCH_BOX(&multiscale_roi_align_backward));
}

}  // namespace doublehead::roi_align
