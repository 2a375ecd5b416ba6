// What to pool from where: every (box, box scale) with its level and image, grouped and ordered for the cache.
#pragma once

#include "../arguments.h"
#include "weights.h"

namespace doublehead::roi_align {

// One output to make: box `roi` expanded by box scale number `scale`. It begins near pixel (y, x) of its image.
struct Item {
  int64_t roi, scale, y, x;
};

// The items of one image on one level.
struct Group {
  int64_t level, image, begin, end;
};

template <typename W>
class Plan {
 public:
  // rois: W[count, 5]; extents: (height, width) of each level.
  Plan(const W* rois, int64_t count, std::vector<std::pair<int64_t, int64_t>> extents, int64_t images, Pooling pooling)
      : rois_(rois), extents_(std::move(extents)), pooling_(std::move(pooling)), level_rule_(level_rule<W>(pooling_)) {
    const int64_t groups = int64_t(extents_.size()) * images, scales = int64_t(pooling_.box_scales.size());
    std::vector<int64_t> group_of(count), next(groups + 2, 0);  // group number `groups` pools nothing
    for (int64_t k = 0; k < count; ++k) {
      group_of[k] = find_group(k, images);
      next[group_of[k] + 1] += scales;
    }
    for (int64_t g = 0; g < groups; ++g) {
      next[g + 1] += next[g];
      groups_.push_back({g / images, g % images, next[g], next[g + 1]});
    }
    pooled_ = next[groups];
    items_.resize(count * scales);
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t s = 0; s < scales; ++s) items_[next[group_of[k]]++] = {k, s, near(k, 2), near(k, 1)};
    }
    for (const Group& group : groups_) {
      // In bands of 64 pixels, from left to right: neighbours share pixels, and find them in the cache.
      std::stable_sort(items_.begin() + group.begin, items_.begin() + group.end, [](const Item& a, const Item& b) {
        return a.y / 64 != b.y / 64 ? a.y < b.y : a.x < b.x;
      });
    }
  }

  const Pooling& pooling() const { return pooling_; }
  const std::vector<Group>& groups() const { return groups_; }  // level by level, image by image
  const std::vector<Item>& items() const { return items_; }     // group by group; the order depends on the boxes alone
  int64_t pooled() const { return pooled_; }                    // the items from here on pool nothing: zeros

  void weights(const Item& item, int64_t level, AxisWeights<W>& rows, AxisWeights<W>& columns) const {
    const W* box = rois_ + item.roi * 5 + 1;
    W x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
    const W factor = W(pooling_.box_scales[item.scale]), scale = W(pooling_.spatial_scales[level]);
    sampled(x1, x2, factor, W(pooling_.end_offset));
    sampled(y1, y2, factor, W(pooling_.end_offset));
    const auto [map_height, map_width] = extents_[level];
    fill_weights(make_axis(y1, y2, scale, pooling_.height, pooling_.sampling_ratio, pooling_.aligned), pooling_.height,
                 map_height, rows);
    fill_weights(make_axis(x1, x2, scale, pooling_.width, pooling_.sampling_ratio, pooling_.aligned), pooling_.width,
                 map_width, columns);
  }

 private:
  int64_t find_group(int64_t k, int64_t images) const {
    const W* roi = rois_ + k * 5;
    DOUBLEHEAD_CHECK(roi[0] > W(-1) && roi[0] < W(images), "roi_align: rois[", k, ", 0] is ", roi[0],
                     ", but a batch index must be in [0, ", images, "), as there are that many images in the features");
    const int64_t levels = int64_t(extents_.size()), level = box_level(roi + 1, levels, level_rule_);
    return level < 0 ? levels * images : level * images + int64_t(roi[0]);
  }

  int64_t near(int64_t k, int64_t coordinate) const {
    const W at = rois_[k * 5 + coordinate];
    return at > W(0) && at < W(1 << 30) ? int64_t(at) : 0;
  }

  const W* rois_;
  std::vector<std::pair<int64_t, int64_t>> extents_;
  Pooling pooling_;
  LevelRule<W> level_rule_;
  std::vector<Group> groups_;
  std::vector<Item> items_;
  int64_t pooled_ = 0;
};

}  // namespace doublehead::roi_align
