// Non-maximum suppression on a device, step by step: what memory it needs and what is launched in which order. It is the
// same for CUDA (nms.cu) and for the emulator of the tests, which bring their own way to launch and to sort.
//
// Nothing depends on the data but what the kernels do: the launches are as many as N and largest_group say, the memory is
// known before the first, and nothing is read back.
#pragma once

#include <algorithm>
#include <bit>
#include <utility>

#include "order.cuh"
#include "rounds.cuh"
#include "segments.cuh"

namespace doublehead::nms {

struct Plan {
  uint32_t images, count, total;  // B, N, B * N
  int64_t most;                   // max_output
  bool grouped, negative_is_padding;
  uint32_t capacity;         // of an image's table of groups
  uint32_t largest_segment;  // groups of so many boxes are decided by a block each
  uint32_t chunk, rounds;    // the others in so many rounds of so many boxes; 0 if there are no others
};

constexpr uint64_t kMostMaskBytes = 256 << 20;  // as long as that leaves an image one tile a round

// How many boxes of each image a round takes. Long chunks keep one block busy, many rounds are many launches.
inline uint32_t choose_chunk(uint64_t images, uint32_t count) {
  uint32_t chunk = std::clamp<uint32_t>(count / 8, 4096, kLargestChunk);
  while (chunk > kTile && images * chunk * chunk / 8 > kMostMaskBytes) chunk /= 2;
  return std::min(std::max<uint32_t>(chunk / kTile, 1) * kTile, count);
}

// C: float or double, what is computed in. largest_group: no group has more boxes; 0: unknown. Boxes of groups that have
// more all the same stay undecided, which is not kept.
template <typename C>
Plan make_plan(int64_t images, int64_t count, int64_t most, bool grouped, bool negative_is_padding,
               int64_t largest_group) {
  Plan plan{};
  plan.images = images, plan.count = count, plan.total = images * count;
  plan.most = most, plan.grouped = grouped, plan.negative_is_padding = negative_is_padding;
  plan.capacity = std::bit_ceil(2 * plan.count);
  // A block is enough for a small group where there are others beside it.
  plan.largest_segment = grouped ? std::min(kLargestSegment<C>, plan.count / 2) : 0;
  if (largest_group > 0 && largest_group <= plan.largest_segment) return plan;  // no rounds
  plan.chunk = choose_chunk(plan.images, plan.count);
  plan.rounds = (plan.count + plan.chunk - 1) / plan.chunk;
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
  Pair<uint32_t> order, members;
  uint32_t *numbers, *table, *starts, *segment_count, *list, *kept;
  Corners<C>* corners;
  uint8_t* state;
  uint64_t* mask;
  Progress* progress;
  std::byte* sort_space;
  size_t bytes = 0;

  // With base null, only `bytes` is of use.
  Workspace(const Plan& plan, size_t sort_bytes, std::byte* base) : base_(base) {
    const size_t total = plan.total, grouped = plan.grouped ? total : 0, images = plan.images;
    take(keys.data, total), take(keys.spare, total);
    take(order.data, total), take(order.spare, total);
    take(members.data, grouped), take(members.spare, grouped);
    take(numbers, grouped), take(starts, grouped), take(segment_count, 1);
    take(table, plan.grouped ? images * plan.capacity : 0);
    take(corners, total), take(state, total);
    take(list, images * plan.chunk), take(kept, images * plan.chunk);
    take(mask, images * plan.chunk * tiles_of(plan.chunk));
    take(progress, plan.rounds ? images : 0);
    take(sort_space, sort_bytes);
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

// keys and order, by image and rank.
template <typename S, typename C, typename Device>
void sort_by_score(Device& device, const Plan& plan, const Strided<S>& scores, Workspace<C>& space) {
  const uint32_t blocks = blocks_for(plan.total, kThreads);
  const int image_bits = std::bit_width(plan.images - 1);
  constexpr int score_bits = std::is_same_v<S, double> ? 64 : 32;
  device.launch(blocks, kThreads, make_keys<S>, scores, plan.count, plan.total, space.keys.data, space.order.data);
  device.sort(space.keys, space.order, plan.total, score_bits == 32 ? 32 + image_bits : 64);
  if (score_bits == 32 || plan.images == 1) return;
  device.launch(blocks, kThreads, make_image_keys, space.order.data, plan.count, plan.total, space.keys.data);
  device.sort(space.keys, space.order, plan.total, image_bits);
}

template <typename C, typename Device>
void sort_by_group(Device& device, const Plan& plan, const Strided<int64_t>& groups, Workspace<C>& space) {
  device.fill(space.table, 0xff, static_cast<size_t>(plan.images) * plan.capacity * sizeof(uint32_t));
  device.launch(blocks_for(plan.total, kThreads), kThreads, number_groups, groups, plan.negative_is_padding,
                space.order.data, plan.count, plan.total, space.table, plan.capacity, space.numbers, space.keys.data,
                space.members.data);
  const uint64_t largest_key = plan.images * (static_cast<uint64_t>(plan.capacity) + 1) - 1;
  device.sort(space.keys, space.members, plan.total, std::bit_width(largest_key));
}

template <typename C, typename Device>
void decide_segments(Device& device, const Plan& plan, const Rule<C>& rule, Workspace<C>& space) {
  const Segments segments{space.keys.data, space.members.data, space.starts, space.segment_count, plan.total};
  device.fill(space.segment_count, 0, sizeof(uint32_t));
  device.launch(blocks_for(plan.total, kThreads), kThreads, find_segments, segments, space.state,
                plan.largest_segment);
  device.launch(blocks_for(plan.total, 1, 1024), kSegmentThreads<C>, suppress_segments<C>, segments, space.corners, rule,
                plan.most, space.state);
}

template <typename C, typename Device>
void decide_rounds(Device& device, const Plan& plan, const Rule<C>& rule, Workspace<C>& space) {
  const Rounds<C> rounds{space.corners, plan.grouped ? space.numbers : nullptr, space.state, plan.images,
                         plan.count,    plan.chunk, plan.most, rule, space.list, space.kept, space.mask, space.progress};
  const uint32_t tiles = tiles_of(plan.chunk), row_blocks = blocks_for(plan.chunk, kStrikeRows);
  device.fill(space.progress, 0, plan.images * sizeof(Progress));
  for (uint32_t round = 0; round < plan.rounds; ++round) {
    device.launch(plan.images, 1024, list_undecided<C>, rounds);
    device.launch({plan.images, blocks_for(tiles * tiles, 1)}, kMaskThreads, fill_mask<C>, rounds);
    device.launch(plan.images, kResolveThreads, resolve<C>, rounds);
    if (round + 1 == plan.rounds) break;
    const uint32_t column_blocks = blocks_for(plan.count, kStrikeThreads, 256);
    device.launch({plan.images, column_blocks, row_blocks}, kStrikeThreads, strike<C>, rounds);
  }
}

// indices [B, most] and counts [B] from boxes [B, N, 4], scores [B, N] and, if the plan is grouped, groups [B, N]. Needs
// B, N and `most` above 0.
template <typename T, typename S, typename C, typename Device>
void suppress(Device& device, const Plan& plan, const Strided<T>& boxes, const Strided<S>& scores,
              const Strided<int64_t>& groups, double threshold, Workspace<C>& space, int64_t* indices,
              int64_t* counts) {
  const Rule<C> rule = make_rule<C>(threshold);
  sort_by_score(device, plan, scores, space);
  if (plan.grouped) sort_by_group(device, plan, groups, space);
  device.launch(blocks_for(plan.total, kThreads), kThreads, gather<T>, boxes, space.order.data,
                plan.grouped ? space.numbers : nullptr, plan.capacity, plan.count, plan.total, space.corners,
                space.state);
  if (plan.largest_segment > 0) decide_segments(device, plan, rule, space);
  if (plan.rounds > 0) decide_rounds(device, plan, rule, space);
  device.launch(plan.images, 1024, write_result, space.state, space.order.data, plan.count, plan.most, indices, counts);
}

}  // namespace doublehead::nms
