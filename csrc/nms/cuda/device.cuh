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

// How far an image is. Memory for it need not be zero: who orders the boxes writes it.
struct Progress {
  uint32_t next[2];  // the rank behind the last that was ever listed; by turns for even and odd rounds
  uint32_t listed;   // boxes that are being decided
  uint32_t kept;     // of all that were decided
};

// What all blocks share beside; zeros at the start.
struct Together {
  uint32_t arrived;            // of meet_grid
  uint32_t listed, more;       // the last round that any image had boxes in, and that left any unlisted; the first is 1
  uint32_t members, segments;  // of small groups so far: their boxes, and how many there are
  uint32_t large;              // whether there are others
};

// A small group: where its members start, and how many it has.
struct Segment {
  uint32_t start, size;
};

// A block's slice of ranks, of `slices` that cover [from, to).
struct Slice {
  uint32_t from, to;

  __device__ __forceinline__ Slice(uint32_t all_from, uint32_t all_to, uint32_t slice, uint32_t slices) {
    const uint32_t size = (all_to - all_from + slices - 1) / slices;
    const uint64_t begin = all_from + uint64_t(slice) * size, end = begin + size;
    from = begin < all_to ? begin : all_to, to = end < all_to ? end : all_to;
  }
};

// How many i of the slice pass test(i), for a block of kThreads threads.
template <int kThreads, typename Test>
__device__ __forceinline__ uint32_t count_in(const Slice& slice, const Test& test) {
  uint32_t count = 0;
  for (uint32_t i = slice.from; i < slice.to; i += kThreads) {
    count += __syncthreads_count(i + threadIdx.x < slice.to && test(i + threadIdx.x));
  }
  return count;
}

// Calls emit(k, i) for the k-th i of the slice with test(i), in order, as long as k < limit. The first has the number
// `count`. Returns where the one behind the last would be looked for.
template <int kThreads, typename Test, typename Emit>
__device__ __forceinline__ uint32_t emit_in_order(const Slice& slice, uint32_t count, uint32_t limit, const Test& test,
                                                  const Emit& emit) {
  constexpr int kWarps = kThreads / 32;
  __shared__ uint32_t of_warp[kWarps];
  __shared__ uint32_t behind_last;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (uint32_t from = slice.from; from < slice.to && count < limit; from += kThreads) {
    const uint32_t i = from + threadIdx.x;
    const bool mine = i < slice.to && test(i);
    const uint32_t ballot = __ballot_sync(kAllLanes, mine);
    if (lane == 0) of_warp[warp] = __popc(ballot);
    __syncthreads();
    uint32_t k = count + __popc(ballot & ((1u << lane) - 1));
    for (uint32_t w = 0; w < kWarps; ++w) {
      const uint32_t found = of_warp[w];
      k += w < warp ? found : 0;
      count += found;
    }
    if (mine && k < limit) emit(k, i);
    if (mine && k + 1 == limit) behind_last = i + 1;
    __syncthreads();  // of_warp is free again, behind_last is there
  }
  return count >= limit && limit > 0 ? behind_last : slice.to;
}

// The sum of `count` numbers, for a block of kThreads threads.
template <int kThreads>
__device__ __forceinline__ uint32_t sum_of(const uint32_t* numbers, uint32_t count) {
  __shared__ uint32_t of_warp[kThreads / 32];
  uint32_t sum = 0;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) sum += numbers[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  __syncthreads();  // of_warp is free again
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (uint32_t w = 0; w < kThreads / 32; ++w) sum += of_warp[w];
  return sum;
}

}  // namespace doublehead::nms
