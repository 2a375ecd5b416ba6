// The operators' arguments: what stands in their schemas, packed into one value, and the checks that the CPU and CUDA
// share. Python checks the arguments in detail; here is what keeps every access inside its tensor.
#pragma once

#include "common.h"
#include "roi_align.h"

#include <optional>
#include <utility>
#include <vector>

namespace doublehead::roi_align {

// What the schemas hold after the tensors.
struct Pooling {
  std::vector<double> spatial_scales, box_scales;
  int64_t height, width;  // of the output, in bins
  int64_t sampling_ratio;
  bool aligned;
  double canonical_size;
  int64_t canonical_level;
  double level_epsilon;
  int64_t epsilon_added_to;  // AddedTo
  double end_offset;
};

inline Pooling make_pooling(std::vector<double> spatial_scales, std::vector<double> box_scales,
                            const std::vector<int64_t>& output_size, int64_t sampling_ratio, bool aligned,
                            double canonical_size, int64_t canonical_level, double level_epsilon,
                            int64_t epsilon_added_to, double end_offset) {
  DOUBLEHEAD_CHECK(output_size.size() == 2, "roi_align: output_size must be (height, width)");
  return {std::move(spatial_scales), std::move(box_scales), output_size[0],  output_size[1], sampling_ratio, aligned,
          canonical_size,            canonical_level,       level_epsilon,   epsilon_added_to, end_offset};
}

// The two schemas. `forward` and `backward` are a device's functions, which take a Pooling.
template <auto forward>
std::vector<Tensor> forward_of_schema(std::vector<Tensor> features, Tensor rois, std::vector<double> spatial_scales,
                                      std::vector<double> box_scales, std::vector<int64_t> output_size,
                                      int64_t sampling_ratio, bool aligned, double canonical_size,
                                      int64_t canonical_level, double level_epsilon, int64_t epsilon_added_to,
                                      double end_offset) {
  return forward(std::move(features), std::move(rois),
                 make_pooling(std::move(spatial_scales), std::move(box_scales), output_size, sampling_ratio, aligned,
                              canonical_size, canonical_level, level_epsilon, epsilon_added_to, end_offset));
}

// feature_sizes: batch size, channels, then height and width of every level.
template <auto backward>
std::vector<Tensor> backward_of_schema(std::vector<Tensor> grads, Tensor rois, std::vector<int64_t> feature_sizes,
                                       bool channels_last, std::vector<double> spatial_scales,
                                       std::vector<double> box_scales, std::vector<int64_t> output_size,
                                       int64_t sampling_ratio, bool aligned, double canonical_size,
                                       int64_t canonical_level, double level_epsilon, int64_t epsilon_added_to,
                                       double end_offset) {
  return backward(std::move(grads), std::move(rois), feature_sizes, channels_last,
                  make_pooling(std::move(spatial_scales), std::move(box_scales), output_size, sampling_ratio, aligned,
                               canonical_size, canonical_level, level_epsilon, epsilon_added_to, end_offset));
}

// How a box's level follows from its size.
template <typename W>
LevelRule<W> level_rule(const Pooling& pooling) {
  return {W(pooling.canonical_size), W(pooling.level_epsilon), pooling.canonical_level,
          std::lround(-std::log2(pooling.spatial_scales[0])), pooling.epsilon_added_to};
}

// ---------------------------------------------------------------------------------------------
// Memory

using torch::headeronly::MemoryFormat;

inline MemoryFormat memory_format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Whether outputs follow this feature map into channels-last memory.
inline bool is_channels_last(const Tensor& feature) { return feature.stride(1) == 1 && !feature.is_contiguous(); }

inline Tensor empty_map(const Tensor& like, std::vector<int64_t> sizes, bool channels_last) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              memory_format(channels_last));
}

// The forward's results: an output for each box scale.
inline std::vector<Tensor> empty_outputs(const std::vector<Tensor>& features, const Tensor& rois,
                                         const Pooling& pooling, bool channels_last) {
  std::vector<Tensor> outputs;
  for (size_t s = 0; s < pooling.box_scales.size(); ++s) {
    outputs.push_back(empty_map(features[0], {rois.size(0), features[0].size(1), pooling.height, pooling.width},
                                channels_last));
  }
  return outputs;
}

// The backward's results: the gradient of every level's features.
inline std::vector<Tensor> empty_feature_grads(const Tensor& like, const std::vector<int64_t>& feature_sizes,
                                               bool channels_last) {
  std::vector<Tensor> results;
  for (size_t i = 2; i < feature_sizes.size(); i += 2) {
    results.push_back(empty_map(like, {feature_sizes[0], feature_sizes[1], feature_sizes[i], feature_sizes[i + 1]},
                                channels_last));
  }
  return results;
}

