// Non-maximum suppression on a device, step by step: what memory it needs and what is launched in which order. It is the
// same for CUDA (nms.cu) and for the emulator of the tests, which bring their own way to launch and to sort.
//
// Few boxes take two launches: one that orders them, one that decides. Nothing depends on the data but what the kernels do:
// the launches are as many as N and largest_group say, the memory is known before the first, and nothing is read back.
#pragma once

#include <algorithm>
#include <bit>
#include <utility>

#include "decide.cuh"
#include "order.cuh"
#include "rank.cuh"

namespace doublehead::nms {

struct Plan {
  uint32_t images, count, total;  // B, N, B * N
  int64_t most;                   // max_output
  bool grouped, negative_is_padding;
  bool ranked;               // whether rank_boxes orders the boxes, and all are decided in one round
  uint32_t capacity;         // of an image's table of groups
  uint32_t largest_segment;  // groups of so many boxes are decided by a block each
  uint32_t chunk;            // the others in rounds of so many boxes; 0 if there are no others
};

constexpr uint64_t kMostMaskBytes = 256 << 20;  // as long as that leaves an image one tile a round
constexpr uint64_t kMostRankedPairs = 1 << 26;  // B N^2: beyond, sorting takes less time than all comparisons

constexpr uint32_t kSliceRanks = 1024;  // a block lists so many ranks, or more

// How many boxes of each image a round takes. Long chunks compare many boxes that others strike, many rounds wait often.
inline uint32_t choose_chunk(uint64_t images, uint32_t count) {
  uint32_t chunk = std::clamp<uint32_t>(count / 8, 4096, kLargestChunk);
  while (chunk > kTile && images * chunk * chunk / 8 > kMostMaskBytes) chunk /= 2;
  return std::min(std::max<uint32_t>(chunk / kTile, 1) * kTile, count);
}

// C: float or double, what is computed in. largest_group: no group has more boxes; 0: unknown. Boxes of groups that have
// more all the same may stay undecided, which is not kept. few: whether few boxes go the shorter way.
template <typename C>
Plan make_plan(int64_t images, int64_t count, int64_t most, bool grouped, bool negative_is_padding,
               int64_t largest_group, bool few = true) {
  Plan plan{};
  plan.images = images, plan.count = count, plan.total = images * count;
  plan.most = most, plan.grouped = grouped, plan.negative_is_padding = negative_is_padding;
  plan.ranked = few && plan.count <= kLargestChunk && uint64_t(plan.total) * plan.count <= kMostRankedPairs;
  if (plan.ranked) {
    plan.chunk = plan.count;
    return plan;
  }
  plan.capacity = std::bit_ceil(2 * plan.count);
  // A block is enough for a small group where there are others beside it.
  plan.largest_segment = grouped ? std::min(kLargestSegment<C>, plan.count / 2) : 0;
  if (largest_group > 0 && largest_group <= plan.largest_segment) return plan;  // no rounds
  plan.chunk = choose_chunk(plan.images, plan.count);
  return plan;
}

// An array to be sorted, and one as long beside it.
template <typename T>
struct Pair {
  T *data, *spare;
};

// All that is needed on the device, in one piece of memory. C: float or double.
template <typename C>
struct Workspace {
  Pair<uint64_t> keys;
  Pair<uint32_t> order;
  Groups groups{};
  uint32_t *list, *counts;
  Corners<C>* corners;
  uint8_t* state;
  uint64_t* mask;
  Settled* settled;
  Progress* progress;
  Together* together;
  std::byte* sort_space;
  uint64_t slots;   // of the groups' tables
  uint32_t slices;  // of an image's ranks, for `decide`
  size_t bytes = 0;

  // blocks: as many as can work together. With base null, only `bytes` is of use.
  Workspace(const Plan& plan, uint32_t blocks, size_t sort_bytes, std::byte* base) : base_(base) {
    const size_t total = plan.total, images = plan.images, words = images * tiles_of(plan.chunk);
    const size_t sorted = plan.ranked ? 0 : total;
    slots = plan.grouped && !plan.ranked ? images * (plan.capacity + size_t(1)) : 0;
    slices = std::clamp<uint32_t>(blocks / plan.images, 1, (plan.count + kSliceRanks - 1) / kSliceRanks);
    groups.capacity = plan.capacity, groups.largest = plan.largest_segment;
    take(keys.data, sorted), take(keys.spare, sorted);
    take(order.data, total), take(order.spare, sorted);
    take(groups.owners, slots), take(groups.sizes, slots), take(groups.numbers, plan.grouped ? total : 0);
    if (!plan.grouped) groups.numbers = nullptr;
    take(corners, total), take(state, total);
    take(list, images * plan.chunk), take(mask, words * plan.chunk), take(settled, words);
    take(counts, images * slices), take(progress, images), take(together, 1);
    take(sort_space, plan.ranked ? 0 : sort_bytes);
  }

