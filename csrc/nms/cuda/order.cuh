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

// keys ascending: descending scores, of the same image if there is room for its number. order: b * N + n.
template <typename S>
__global__ void make_keys(Strided<S> scores, uint32_t count, uint32_t total, uint64_t* keys, uint32_t* order) {
  for (int64_t i = grid_thread(); i < total; i += grid_threads()) {
    const uint32_t image = i / count, n = i % count;
    const auto key = sort_key(static_cast<typename ComputeIn<S>::type>(*scores.at(image, n)));
    keys[i] = sizeof key == 4 ? uint64_t(image) << 32 | key : uint64_t(key);
    order[i] = i;
  }
}

// Scores of 64 bits leave no room for the image: a second, stable sort follows, by these keys.
__global__ void make_image_keys(const uint32_t* order, uint32_t count, uint32_t total, uint64_t* keys) {
  for (int64_t i = grid_thread(); i < total; i += grid_threads()) keys[i] = order[i] / count;
}

// Numbers the groups of each image, which are any integers, by their slots in a hash table. Which slot a group gets
// may differ from run to run; that slots differ between groups is all that matters. `table`: `capacity` entries for
// each image, a power of two above N, filled with kFree; an entry is the index of a box of the group that has it. The
// number behind the last, `capacity`, is padding.
__global__ void number_groups(Strided<int64_t> groups, bool negative_is_padding, const uint32_t* order, uint32_t count,
                              uint32_t total, uint32_t* table, uint32_t capacity, uint32_t* numbers, uint64_t* keys,
                              uint32_t* members) {
  for (int64_t r = grid_thread(); r < total; r += grid_threads()) {
    const uint32_t i = order[r], image = i / count;
    const int64_t group = *groups.at(image, i % count);
    uint32_t slot = capacity;
    if (!negative_is_padding || group >= 0) {
      const uint64_t hash = static_cast<uint64_t>(group) * 0x9e3779b97f4a7c15u;
      uint32_t* mine = table + static_cast<uint64_t>(image) * capacity;
      for (slot = hash >> 32 & (capacity - 1);; slot = (slot + 1) & (capacity - 1)) {
        uint32_t owner = mine[slot];
        if (owner == kFree) owner = atomicCAS(&mine[slot], kFree, i);
        if (owner == kFree || *groups.at(image, owner % count) == group) break;
      }
    }
    numbers[r] = slot;
    keys[r] = static_cast<uint64_t>(image) * (capacity + 1) + slot;
    members[r] = r;
  }
}

template <typename C, typename T>
__device__ __forceinline__ Corners<C> load_corners(const Strided<T>& boxes, int64_t image, int64_t n) {
  const T* box = boxes.at(image, n);
  const int64_t step = boxes.coordinate;
  return {static_cast<C>(box[0]), static_cast<C>(box[step]), static_cast<C>(box[2 * step]),
          static_cast<C>(box[3 * step])};
}

// The boxes by rank, all undecided but padding; nothing is listed yet. numbers: null, or the boxes' groups, `padding`
// among them.
template <typename T>
__global__ void gather(Strided<T> boxes, const uint32_t* order, const uint32_t* numbers, uint32_t padding,
                       uint32_t count, uint32_t total, Corners<typename ComputeIn<T>::type>* corners, uint8_t* state,
                       Progress* progress, Together* together) {
  for (int64_t r = grid_thread(); r < total; r += grid_threads()) {
    corners[r] = load_corners<typename ComputeIn<T>::type>(boxes, order[r] / count, order[r] % count);
    state[r] = numbers && numbers[r] == padding ? kStruck : kUndecided;
    if (r % count == 0) progress[r / count] = {};
    if (r == 0) *together = {};
  }
}

}  // namespace doublehead::nms
