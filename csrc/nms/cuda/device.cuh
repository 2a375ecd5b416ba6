// What the CUDA kernels of non-maximum suppression share.
//
// An image's boxes are numbered by rank: their position by descending score, ties by index. All arrays "by rank" hold the
// images one after the other, N boxes each.
#pragma once

#include <cstdint>

#include "rule.cuh"

namespace doublehead::nms {

constexpr int kTile = 64;  // boxes settled at a time, and the bits of a word of the mask
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr uint32_t tiles_of(uint32_t boxes) { return (boxes + kTile - 1) / kTile; }

enum State : uint8_t { kUndecided, kStruck, kKept };

template <typename T>
struct alignas(sizeof(T) == 4 ? 16 : 32) Corners {
  T x1, y1, x2, y2;
};

template <typename T>
__device__ __forceinline__ Box<T> measure(const Corners<T>& c) {
  return measure(c.x1, c.y1, c.x2, c.y2);
}

// Boxes in shared memory, as Rule wants them.
template <typename T, int kCount>
struct SharedBoxes {
  Corners<T> corners[kCount];
  T areas[kCount];

  __device__ __forceinline__ void set(int i, const Corners<T>& c) {
    corners[i] = c;
    areas[i] = measure(c).area;
  }

  __device__ __forceinline__ Box<T> operator[](int i) const {
    const Corners<T> c = corners[i];
    return {c.x1, c.y1, c.x2, c.y2, areas[i]};
  }
};

// Which index this thread of the whole grid has, and how many threads there are: for loops over all items.
__device__ __forceinline__ int64_t grid_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return int64_t(gridDim.x) * blockDim.x; }

__device__ __forceinline__ uint64_t ballot64(bool low, bool high) {
  const uint64_t upper = __ballot_sync(kAllLanes, high);
  return upper << 32 | __ballot_sync(kAllLanes, low);
}

// Of 64 boxes of descending score, which a warp holds, those that greedy suppression keeps. Lane l has the boxes l and
// l + 32, of each the word of better boxes that suppress it. `open`: those that nothing suppressed before. A round
// keeps all boxes that no open one could suppress any more, and ends the turn of those that a kept one suppresses; the
// rounds are as many as the longest chain of suppressions.
__device__ __forceinline__ uint64_t settle(uint64_t low, uint64_t high, uint64_t open) {
  uint64_t kept = 0;
  while (open) {
    const uint64_t clear = open & ~ballot64(low & open, high & open);
    kept |= clear;
    open &= ~(clear | ballot64(low & kept, high & kept));
  }
  return kept;
}

// Calls emit(k, i) for the k-th i of [from, to) with test(i), in order, as long as k < limit; for a block of kThreads
// threads, all of which must call it alike. Returns how many there were, and where the next one would be looked for.
struct Found {
  uint32_t count, next;
};

template <int kThreads, typename Test, typename Emit>
__device__ __forceinline__ Found each_in_order(uint32_t from, uint32_t to, uint32_t limit, const Test& test,
                                               const Emit& emit) {
  constexpr int kEach = 8, kWarps = kThreads / 32;
  __shared__ uint32_t of_warp[kWarps];
  __shared__ uint32_t behind_last;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t count = 0;
  for (; from < to && count < limit; from += kThreads * kEach) {
    const uint32_t mine = from + threadIdx.x * kEach;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) bits |= uint32_t(mine + i < to && test(mine + i)) << i;
    uint32_t before = __popc(bits);  // becomes the number in this thread and those before it in the warp
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, before, step);
      if (lane >= step) before += other;
    }
    if (lane == 31) of_warp[warp] = before;
    __syncthreads();
    uint32_t k = count + before - __popc(bits);
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t found = of_warp[w];
      k += w < warp ? found : 0;
      count += found;
    }
    for (; bits && k < limit; bits &= bits - 1, ++k) {
      const uint32_t i = mine + __ffs(bits) - 1;
      emit(k, i);
      if (k + 1 == limit) behind_last = i + 1;
    }
    __syncthreads();  // of_warp is free again, behind_last is there
  }
  if (count >= limit && limit > 0) return {limit, behind_last};
  return {count, from < to ? from : to};
}

}  // namespace doublehead::nms