 private:
  template <typename T>
  void take(T*& array, size_t count) {
    array = base_ ? reinterpret_cast<T*>(base_ + bytes) : nullptr;
    bytes += (count * sizeof(T) + 255) / 256 * 256;
  }

  std::byte* base_;
};

inline uint32_t blocks_for(uint64_t items, uint32_t threads, uint64_t most = 2048) {
  return static_cast<uint32_t>(std::clamp<uint64_t>((items + threads - 1) / threads, 1, most));
}

constexpr uint32_t kThreads = 256;  // of the kernels that go over all boxes

// order, by image and rank. All that is to be clear is cleared.
template <typename S, typename C, typename Device>
void sort_by_score(Device& device, const Plan& plan, const Strided<S>& scores, Workspace<C>& space) {
  const uint32_t blocks = blocks_for(plan.total, kThreads);
  const int image_bits = std::bit_width(plan.images - 1);
  constexpr int score_bits = std::is_same_v<S, double> ? 64 : 32;
  device.launch(blocks, kThreads, make_keys<S>, scores, plan.count, plan.total, space.keys.data, space.order.data,
                space.groups, space.slots, space.together);
  device.sort(space.keys, space.order, plan.total, score_bits == 32 ? 32 + image_bits : 64);
  if (score_bits == 32 || plan.images == 1) return;
  device.launch(blocks, kThreads, make_image_keys, space.order.data, plan.count, plan.total, space.keys.data);
  device.sort(space.keys, space.order, plan.total, image_bits);
}

// Boxes and their states by rank.
template <typename T, typename S, typename C, typename Device>
void put_in_order(Device& device, const Plan& plan, const Strided<T>& boxes, const Strided<S>& scores,
                  const Strided<int64_t>& groups, Workspace<C>& space) {
  if (plan.ranked) {
    const Ranked<C> ranked{space.order.data, space.corners, space.state, space.groups.numbers, space.list};
    device.launch(plan.images * ((plan.count + kRankRows - 1) / kRankRows), kRankThreads, rank_boxes<T, S>, boxes, scores,
                  groups, plan.negative_is_padding, plan.count, ranked, space.progress, space.together);
    return;
  }
  const uint32_t blocks = blocks_for(plan.total, kThreads);
  sort_by_score(device, plan, scores, space);
  if (plan.grouped) {
    space.groups.segments = reinterpret_cast<Segment*>(space.keys.data);  // what sorting needed is free
    space.groups.places = reinterpret_cast<uint32_t*>(space.keys.spare);
    space.groups.members = space.order.spare;
    device.launch(blocks, kThreads, number_groups, groups, plan.negative_is_padding, space.order.data, plan.count,
                  plan.total, space.groups);
  }
  device.launch(blocks, kThreads, gather<T>, boxes, space.order.data, plan.count, plan.total, space.corners, space.state,
                space.progress, space.groups, space.together);
}

// As many blocks as have something to do at the same time.
inline uint32_t blocks_of_decision(const Plan& plan, uint32_t most) {
  const uint64_t halves = 2 * tiles_of(plan.chunk), pairs = plan.images * halves * (halves + 1) / 2;
  const uint64_t tiles = plan.images * tiles_of(plan.chunk), segments = plan.largest_segment > 0 ? plan.total / 64 : 0;
  const uint64_t slices = plan.total / kSliceRanks;
  return static_cast<uint32_t>(std::clamp<uint64_t>(std::max({pairs / 32, tiles, slices, segments}), 1, most));
}

// indices [B, most] and counts [B] from boxes [B, N, 4], scores [B, N] and, if the plan is grouped, groups [B, N]. Needs
// B, N and `most` above 0. blocks: those for which `space` was made.
template <typename T, typename S, typename C, typename Device>
void suppress(Device& device, const Plan& plan, const Strided<T>& boxes, const Strided<S>& scores,
              const Strided<int64_t>& groups, double threshold, uint32_t blocks, Workspace<C>& space, int64_t* indices,
              int64_t* counts) {
  const Rule<C> rule = make_rule<C>(threshold);
  put_in_order(device, plan, boxes, scores, groups, space);
  const Decision<C> decision{
      space.corners, space.order.data, space.groups.numbers, space.groups, space.state, plan.images, plan.count, plan.chunk,
      space.slices, plan.ranked, plan.most, rule, space.list, space.mask, space.settled, space.counts,
      space.progress, space.together, indices, counts};
  device.template launch_together<decide<C>>(blocks, kDecideThreads<C>, decision);
}

}  // namespace doublehead::nms
