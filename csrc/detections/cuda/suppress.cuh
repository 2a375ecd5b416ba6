// Suppression within each class of each image: the second kernel of the detections. No torch, no launch.
#pragma once

#include "boxes.cuh"
#include "marks.h"
#include "sort.cuh"

namespace doublehead::detections {

constexpr uint32_t kMostRois = 1024;  // candidates of a class, which a block sorts
constexpr uint32_t kClassThreads = 256;
constexpr uint32_t kTile = 64;  // boxes settled at a time
constexpr uint32_t kTests = 8;  // IoU tests that a thread does side by side

struct Suppression {
  const uint32_t* keys;  // [B, C - 1, column], of score_classes
  uint32_t foreground, column;
  uint32_t most;  // boxes of a class that may be kept, at most kMostRois
  nms::Rule<float> rule;
  uint64_t* kept;    // [B, C - 1, most]: key_of(score, RoI) in order, as many as
  uint32_t* counts;  // [B, C - 1]
};

// A class's candidates, in shared memory. Boxes are first numbered by RoI, then by rank; the kept ones move to the front.
struct Candidates {
  uint64_t keys[kMostRois];
  nms::SharedBoxes<float, kMostRois + kTests> boxes;
  alignas(8) uint16_t suppressors[kTile][4];  // of the boxes of a tile: a bit for each better one, 16 by each thread
  uint32_t struck[kClassThreads / 32];
  uint32_t listed, usable;
};

// Lists the class's candidates, in any order: a thread looks at four RoIs at a time.
__device__ __forceinline__ void list_candidates(const uint32_t* keys, uint32_t column, Candidates& all) {
  struct alignas(16) Keys {
    uint32_t at[4];
  };
  for (uint32_t first = 0; first < column; first += 4 * kClassThreads) {
    const uint32_t roi = first + 4 * threadIdx.x;
    Keys four = {{kNoScore, kNoScore, kNoScore, kNoScore}};
    if (roi < column) four = *reinterpret_cast<const Keys*>(keys + roi);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool listed = four.at[i] != kNoScore;
      const uint32_t slot = take_slot(&all.listed, listed);
      if (listed) all.keys[slot] = key_of(four.at[i], roi + i);
    }
  }
}

// Makes the boxes of the candidates; those that cannot be detections get no key.
template <typename D, typename P>
__device__ __forceinline__ void make_boxes(const Boxes<D, P>& boxes, int64_t image, int64_t label, Candidates& all) {
  uint32_t usable = 0;
  for (uint32_t i = threadIdx.x; i < all.listed; i += kClassThreads) {
    const uint32_t roi = static_cast<uint32_t>(all.keys[i]);
    Corners box;
    if (make_box_of(boxes, image, roi, label, box)) {
      all.boxes.corners[roi] = box;
      ++usable;
    } else {
      all.keys[i] = kNoKey;
    }
  }
  usable = __reduce_add_sync(0xffffffffu, usable);
  if (threadIdx.x % 32 == 0 && usable) atomicAdd(&all.usable, usable);
}

// Numbers the boxes by rank, once the keys are sorted.
__device__ __forceinline__ void order_boxes(uint32_t count, Candidates& all) {
  constexpr uint32_t kEach = kMostRois / kClassThreads;
  Corners mine[kEach];
#pragma unroll
  for (uint32_t i = 0; i < kEach; ++i) {
    const uint32_t rank = threadIdx.x + i * kClassThreads;
    if (rank < count) mine[i] = all.boxes.corners[static_cast<uint32_t>(all.keys[rank])];
  }
  __syncthreads();
#pragma unroll
  for (uint32_t i = 0; i < kEach; ++i) {
    const uint32_t rank = threadIdx.x + i * kClassThreads;
    if (rank < count) all.boxes.set(rank, mine[i]);
  }
  __syncthreads();
}

