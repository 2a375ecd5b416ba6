// CUDA kernels that decide on small groups: a block for each, its boxes in registers.
#pragma once

#include "device.cuh"

namespace doublehead::nms {

constexpr int kSegmentThreads = 1024, kOwn = 2;  // a thread has kOwn boxes
constexpr uint32_t kLargestSegment = kSegmentThreads * kOwn;

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

// Decides on these groups, by tiles: the better boxes of a tile settle it, then those kept strike the boxes behind it.
// Stops in a group when `most` are kept; the others are struck: no more are wanted.
template <typename T>
__global__ __launch_bounds__(kSegmentThreads) void suppress_segments(Segments segments, const Corners<T>* corners,
                                                                    Rule<T> rule, int64_t most, uint8_t* state) {
  __shared__ Corners<T> tile[kTile];
  __shared__ uint64_t suppressors[kTile];
  __shared__ bool open[kTile];
  __shared__ uint64_t kept_word;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  for (uint32_t s = blockIdx.x; s < *segments.number; s += gridDim.x) {
    const uint32_t start = segments.starts[s];
    const uint64_t key = segments.keys[start];
    Corners<T> mine[kOwn];
    bool alive[kOwn];
    uint32_t member[kOwn];
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const uint32_t p = start + own * kSegmentThreads + thread;
      alive[own] = p < segments.total && segments.keys[p] == key;
      member[own] = 0;
      mine[own] = {};
      if (!alive[own]) continue;
      member[own] = segments.members[p];
      mine[own] = corners[member[own]];
      state[member[own]] = kStruck;
    }

    int64_t kept_so_far = 0;
    for (int first = 0; first < static_cast<int>(kLargestSegment); first += kTile) {
      const int in_tile = thread - first % kSegmentThreads;  // this thread's box of the tile, if it has one
      const bool publishes = in_tile >= 0 && in_tile < kTile;
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        if (!publishes || own != first / kSegmentThreads) continue;
        tile[in_tile] = mine[own];
        open[in_tile] = alive[own];
      }
      __syncthreads();
      for (int b = warp; b < kTile; b += kSegmentThreads / 32) {  // who suppresses box b?
        const Box<T> box = make_box(tile[b]);
        const bool low = lane < b && rule(make_box(tile[lane]), box);
        const bool high = lane + 32 < b && rule(make_box(tile[lane + 32]), box);
        const uint64_t word = ballot64(low, high);
        if (lane == 0) suppressors[b] = word;
      }
      __syncthreads();
      if (warp == 0) {
        const uint64_t candidates = ballot64(open[lane], open[lane + 32]);
        const uint64_t word = settle(suppressors[lane], suppressors[lane + 32], candidates);
        if (lane == 0) kept_word = word;
      }
      __syncthreads();
      const uint64_t kept = kept_word;
      kept_so_far += __popcll(kept);
      bool more = false;
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        if (publishes && own == first / kSegmentThreads && (kept >> in_tile & 1)) state[member[own]] = kKept;
        if (own * kSegmentThreads + thread < first + kTile) alive[own] = false;  // decided
        if (!alive[own]) continue;
        const Box<T> box = make_box(mine[own]);
        for (uint64_t left = kept; left && alive[own]; left &= left - 1) {
          alive[own] = !rule(make_box(tile[__ffsll(left) - 1]), box);
        }
        more |= alive[own];
      }
      if (!__syncthreads_or(more) || kept_so_far >= most) break;
    }
  }
}

}  // namespace doublehead::nms
