// The operators' arguments, as they stand in their schema after the tensors, and what must hold for them.
#pragma once

#include "common.h"
#include "roi_align.h"

#include <utility>
#include <vector>

namespace doublehead::roi_align {

struct Pooling {
  std::vector<double> spatial_scales, box_scales;
  int64_t height, width;  // of the output, in bins
  int64_t sampling_ratio;
  bool aligned;
  double canonical_size;
  int64_t canonical_level, level_rule;
};

inline Pooling make_pooling(std::vector<double> spatial_scales, std::vector<double> box_scales,
                            const std::vector<int64_t>& output_size, int64_t sampling_ratio, bool aligned,
                            double canonical_size, int64_t canonical_level, int64_t level_rule) {
  DOUBLEHEAD_CHECK(output_size.size() == 2, "roi_align: output_size must be (height, width)");
  return {std::move(spatial_scales), std::move(box_scales), output_size[0],  output_size[1], sampling_ratio,
          aligned,                   canonical_size,        canonical_level, level_rule};
}

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
}

}  // namespace doublehead::roi_align
