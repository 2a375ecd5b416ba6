// CUDA kernels before and after the suppression: keys to sort by, and the result.
#pragma once

#include "device.cuh"

namespace doublehead::nms {

constexpr uint32_t kFree = 0xffffffffu;

// A tensor [B, N] or [B, N, 4], of any strides.
template <typename T>
struct Strided {
  const T* data;
  int64_t image, item, coordinate;

  __device__ __forceinline__ const T* at(int64_t b, int64_t n) const { return data + b * image + n * item; }
};

template <typename T>
struct ComputeIn {
  using type = float;
};
template <>
struct ComputeIn<double> {
  using type = double;
};

// What the boxes of an image are told apart by. A table has `capacity` slots for each image, a power of two above N, and
// one more, for padding; flat(b, slot) is a slot's number among all.
struct Groups {
  uint32_t* owners;     // [B * (capacity + 1)] the index of a box of the slot's group, or kFree
  uint32_t* sizes;      // the same: how many boxes it has; from `gather` on, where a small group's members start, or kFree
  uint32_t* numbers;    // by rank: the slot; null if there are no groups
  uint32_t* places;     // by rank: the place among the members, in no order
  uint32_t* members;    // of the small groups, one behind the other: image * N + rank
  Segment* segments;    // the small groups, in no order
  uint32_t capacity, largest;  // boxes of a small group

  __device__ __forceinline__ uint64_t flat(uint64_t image, uint32_t slot) const { return image * (capacity + 1) + slot; }
};

// keys ascending: descending scores, of the same image if there is room for its number. order: b * N + n. And what is to
// be clear before the next kernels: the groups' tables, of `slots` slots, and `together`.
template <typename S>
__global__ void make_keys(Strided<S> scores, uint32_t count, uint32_t total, uint64_t* keys, uint32_t* order,
                          Groups groups, uint64_t slots, Together* together) {
  for (int64_t i = grid_thread(); i < total; i += grid_threads()) {
    const uint32_t image = i / count, n = i % count;
    const auto key = sort_key(static_cast<typename ComputeIn<S>::type>(*scores.at(image, n)));
    keys[i] = sizeof key == 4 ? uint64_t(image) << 32 | key : uint64_t(key);
    order[i] = i;
  }
  for (uint64_t i = grid_thread(); i < slots; i += grid_threads()) groups.owners[i] = kFree, groups.sizes[i] = 0;
  if (grid_thread() == 0) *together = {};
}

// Scores of 64 bits leave no room for the image: a second, stable sort follows, by these keys.
__global__ void make_image_keys(const uint32_t* order, uint32_t count, uint32_t total, uint64_t* keys) {
  for (int64_t i = grid_thread(); i < total; i += grid_threads()) keys[i] = order[i] / count;
}

// The slot of a box's group: groups are any integers, and each gets a slot of a hash table. Which slot may differ from
// run to run; that slots differ between groups is all that matters.
__device__ __forceinline__ uint32_t slot_of(const Groups& groups, const Strided<int64_t>& values, uint32_t i,
                                            uint32_t count, bool negative_is_padding) {
  const uint32_t image = i / count, capacity = groups.capacity;
  const int64_t group = *values.at(image, i % count);
  if (negative_is_padding && group < 0) return capacity;
  const uint64_t hash = static_cast<uint64_t>(group) * 0x9e3779b97f4a7c15u;
  uint32_t* mine = groups.owners + groups.flat(image, 0);
  for (uint32_t slot = hash >> 32 & (capacity - 1);; slot = (slot + 1) & (capacity - 1)) {
    uint32_t owner = mine[slot];
    if (owner == kFree) owner = atomicCAS(&mine[slot], kFree, i);
    if (owner == kFree || *values.at(image, owner % count) == group) return slot;
  }
}

// Numbers the groups of each image by their slots, and their members. Lanes that have the same group count them together.
__global__ void number_groups(Strided<int64_t> values, bool negative_is_padding, const uint32_t* order, uint32_t count,
                              uint32_t total, Groups groups) {
  const uint32_t lane = threadIdx.x % 32;
  for (int64_t first = grid_thread() - lane; first < total; first += grid_threads()) {
    const int64_t r = first + lane;
    const uint32_t i = r < total ? order[r] : 0;
    const uint32_t slot = r < total ? slot_of(groups, values, i, count, negative_is_padding) : groups.capacity;
    const bool counts = slot != groups.capacity;
    const uint64_t flat = groups.flat(i / count, slot);
    const uint32_t same = __match_any_sync(kAllLanes, counts ? flat : ~uint64_t(lane));
    const uint32_t leader = __ffs(same) - 1;
    uint32_t place = 0;
    if (counts && lane == leader) place = atomicAdd(&groups.sizes[flat], uint32_t(__popc(same)));
    place = __shfl_sync(kAllLanes, place, leader) + __popc(same & ((1u << lane) - 1));
    if (r < total) groups.numbers[r] = slot, groups.places[r] = place;
  }
}

template <typename C, typename T>
__device__ __forceinline__ Corners<C> load_corners(const Strided<T>& boxes, int64_t image, int64_t n) {
  const T* box = boxes.at(image, n);
  const int64_t step = boxes.coordinate;
  return {static_cast<C>(box[0]), static_cast<C>(box[step]), static_cast<C>(box[2 * step]),
          static_cast<C>(box[3 * step])};
}

// The boxes by rank, all undecided but padding; nothing is listed yet. With groups, small ones get a place for their
// members, and `together` knows of large ones.
template <typename T>
__global__ void gather(Strided<T> boxes, const uint32_t* order, uint32_t count, uint32_t total,
                       Corners<typename ComputeIn<T>::type>* corners, uint8_t* state, Progress* progress, Groups groups,
                       Together* together) {
  for (int64_t r = grid_thread(); r < total; r += grid_threads()) {
    const uint32_t image = r / count;
    corners[r] = load_corners<typename ComputeIn<T>::type>(boxes, image, order[r] % count);
    if (r % count == 0) progress[image] = {};
    const uint32_t slot = groups.numbers ? groups.numbers[r] : 0;
    const bool padding = groups.numbers && slot == groups.capacity;
    state[r] = padding ? kStruck : kUndecided;
    if (!groups.numbers || padding || groups.places[r] != 0) continue;
    const uint64_t flat = groups.flat(image, slot);
    const uint32_t size = groups.sizes[flat];
    uint32_t start = kFree;
    if (size <= groups.largest) {
      start = atomicAdd(&together->members, size);
      groups.segments[atomicAdd(&together->segments, 1u)] = {start, size};
    } else {
      together->large = 1;
    }
    groups.sizes[flat] = start;
  }
}

}  // namespace doublehead::nms
