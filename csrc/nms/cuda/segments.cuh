// CUDA kernels that decide on small groups: a block for each, its boxes in registers.
#pragma once

#include "device.cuh"

namespace doublehead::nms {

template <typename T>
constexpr uint32_t kSegmentThreads = 4096 / sizeof(T);  // a double takes two registers
template <typename T>
constexpr uint32_t kLargestSegment = 2 * kSegmentThreads<T>;  // a thread has two boxes

// The boxes of all images, ordered by group and in a group by rank.
struct Segments {
  const uint64_t* keys;     // ascending; one for each group of each image
  const uint32_t* members;  // image * N + rank
  uint32_t* starts;         // where the small groups start, in no order
  uint32_t* number;         // how many these are
  uint32_t total;
};

// Finds the groups of at most `largest` boxes.
__global__ void find_segments(Segments segments, const uint8_t* state, uint32_t largest) {
  for (int64_t p = grid_thread(); p < segments.total; p += grid_threads()) {
    const uint64_t key = segments.keys[p];
    const bool starts = p == 0 || segments.keys[p - 1] != key;
    const bool large = p + largest < segments.total && segments.keys[p + largest] == key;
    const bool padding = state[segments.members[p]] != kUndecided;
    if (starts && !large && !padding) segments.starts[atomicAdd(segments.number, 1u)] = p;
  }
}

// A box of a segment, in its thread's registers.
template <typename T>
struct Owned {
  Corners<T> corners;
  uint32_t position, member;  // in the segment; in the image
  bool alive;                 // not struck

  // Which box of the tile it is; kTile or more if it is none of them.
  __device__ __forceinline__ uint32_t in_tile(uint32_t tile) const { return position - tile * kTile; }

  __device__ __forceinline__ void load(const Segments& segments, uint32_t start, uint64_t key,
                                       const Corners<T>* all_corners, uint8_t* state) {
    const uint32_t p = start + position;
    alive = p < segments.total && segments.keys[p] == key;
    corners = {};
    if (!alive) return;
    member = segments.members[p];
    corners = all_corners[member];
    state[member] = kStruck;  // until it is kept
  }

  // Whether it is still undecided once the boxes `kept` of the tile are known.
  __device__ __forceinline__ bool survives(uint32_t tile, uint64_t kept, const SharedBoxes<T, kTile>& boxes,
                                           const Rule<T>& rule, uint8_t* state) {
    const uint32_t mine = in_tile(tile);
    if (mine < kTile && (kept >> mine & 1)) state[member] = kKept;
    if (position < (tile + 1) * kTile || !alive) return false;
    const Box<T> box = measure(corners);
    for (; kept && alive; kept &= kept - 1) {
      DOUBLEHEAD_MARK_BEGIN("nms: a group's test");
      alive = !rule(boxes[__ffsll(kept) - 1], box);
      DOUBLEHEAD_MARK_END("nms: a group's test");
    }
    return alive;
  }
};

// Decides on these groups, by tiles: the better boxes of a tile settle it, then those kept strike the boxes behind it.
// Stops in a group when `most` are kept; the others are struck: no more are wanted.
template <typename T>
__global__ __launch_bounds__(kSegmentThreads<T>, 1) void suppress_segments(Segments segments, const Corners<T>* corners,
                                                                    Rule<T> rule, int64_t most, uint8_t* state) {
  __shared__ SharedBoxes<T, kTile> boxes;
  __shared__ uint64_t suppressors[kTile];
  __shared__ bool open[kTile];
  __shared__ uint64_t kept_word;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto publish = [&](const Owned<T>& own, uint32_t tile) {
    const uint32_t mine = own.in_tile(tile);
    if (mine >= kTile) return;
    boxes.set(mine, own.corners);
    open[mine] = own.alive;
  };

  for (uint32_t s = blockIdx.x; s < *segments.number; s += gridDim.x) {
    const uint32_t start = segments.starts[s];
    const uint64_t key = segments.keys[start];
    Owned<T> one{.position = threadIdx.x}, two{.position = threadIdx.x + kSegmentThreads<T>};
    one.load(segments, start, key, corners, state);
    two.load(segments, start, key, corners, state);

    int64_t total = 0;
    for (uint32_t tile = 0; tile < kLargestSegment<T> / kTile; ++tile) {
      publish(one, tile);
      publish(two, tile);
      __syncthreads();
      for (uint32_t b = warp; b < kTile; b += kSegmentThreads<T> / 32) {  // who suppresses box b?
        const Box<T> box = boxes[b];
        const bool low = lane < b && rule(boxes[lane], box);
        const bool high = lane + 32 < b && rule(boxes[lane + 32], box);
        const uint64_t word = ballot64(low, high);
        if (lane == 0) suppressors[b] = word;
      }
      __syncthreads();
      if (warp == 0) {
        const uint64_t word = settle(suppressors[lane], suppressors[lane + 32], ballot64(open[lane], open[lane + 32]));
        if (lane == 0) kept_word = word;
      }
      __syncthreads();
      const uint64_t kept = kept_word;
      total += __popcll(kept);
      const bool first = one.survives(tile, kept, boxes, rule, state);
      const bool second = two.survives(tile, kept, boxes, rule, state);
      if (!__syncthreads_or(first || second) || total >= most) break;
    }
  }
}

}  // namespace doublehead::nms
