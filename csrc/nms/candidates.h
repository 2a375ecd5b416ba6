// The boxes of one group, arranged so that a kept box is compared only with those it could suppress.
//
// IoU(a, b) > t > 0 needs areas within a factor 1/t of each other, and near centres: with x-overlap o and widths v, w it
// is at most o / max(v, w), and twice the distance of the centres along x is at most v + w - 2o. So the boxes lie in
// lists by level (binary exponent of the area) and strip (place of the centre along x), each list in the order of the
// scores, and a kept box strikes the rest of a few lists. The bounds carry slack for rounding: they change no result.
// (At t = 0 they say nothing, and all lists are struck. At t < 0 even distant boxes suppress, and there is one list.)
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common.h"
#include "nms.h"

namespace doublehead::nms {

// What the lists are laid out by: the range of areas, and of twice the x-centres, of an image's boxes.
template <typename T>
struct Extent {
  T least = std::numeric_limits<T>::infinity(), most = 0;
  T left = std::numeric_limits<T>::infinity(), right = -std::numeric_limits<T>::infinity();

  void add(const Box<T>& box) {
    if (!has_area(box)) return;
    least = std::min(least, box.area);
    most = std::max(most, box.area);
    left = std::min(left, box.x1 + box.x2);
    right = std::max(right, box.x1 + box.x2);
  }
};

template <typename T>
class Candidates {
 public:
  Candidates(double threshold, const Extent<T>& extent)
      : threshold_(round_down<T>(threshold)), negative_(threshold < 0), extent_(extent) {
    const double low = threshold > 0 ? threshold * (1 - 1e-5) : 0.0;
    smallest_ = static_cast<T>(low);
    largest_ = static_cast<T>(1 / low);
    reach_ = static_cast<T>(1.001 * std::max(2 - 2 * low, 1 / low - 1));
  }

  // Takes the boxes box_at(0) .. box_at(count - 1), which come by descending score.
  template <typename BoxAt>
  void reset(int64_t count, const BoxAt& box_at) {
    plan(count);
    has_horizon_ = false;
    list_.resize(count);
    begin_.assign(levels_ * strips_ + 1, 0);
    for (int64_t k = 0; k < count; ++k) {
      list_[k] = list_of(box_at(k));
      ++begin_[list_[k] + 1];
    }
    for (size_t l = 1; l < begin_.size(); ++l) begin_[l] += begin_[l - 1];
    next_.assign(begin_.begin(), begin_.end() - 1);
    horizon_.assign(begin_.begin() + 1, begin_.end());

    const int64_t slots = (count + kRun - 1) / kRun * kRun;
    for (auto* column : {&x1_, &y1_, &x2_, &y2_, &area_}) column->resize(slots);
    suppressed_.assign(slots, 0);
    for (int64_t k = 0; k < count; ++k) {
      const Box<T> box = box_at(k);
      const uint32_t slot = next_[list_[k]]++;
      x1_[slot] = box.x1;
      y1_[slot] = box.y1;
      x2_[slot] = box.x2;
      y2_[slot] = box.y2;
      area_[slot] = box.area;
    }
    next_.assign(begin_.begin(), begin_.end() - 1);
  }

  // From here on, deciding strikes only candidates before `last`; `first` is the first undecided one.
  void set_horizon(int64_t first, int64_t last) {
    has_horizon_ = true;
    kept_.clear();
    std::copy(next_.begin(), next_.end(), horizon_.begin());
    for (int64_t k = first; k < last; ++k) ++horizon_[list_[k]];
  }

  // Decides on candidate k, all better ones being decided: it is kept unless struck, and then strikes the others.
  DOUBLEHEAD_INLINE bool decide(int64_t k) {
    const uint32_t slot = next_[list_[k]]++;
    if (suppressed_[slot]) return false;
    strike(slot, next_.data(), horizon_.data(), 0, slots());
    if (has_horizon_) kept_.push_back(slot);
    return true;
  }

  // What those kept since set_horizon strike from the horizon on, in slots [first, last), which are multiples of kRun.
  DOUBLEHEAD_INLINE void strike_beyond_horizon(int64_t first, int64_t last) {
    for (uint32_t slot : kept_) strike(slot, horizon_.data(), begin_.data() + 1, first, last);
  }

  int64_t slots() const { return suppressed_.size(); }

