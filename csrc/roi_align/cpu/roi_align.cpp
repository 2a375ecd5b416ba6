// RoIAlign on the CPU: the operators. Their work is in forward.h and backward.h, the arithmetic in the headers these use.
#include "backward.h"
#include "forward.h"

namespace doublehead::roi_align {
namespace {

std::vector<Tensor> forward_cpu(std::vector<Tensor> features, Tensor rois, const Pooling& pooling) {
  check_pooling(pooling, features.size());
  check_dim(features[0], 4, "roi_align: features");
  check_cpu(features[0], "roi_align: features");
  const bool channels_last = is_channels_last(features[0]);
  features = check_features(features, channels_last);
  rois = check_rois(rois, features[0]);
  std::vector<std::pair<int64_t, int64_t>> extents;
  for (const Tensor& feature : features) extents.push_back({feature.size(2), feature.size(3)});
  const std::vector<Tensor> results = empty_outputs(features, rois, pooling, channels_last);
  dispatch_floating(features[0].scalar_type(), "roi_align: features", [&]<typename T>() {
    using W = compute_t<T>;
    const Plan<W> plan(data<W>(rois), rois.size(0), extents, features[0].size(0), pooling);
    forward<T>(features, plan, channels_last, results);
  });
  return results;
}

std::vector<Tensor> backward_cpu(std::vector<Tensor> grads, Tensor rois, const std::vector<int64_t>& feature_sizes,
                                 bool channels_last, const Pooling& pooling) {
  check_backward(pooling, grads, feature_sizes);
  check_cpu(grads[0], "roi_align: grads");
  rois = check_rois(rois, grads[0]);
  grads = check_grads(grads, rois, feature_sizes[1], pooling, channels_last);
  const std::vector<Tensor> results = empty_feature_grads(grads[0], feature_sizes, channels_last);
  std::vector<std::pair<int64_t, int64_t>> extents;
  for (const Tensor& result : results) extents.push_back({result.size(2), result.size(3)});
  dispatch_floating(grads[0].scalar_type(), "roi_align: grads", [&]<typename T>() {
    using W = compute_t<T>;
    const Plan<W> plan(data<W>(rois), rois.size(0), extents, feature_sizes[0], pooling);
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
  m.impl("pyramid_roi_align", TORCH_BOX(&forward_of_schema<&forward_cpu>));
  m.impl("pyramid_roi_align_backward", TORCH_BOX(&backward_of_schema<&backward_cpu>));
}

}  // namespace doublehead::roi_align
