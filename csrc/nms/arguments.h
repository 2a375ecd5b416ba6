// What must hold for the arguments of non-maximum suppression, on the CPU and on CUDA: what keeps every access inside its
// tensor. Python checks them in detail.
#pragma once

#include "common.h"

namespace doublehead::nms {

// boxes [N, 4] and scores [N], or with a batch before them: `dim` is that of boxes. Boxes have been found to be on the
// kernel's device.
inline void check_arguments(const Tensor& boxes, const Tensor& scores, int64_t dim) {
  check_dim(boxes, dim, "nms: boxes");
  check_size(boxes, dim - 1, 4, "nms: boxes");
  check_dim(scores, dim - 1, "nms: scores");
  for (int64_t d = 0; d < dim - 1; ++d) check_size(scores, d, boxes.size(d), "nms: scores");
  check_same_device(scores, boxes, "nms: scores");
}

inline void check_groups(const Tensor& groups, const Tensor& scores) {
  check_same_device(groups, scores, "nms: groups");
  check_dtype(groups, ScalarType::Long, "nms: groups");
  check_dim(groups, scores.dim(), "nms: groups");
  for (int64_t d = 0; d < scores.dim(); ++d) check_size(groups, d, scores.size(d), "nms: groups");
}

inline void check_padded(int64_t max_output, int64_t largest_group) {
  DOUBLEHEAD_CHECK(max_output >= 0, "nms: max_output must be >= 0, got ", max_output);
  DOUBLEHEAD_CHECK(largest_group >= 0, "nms: largest_group must be >= 0, got ", largest_group);
}

}  // namespace doublehead::nms
