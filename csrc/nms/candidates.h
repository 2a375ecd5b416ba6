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

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors only pass through inlined functions

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

// 64 bytes of numbers as one value: one AVX-512, two AVX2 or four SSE or NEON registers.
template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct LanesOf<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;

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

    runs_.assign((count + kRun - 1) / kRun, Run{});
    for (int64_t k = 0; k < count; ++k) {
      const uint32_t slot = next_[list_[k]]++;
      runs_[slot / kRun].set(slot % kRun, box_at(k));
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
    if (runs_[slot / kRun].suppressed[slot % kRun]) return false;
    strike(slot, next_.data(), horizon_.data(), 0, runs());
    if (has_horizon_) kept_.push_back(slot);
    return true;
  }

  // What those kept since set_horizon strike from the horizon on, in runs [first, last).
  DOUBLEHEAD_INLINE void strike_beyond_horizon(int64_t first, int64_t last) {
    for (uint32_t slot : kept_) strike(slot, horizon_.data(), begin_.data() + 1, first, last);
  }

  int64_t runs() const { return runs_.size(); }

 private:
  static constexpr uint32_t kRun = 64 / sizeof(T);  // slots compared at a time

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

  static constexpr int64_t kSmall = 64;  // fewer boxes: one list
  static constexpr int kMostLevels = 16;
  static constexpr int64_t kMostStrips = 64;

  // Compares the box in `slot` with those in [from[l], to[l]) of every list l that may hold one it suppresses. Whole runs
  // are taken: what is struck in passing is suppressed as well, or decided already, or the padding at the end.
  DOUBLEHEAD_INLINE void strike(uint32_t slot, const uint32_t* from, const uint32_t* to, int64_t first, int64_t last) {
    const Box<T> box = runs_[slot / kRun].at(slot % kRun);
    if (!negative_ && !has_area(box)) return;  // its IoU with anything is 0 or NaN
    const Lanes<T> zeros{};
    const Box<Lanes<T>> all{zeros + box.x1, zeros + box.y1, zeros + box.x2, zeros + box.y2, zeros + box.area};
    const T centre = box.x1 + box.x2;  // twice the centre
    const T reach = (box.x2 - box.x1) * reach_ + std::abs(centre) * T(1e-6);
    const int first_level = level(box.area * smallest_), last_level = level(box.area * largest_);
    const int first_strip = strip(centre - reach), last_strip = strip(centre + reach);
    for (int l = first_level; l <= last_level; ++l) {
      for (int list = l * strips_ + first_strip; list <= l * strips_ + last_strip; ++list) {
        if (from[list] == to[list]) continue;
        const int64_t begin = std::max<int64_t>(from[list] / kRun, first);
        const int64_t end = std::min<int64_t>((to[list] - 1) / kRun + 1, last);
        for (int64_t r = begin; r < end; ++r) runs_[r].suppressed |= iou(all, runs_[r].boxes) > zeros + threshold_;
      }
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

  std::vector<uint16_t> list_;                    // of each candidate
  std::vector<Run> runs_;                         // list l has the slots [begin_[l], begin_[l + 1]), kRun to a run
  std::vector<uint32_t> begin_, next_, horizon_;  // of each list: its start, its first undecided slot, the horizon
  bool has_horizon_ = false;
  std::vector<uint32_t> kept_;  // slots of those kept since the horizon was set
};

}  // namespace doublehead::nms
