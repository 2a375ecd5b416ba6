// RoIAlign on the CPU: the operators. Their work is in forward.h and backward.h, the arithmetic in the headers these use.
#include "backward.h"
#include "forward.h"

namespace doublehead::roi_align {
namespace {

using torch::headeronly::MemoryFormat;

// Python checks the arguments in detail; here is what keeps every access inside its tensor.

Tensor make_output(std::vector<int64_t> sizes, ScalarType type, bool channels_last) {
  return torch::stable::empty(sizes, type, std::nullopt, std::nullopt, std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
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