  static constexpr int64_t kRun = 16;  // slots compared at a time

 private:
  using Flag = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;  // as wide as T, for the vectors' sake

  static constexpr int64_t kSmall = 64;  // fewer boxes: one list
  static constexpr int kMostLevels = 16;
  static constexpr int64_t kMostStrips = 64;

  // Compares the box in `slot` with those in [from[l], to[l]) of every list l that may hold one it suppresses. Whole runs
  // are taken: what is struck in passing is suppressed as well, or decided already, or the padding at the end.
  DOUBLEHEAD_INLINE void strike(uint32_t slot, const uint32_t* from, const uint32_t* to, int64_t first, int64_t last) {
    const Box<T> box{x1_[slot], y1_[slot], x2_[slot], y2_[slot], area_[slot]};
    if (!negative_ && !has_area(box)) return;  // its IoU with anything is 0 or NaN
    const T centre = box.x1 + box.x2;          // twice the centre
    const T reach = (box.x2 - box.x1) * reach_ + std::abs(centre) * T(1e-6);
    const int first_level = level(box.area * smallest_), last_level = level(box.area * largest_);
    const int first_strip = strip(centre - reach), last_strip = strip(centre + reach);
    for (int l = first_level; l <= last_level; ++l) {
      for (int list = l * strips_ + first_strip; list <= l * strips_ + last_strip; ++list) {
        if (from[list] == to[list]) continue;
        const int64_t begin = std::max<int64_t>(from[list] / kRun * kRun, first);
        const int64_t end = std::min<int64_t>((to[list] + kRun - 1) / kRun * kRun, last);
        if (begin < end) strike_slots(box, begin, end - begin);
      }
    }
  }

  DOUBLEHEAD_INLINE void strike_slots(const Box<T>& box, int64_t first, int64_t count) {
    const T* DOUBLEHEAD_RESTRICT x1 = x1_.data() + first;
    const T* DOUBLEHEAD_RESTRICT y1 = y1_.data() + first;
    const T* DOUBLEHEAD_RESTRICT x2 = x2_.data() + first;
    const T* DOUBLEHEAD_RESTRICT y2 = y2_.data() + first;
    const T* DOUBLEHEAD_RESTRICT area = area_.data() + first;
    Flag* DOUBLEHEAD_RESTRICT suppressed = suppressed_.data() + first;
    const T threshold = threshold_;
    count &= -kRun;  // tells the compiler that no rest is left
    for (int64_t i = 0; i < count; ++i) {
      suppressed[i] |= iou(box, Box<T>{x1[i], y1[i], x2[i], y2[i], area[i]}) > threshold;
    }
  }

  // Levels and strips as the boxes need them. Strips need areas large enough that an IoU is precise.
  void plan(int64_t count) {
    levels_ = strips_ = 1;
    if (count < kSmall || negative_ || !(extent_.most > 0)) return;
    levels_ = std::min(exponent(extent_.most) - exponent(extent_.least) + 1, kMostLevels);
    base_ = exponent(extent_.most) - levels_ + 1;
    const T range = extent_.right - extent_.left;
    if (extent_.least < T(1e-30) || !(range > 0 && range <= std::numeric_limits<T>::max())) return;
    strips_ = static_cast<int>(std::clamp<int64_t>(count / 512, 1, kMostStrips));
    per_strip_ = strips_ / range;
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
    return static_cast<int>(std::clamp((centre - extent_.left) * per_strip_, T(0), T(strips_ - 1)));
  }

  int list_of(const Box<T>& box) const {
    return has_area(box) ? level(box.area) * strips_ + strip(box.x1 + box.x2) : 0;
  }

  T threshold_;
  bool negative_;
  Extent<T> extent_;
  T smallest_, largest_, reach_, per_strip_ = 0;
  int levels_ = 1, strips_ = 1, base_ = 0;

  std::vector<uint16_t> list_;               // of each candidate
  std::vector<T> x1_, y1_, x2_, y2_, area_;  // of each slot; list l has the slots [begin_[l], begin_[l + 1])
  std::vector<Flag> suppressed_;
  std::vector<uint32_t> begin_, next_, horizon_;  // of each list: its start, its first undecided slot, the horizon
  bool has_horizon_ = false;
  std::vector<uint32_t> kept_;  // slots of those kept since the horizon was set
};

}  // namespace doublehead::nms
