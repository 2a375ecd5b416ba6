// The kept boxes of one group, arranged so that a candidate is compared only with those that could suppress it.
//
// IoU(a, b) > t > 0 needs areas within a factor 1/t of each other, and centres near each other: with x-overlap o and
// widths v, w it is at most o / max(v, w), and twice the distance of the centres along x is at most v + w - 2o. So the
// kept boxes lie in lists by level (the binary exponent of the area) and strip (the place of the centre along x), and a
// candidate visits a few of them. All bounds carry slack for rounding, so this never changes a result. (Both bounds say
// nothing for t = 0 and all lists are visited; for t < 0, where even distant boxes suppress, there is one list.)
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common.h"
#include "nms.h"

namespace doublehead::nms {

constexpr int kLanes = 16;

// Up to kLanes boxes of one list, newest last. Free lanes hold NaN, which overlaps nothing.
template <typename T>
struct Tile {
  T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
  int32_t next;   // the tile before it in the list, -1: none
  int32_t used;   // lanes
  int32_t round;  // when the last box came in
};

// Whether any box of the tile might suppress `box`; `low` is a little below the threshold. No division: that is left to
// the exact rule, for the few tiles that pass. The comparison with 0 matters where union * low underflows.
template <typename T>
DOUBLEHEAD_INLINE bool might_suppress(const Tile<T>& tile, const Box<T>& box, T low) {
  int any = 0;
  for (int i = 0; i < kLanes; ++i) {
    const Box<T> other{tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i], tile.area[i]};
    const T common = intersection(other, box);
    const T joint = other.area + box.area - common;
    any |= (common >= joint * low) & (common > T(0));
  }
  return any;
}

template <typename T>
inline bool does_suppress(const Tile<T>& tile, const Box<T>& box, double threshold) {
  for (int i = 0; i < tile.used; ++i) {
    const Box<T> other{tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i], tile.area[i]};
    if (suppresses(other, box, threshold)) return true;
  }
  return false;
}

template <typename T>
class Buckets {
 public:
  explicit Buckets(double threshold) : threshold_(threshold) {
    const double low = threshold * (1 - 1e-5);
    low_ = static_cast<T>(threshold < 1e-30 ? 0 : low);
    smallest_ = static_cast<T>(low);
    largest_ = static_cast<T>(1 / low);
    reach_ = static_cast<T>(1.001 * std::max(2 - 2 * low, 1 / low - 1));
  }

  // Whether a box can neither suppress nor be suppressed: no area, or one that is NaN or infinite (the IoU is 0 or NaN).
  bool inert(const Box<T>& box) const {
    return threshold_ >= 0 && !(box.area > T(0) && box.area <= std::numeric_limits<T>::max());
  }

  // Forgets all boxes and lays out the lists for `count` boxes, box(0) .. box(count - 1).
  template <typename BoxAt>
  void reset(int64_t count, const BoxAt& box_at) {
    tiles_.clear();
    levels_ = strips_ = 1;
    if (count >= kSmall && threshold_ > 0) plan(count, box_at);
    heads_.assign(levels_ * strips_, -1);
  }

  void insert(const Box<T>& box, int32_t round) {
    int32_t& head = heads_[level(box.area) * strips_ + strip(box.x1 + box.x2)];
    if (head < 0 || tiles_[head].used == kLanes) {
      Tile<T>& tile = tiles_.emplace_back();
      std::fill_n(tile.x1, 5 * kLanes, std::numeric_limits<T>::quiet_NaN());
      tile.next = head;
      tile.used = 0;
      head = static_cast<int32_t>(tiles_.size()) - 1;
    }
    Tile<T>& tile = tiles_[head];
    const int lane = tile.used++;
    tile.x1[lane] = box.x1;
    tile.y1[lane] = box.y1;
    tile.x2[lane] = box.x2;
    tile.y2[lane] = box.y2;
    tile.area[lane] = box.area;
    tile.round = round;
  }

  // Whether a box inserted in round `since` or later suppresses `box`.
  DOUBLEHEAD_INLINE bool any_suppresses(const Box<T>& box, int32_t since) const {
    const T centre = box.x1 + box.x2;  // twice the centre
    const T reach = (box.x2 - box.x1) * reach_ + std::abs(centre) * T(1e-6);
    const int first_level = level(box.area * smallest_), last_level = level(box.area * largest_);
    const int first_strip = strip(centre - reach), last_strip = strip(centre + reach);
    for (int l = first_level; l <= last_level; ++l) {
      for (int s = first_strip; s <= last_strip; ++s) {
        for (int32_t t = heads_[l * strips_ + s]; t >= 0 && tiles_[t].round >= since; t = tiles_[t].next) {
          const Tile<T>& tile = tiles_[t];
          if ((threshold_ < 0 || might_suppress(tile, box, low_)) && does_suppress(tile, box, threshold_)) return true;
        }
      }
    }
    return false;
  }

 private:
  static constexpr int64_t kSmall = 64;     // fewer boxes: one list
  static constexpr int kMostLevels = 16;
  static constexpr int64_t kMostStrips = 32;

  // Levels and strips as the boxes need them. Strips need areas large enough that an IoU is precise.
  template <typename BoxAt>
  void plan(int64_t count, const BoxAt& box_at) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    T least = infinity, most = 0, left = infinity, right = -infinity;
    for (int64_t i = 0; i < count; ++i) {
      const Box<T> box = box_at(i);
      if (inert(box)) continue;
      least = std::min(least, box.area);
      most = std::max(most, box.area);
      left = std::min(left, box.x1 + box.x2);
      right = std::max(right, box.x1 + box.x2);
    }
    if (!(most > 0)) return;
    levels_ = std::min(exponent(most) - exponent(least) + 1, kMostLevels);
    base_ = exponent(most) - levels_ + 1;
    if (least < T(1e-30) || !(right - left <= std::numeric_limits<T>::max())) return;
    strips_ = static_cast<int>(std::clamp<int64_t>(count / 512, 1, kMostStrips));
    left_ = left;
    per_strip_ = right > left ? strips_ / (right - left) : T(0);
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

  double threshold_;
  T low_, smallest_, largest_, reach_;
  int levels_ = 1, strips_ = 1, base_ = 0;
  T left_ = 0, per_strip_ = 0;
  std::vector<Tile<T>> tiles_;
  std::vector<int32_t> heads_;  // the newest tile of each list, -1: empty
};

}  // namespace doublehead::nms