// Of 8 boxes from `first` on, a bit for each that suppresses `box`, but for those from `end` on.
__device__ __forceinline__ uint32_t suppressors_of(const nms::Box<float>& box, uint32_t first, uint32_t end,
                                                   const nms::Rule<float>& rule, const Candidates& all) {
  DOUBLEHEAD_MARK_BEGIN("detections 8 tests");
  const uint32_t bits = nms::suppressed_by<kTests>(rule, box, [&](uint32_t i) { return all.boxes[first + i]; });
  DOUBLEHEAD_MARK_END("detections 8 tests");
  return first + kTests <= end ? bits : first < end ? bits & ((1u << (end - first)) - 1) : 0;
}

// Decides on the boxes from `from` on, a tile of them: box b of it has four threads, b, b + 64, ...; each looks at a
// quarter of the `total` boxes kept before, which are at the front, and at a quarter of the tile. Returns a bit for each
// that is kept.
__device__ __forceinline__ uint64_t settle_tile(const nms::Box<float>& own, uint32_t from, uint32_t count,
                                                uint32_t total, const nms::Rule<float>& rule, Candidates& all) {
  const uint32_t b = threadIdx.x % kTile, quarter = threadIdx.x / kTile, warp = threadIdx.x / 32;
  uint32_t by_kept = 0, by_tile = 0;
  for (uint32_t first = quarter * kTests; first < total; first += 4 * kTests) {
    by_kept |= suppressors_of(own, first, total, rule, all);
  }
  const uint32_t begin = quarter * 16;
  if (begin < b) {  // else nothing better is there
    by_tile = suppressors_of(own, from + begin, from + b, rule, all) |
              suppressors_of(own, from + begin + kTests, from + b, rule, all) << kTests;
  }
  all.suppressors[b][quarter] = static_cast<uint16_t>(by_tile);
  const uint32_t struck = __ballot_sync(0xffffffffu, by_kept != 0);
  if (threadIdx.x % 32 == 0) all.struck[warp] = struck;
  __syncthreads();
  uint64_t open = count - from >= kTile ? ~uint64_t(0) : (uint64_t(1) << (count - from)) - 1;
  for (uint32_t w = 0; w < kClassThreads / 32; ++w) open &= ~(uint64_t(all.struck[w]) << (w % 2 * 32));
  uint64_t low, high;
  memcpy(&low, all.suppressors[threadIdx.x % 32], sizeof low);
  memcpy(&high, all.suppressors[threadIdx.x % 32 + 32], sizeof high);
  return nms::settle(low, high, open);
}

// A block for each class of each image: sorts its candidates and suppresses greedily, until `most` are kept.
template <typename D, typename P>
__global__ __launch_bounds__(kClassThreads) void suppress_class(Boxes<D, P> boxes, Suppression problem) {
  __shared__ Candidates all;
  const int64_t image = blockIdx.x / problem.foreground, label = blockIdx.x % problem.foreground + 1;
  if (threadIdx.x == 0) all.listed = all.usable = 0;
  __syncthreads();
  list_candidates(problem.keys + int64_t(blockIdx.x) * problem.column, problem.column, all);
  __syncthreads();
  make_boxes(boxes, image, label, all);
  __syncthreads();
  const uint32_t count = all.usable;
  uint32_t total = 0;
  if (count > 0) {
    sort_keys<kClassThreads>(all.keys, all.listed);
    order_boxes(count, all);
  }
  for (uint32_t from = 0; from < count && total < problem.most; from += kTile) {
    const uint32_t b = threadIdx.x % kTile;
    const nms::Box<float> own = all.boxes[from + b];
    const uint64_t kept = settle_tile(own, from, count, total, problem.rule, all);
    if (threadIdx.x < kTile && (kept >> b & 1)) {
      const uint32_t k = total + __popcll(kept & ((uint64_t(1) << b) - 1));
      all.boxes.set(k, {own.x1, own.y1, own.x2, own.y2});
      if (k < problem.most) problem.kept[int64_t(blockIdx.x) * problem.most + k] = all.keys[from + b];
    }
    total += __popcll(kept);
    __syncthreads();
  }
  if (threadIdx.x == 0) problem.counts[blockIdx.x] = total < problem.most ? total : problem.most;
}

}  // namespace doublehead::detections
