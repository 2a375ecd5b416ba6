// The boxes of one group, arranged so that a kept box is compared only with those it could suppress.
//
// IoU(a, b) > t > 0 needs areas within a factor 1/t of each other, and near centres: with x-overlap o and widths v, w it
// is at most o / max(v, w), and twice the distance of the centres along x is at most v + w - 2o. So the boxes are ordered
// by level (binary exponent of the area), and in a level by strip (place of the centre along x), and a kept box strikes
// one stretch of each of a few levels. The bounds carry slack for rounding: they change no result. (At t = 0 they say
// nothing, and all boxes are struck. At t < 0 even distant boxes suppress, and there is one strip of one level.)
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common.h"
#include "lanes.h"
#include "../nms.h"

namespace doublehead::nms {

template <typename T>
class Candidates {
 public:
  explicit Candidates(double threshold) : threshold_(round_down<T>(threshold)), negative_(threshold < 0) {
    const double low = threshold > 0 ? threshold * (1 - 1e-5) : 0.0;
    smallest_ = static_cast<T>(low);
    largest_ = static_cast<T>(1 / low);
    reach_ = static_cast<T>(1.001 * std::max(2 - 2 * low, 1 / low - 1));
  }

  // Takes the boxes box_at(0) .. box_at(count - 1).
  template <typename BoxAt>
  void reset(int64_t count, const BoxAt& box_at) {
    plan(count, box_at);
    slot_.resize(count);
    begin_.assign(levels_ * strips_ + 1, 0);
    for (int64_t k = 0; k < count; ++k) {
      slot_[k] = cell_of(box_at(k));
      ++begin_[slot_[k] + 1];
    }
    for (size_t cell = 1; cell < begin_.size(); ++cell) begin_[cell] += begin_[cell - 1];
    runs_.assign((count + kRun - 1) / kRun, Run{});
    for (int64_t k = 0; k < count; ++k) {
      slot_[k] = begin_[slot_[k]]++;
      runs_[slot_[k] / kRun].set(slot_[k] % kRun, box_at(k));
    }
    // Each cell's begin has become its end, the next one's begin.
    std::copy_backward(begin_.begin(), begin_.end() - 1, begin_.end());
    begin_[0] = 0;
  }

  bool suppressed(int64_t k) const { return runs_[slot_[k] / kRun].suppressed[slot_[k] % kRun]; }

  // Marks all boxes in runs [first, last) that box k suppresses; itself too, and some that have been decided on before.
  DOUBLEHEAD_INLINE void strike(int64_t k, int64_t first, int64_t last) {
    const Box<T> box = runs_[slot_[k] / kRun].at(slot_[k] % kRun);
    if (!negative_ && !has_area(box)) return;  // its IoU with anything is 0 or NaN
    const Lanes<T> zeros{}, threshold = zeros + threshold_;
    const Box<Lanes<T>> all{zeros + box.x1, zeros + box.y1, zeros + box.x2, zeros + box.y2, zeros + box.area};
    const T centre = box.x1 + box.x2;  // twice the centre
    const T reach = (box.x2 - box.x1) * reach_ + std::abs(centre) * T(1e-6);
    if (!negative_ && !(reach >= 0)) return;  // inverted along both axes: it overlaps nothing
    const int first_strip = strip(centre - reach), last_strip = strip(centre + reach);
    const int first_level = level(box.area * smallest_), last_level = level(box.area * largest_);
    for (int l = first_level; l <= last_level; ++l) {
      const int64_t begin = begin_[l * strips_ + first_strip], end = begin_[l * strips_ + last_strip + 1];
      if (begin == end) continue;
      Run* run = runs_.data() + std::max<int64_t>(begin / kRun, first);
      Run* const stop = runs_.data() + std::min<int64_t>((end - 1) / kRun + 1, last);
      for (; run < stop; ++run) run->suppressed |= iou(all, run->boxes) > threshold;
    }
  }

  int64_t runs() const { return runs_.size(); }

 private:
  static constexpr uint32_t kRun = kLanes<T>;  // slots compared at a time

  // Without alignas, code for AVX-512 would expect more of a vector than code for plain x86-64 grants.
  struct alignas(64) Run {
    Box<Lanes<T>> boxes;
    decltype(Lanes<T>{} > Lanes<T>{}) suppressed;

    void set(int lane, const Box<T>& box) {
      boxes.x1[lane] = box.x1;
      boxes.y1[lane] = box.y1;
      boxes.x2[lane] = box.x2;
      boxes.y2[lane] = box.y2;
      boxes.area[lane] = box.area;
    }

    Box<T> at(int lane) const {
      return {boxes.x1[lane], boxes.y1[lane], boxes.x2[lane], boxes.y2[lane], boxes.area[lane]};
    }
  };

  static constexpr int64_t kSmall = 64;  // fewer boxes: one cell
  static constexpr int kMostLevels = 16;
  static constexpr int64_t kPerStrip = 16, kMostStrips = 512;

  template <typename BoxAt>
  void plan(int64_t count, const BoxAt& box_at) {
    levels_ = strips_ = 1;
    if (count < kSmall || negative_) return;
    constexpr T infinity = std::numeric_limits<T>::infinity();
    T least = infinity, most = 0, left = infinity, right = -infinity;
    for (int64_t k = 0; k < count; ++k) {
      const Box<T> box = box_at(k);
      if (!has_area(box)) continue;
      least = std::min(least, box.area);
      most = std::max(most, box.area);
      left = std::min(left, box.x1 + box.x2);
      right = std::max(right, box.x1 + box.x2);
    }
    if (!(most > 0)) return;
    levels_ = std::min(exponent(most) - exponent(least) + 1, kMostLevels);
    base_ = exponent(most) - levels_ + 1;
    // Strips need areas large enough that an IoU is precise.
    if (least < T(1e-30) || !(right > left && right - left <= std::numeric_limits<T>::max())) return;
    strips_ = static_cast<int>(std::min(count / kPerStrip, kMostStrips));
    left_ = left;
    per_strip_ = strips_ / (right - left);
  }

  static int exponent(T area) {
    if constexpr (std::is_same_v<T, float>) {
      return static_cast<int>(std::bit_cast<uint32_t>(area) >> 23);
    } else {
      return static_cast<int>(std::bit_cast<uint64_t>(area) >> 52);
    }
  }

  int level(T area) const { return levels_ == 1 ? 0 : std::clamp(exponent(area) - base_, 0, levels_ - 1); }

  // Monotone in `centre`, which may be infinite.
  int strip(T centre) const {
    if (strips_ == 1) return 0;
    return static_cast<int>(std::clamp((centre - left_) * per_strip_, T(0), T(strips_ - 1)));
  }

  int cell_of(const Box<T>& box) const {
    return has_area(box) ? level(box.area) * strips_ + strip(box.x1 + box.x2) : 0;
  }

  T threshold_;
  bool negative_;
  T smallest_, largest_, reach_;
  int levels_ = 1, strips_ = 1, base_ = 0;
  T left_ = 0, per_strip_ = 0;

  std::vector<Run> runs_;        // the boxes, by cell; a cell is a strip of a level
  std::vector<uint32_t> slot_;   // where each box lies
  std::vector<uint32_t> begin_;  // the first slot of each cell, and the end behind the last
};

}  // namespace doublehead::nms
