// Forward: the threads share the boxes.
#pragma once

#include "channels_last.h"
#include "planar.h"
#include "tasks.h"

namespace doublehead::roi_align {

constexpr int64_t kBoxesPerTask = 8;            // forward, channels-last
constexpr int64_t kPlanarBoxesPerTask = 256;    // forward, planar: with
constexpr int64_t kPlanarChannelsPerTask = 16;  // so many channels

template <typename T>
void forward_channels_last(const std::vector<Tensor>& features, const Plan<compute_t<T>>& plan,
                           const std::vector<T*>& outputs) {
  const int64_t channels = features[0].size(1), area = plan.pooling().height * plan.pooling().width;
  const std::vector<Group> parts = split(plan.groups(), kBoxesPerTask);
  parallel_tasks(parts.size(), pooled_elements(plan, channels), [&](int64_t task) {
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

template <typename T>
void forward_planar(const std::vector<Tensor>& features, const Plan<compute_t<T>>& plan,
                    const std::vector<T*>& outputs) {
  using W = compute_t<T>;
  const Pooling& pooling = plan.pooling();
  const int64_t channels = features[0].size(1), area = pooling.height * pooling.width;
  const int64_t blocks = (channels + kPlanarChannelsPerTask - 1) / kPlanarChannelsPerTask;
  const std::vector<PlanarWeights<W>> weights = planar_weights(plan, features);
  const std::vector<Group> parts = split(plan.groups(), kPlanarBoxesPerTask);
  parallel_tasks(int64_t(parts.size()) * blocks, pooled_elements(plan, channels), [&](int64_t task) {
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

}  // namespace doublehead::roi_align