// ---------------------------------------------------------------------------------------------
// Checks. The first feature or gradient is checked to be on the kernel's device by the kernel, and the rest follows it.

inline void check_pooling(const Pooling& pooling, size_t levels) {
  DOUBLEHEAD_CHECK(levels > 0, "roi_align: features must hold at least one level");
  DOUBLEHEAD_CHECK(pooling.spatial_scales.size() == levels, "roi_align: spatial_scales must have one scale for each of ",
                   levels, " levels, got ", pooling.spatial_scales.size());
  for (double scale : pooling.spatial_scales) {
    DOUBLEHEAD_CHECK(scale > 0, "roi_align: spatial_scales must be positive, got ", scale);
  }
  DOUBLEHEAD_CHECK(!pooling.box_scales.empty(), "roi_align: box_scales must hold at least one scale");
  DOUBLEHEAD_CHECK(pooling.height > 0 && pooling.width > 0, "roi_align: output_size must be positive, got (",
                   pooling.height, ", ", pooling.width, ")");
  DOUBLEHEAD_CHECK(pooling.sampling_ratio <= kMostSamples, "roi_align: sampling_ratio must be at most 2^30, got ",
                   pooling.sampling_ratio);
  DOUBLEHEAD_CHECK(pooling.epsilon_added_to >= kLevel && pooling.epsilon_added_to <= kFinestRatio,
                   "roi_align: epsilon_added_to must be 0, 1 or 2, got ", pooling.epsilon_added_to);
}

// In the dtype to compute in. Returns them contiguous.
inline Tensor check_rois(const Tensor& rois, const Tensor& feature) {
  check_same_device(rois, feature, "roi_align: rois");
  check_dim(rois, 2, "roi_align: rois");
  check_size(rois, 1, 5, "roi_align: rois");
  check_dtype(rois, feature.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float,
              "roi_align: rois");
  return torch::stable::contiguous(rois);
}

// Brings all levels into one layout, channels-last or planar: copies those that are neither.
inline std::vector<Tensor> check_features(const std::vector<Tensor>& features, bool channels_last) {
  std::vector<Tensor> checked;
  for (const Tensor& feature : features) {
    check_same_device(feature, features[0], "roi_align: features");
    check_dim(feature, 4, "roi_align: features");
    check_dtype(feature, features[0].scalar_type(), "roi_align: features");
    check_size(feature, 0, features[0].size(0), "roi_align: features");
    check_size(feature, 1, features[0].size(1), "roi_align: features");
    const bool fits = feature.stride(channels_last ? 1 : 3) == 1;
    checked.push_back(fits ? feature : torch::stable::contiguous(feature, memory_format(channels_last)));
  }
  return checked;
}

// What the backward asks of its lists' lengths, and of `pooling`.
inline void check_backward(const Pooling& pooling, const std::vector<Tensor>& grads,
                           const std::vector<int64_t>& feature_sizes) {
  const size_t levels = pooling.spatial_scales.size();
  check_pooling(pooling, levels);
  DOUBLEHEAD_CHECK(feature_sizes.size() == 2 + 2 * levels, "roi_align: feature_sizes must have ", 2 + 2 * levels,
                   " numbers, got ", feature_sizes.size());
  DOUBLEHEAD_CHECK(grads.size() == pooling.box_scales.size(), "roi_align: there must be as many grads as box_scales, ",
                   pooling.box_scales.size(), ", got ", grads.size());
}

// Brings the gradients of all outputs into one layout.
inline std::vector<Tensor> check_grads(const std::vector<Tensor>& grads, const Tensor& rois, int64_t channels,
                                       const Pooling& pooling, bool channels_last) {
  const int64_t expected[] = {rois.size(0), channels, pooling.height, pooling.width};
  std::vector<Tensor> checked;
  for (const Tensor& grad : grads) {
    check_same_device(grad, grads[0], "roi_align: grads");
    check_dim(grad, 4, "roi_align: grads");
    check_dtype(grad, grads[0].scalar_type(), "roi_align: grads");
    for (int64_t d = 0; d < 4; ++d) check_size(grad, d, expected[d], "roi_align: grads");
    checked.push_back(torch::stable::contiguous(grad, memory_format(channels_last)));
  }
  return checked;
}

}  // namespace doublehead::roi_align
