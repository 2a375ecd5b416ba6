// The part of `decide` that decides on small groups: a block for each, its boxes in registers.
#pragma once

#include "grid.cuh"
#include "order.cuh"

namespace doublehead::nms {

template <typename T>
constexpr int kDecideThreads = 4096 / sizeof(T);  // a double takes two registers
template <typename T>
constexpr uint32_t kLargestSegment = 2 * kDecideThreads<T>;  // a thread has two boxes

constexpr int kTests = 16;  // of a box with those kept of a tile, at a time

template <typename T>
struct SegmentShared {
  SharedBoxes<T, kTile> boxes;  // of the tile that is being settled
  SharedBoxes<T, kTile> kept;   // of these, those kept
  uint64_t suppressors[kTile], kept_word;
  bool open[kTile];
  uint32_t members[kLargestSegment<T>];
};

// Sorts the first `count` numbers, for all threads of the block; fills up with the largest there is.
template <typename T>
__device__ __forceinline__ void sort_members(uint32_t* members, uint32_t count) {
  uint32_t length = 2;
  while (length < count) length *= 2;
  for (uint32_t i = count + threadIdx.x; i < length; i += kDecideThreads<T>) members[i] = 0xffffffffu;
  for (uint32_t run = 2; run <= length; run *= 2) {  // a bitonic sort: runs of this length, every second one descending
    for (uint32_t step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      if (threadIdx.x >= length / 2) continue;
      const uint32_t low = (threadIdx.x & ~(step - 1)) << 1 | (threadIdx.x & (step - 1)), high = low + step;
      const uint32_t a = members[low], b = members[high];
      if ((a > b) == ((low & run) == 0)) members[low] = b, members[high] = a;
    }
  }
  __syncthreads();
}

// A box of a segment, in its thread's registers.
template <typename T>
struct Owned {
  Corners<T> corners;
  uint32_t position, member;  // in the segment; in the image
  bool alive;                 // not struck

  // Which box of the tile it is; kTile or more if it is none of them.
  __device__ __forceinline__ uint32_t in_tile(uint32_t tile) const { return position - tile * kTile; }

  __device__ __forceinline__ void load(uint32_t size, const uint32_t* members, const Corners<T>* all_corners,
                                       uint8_t* state) {
    alive = position < size;
    corners = {};
    if (!alive) return;
    member = members[position];
    corners = all_corners[member];
    state[member] = kStruck;  // until it is kept
  }

  __device__ __forceinline__ void publish(uint32_t tile, SegmentShared<T>& shared) const {
    const uint32_t mine = in_tile(tile);
    if (mine >= kTile) return;
    shared.boxes.set(mine, corners);
    shared.open[mine] = alive;
  }

  // If it is a box of the tile, and kept.
  __device__ __forceinline__ void keep(uint32_t tile, SegmentShared<T>& shared, uint8_t* state) const {
    const uint32_t mine = in_tile(tile);
    if (mine >= kTile || !(shared.kept_word >> mine & 1)) return;
    shared.kept.set(__popcll(shared.kept_word & ((uint64_t(1) << mine) - 1)), corners);
    state[member] = kKept;
  }

  // Whether it is still undecided once the boxes kept of the tile have struck.
  __device__ __forceinline__ bool survives(uint32_t tile, uint32_t kept, const SegmentShared<T>& shared,
                                           const Rule<T>& rule) {
    if (position < (tile + 1) * kTile || !alive) return false;
    const Box<T> box = measure(corners);
    for (uint32_t first = 0; first < kept && alive; first += kTests) {
      DOUBLEHEAD_MARK_BEGIN("nms: 16 tests of a segment");
      uint32_t bits = suppressed_by<kTests>(rule, box, [&](int j) { return shared.kept[first + j]; });
      DOUBLEHEAD_MARK_END("nms: 16 tests of a segment");
      if (kept - first < kTests) bits &= (1u << (kept - first)) - 1;
      alive = bits == 0;
    }
    return alive;
  }
};

// By tiles: the better boxes of a tile settle it, then those kept strike the boxes behind it. Stops when `most` are kept;
// the others are struck: no more are wanted.
template <typename T>
__device__ __forceinline__ void decide_segment(const Segment& segment, const Corners<T>* corners, const uint32_t* members,
                                               const Rule<T>& rule, int64_t most, uint8_t* state,
                                               SegmentShared<T>& shared) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (uint32_t i = threadIdx.x; i < segment.size; i += kDecideThreads<T>) {
    shared.members[i] = members[segment.start + i];
  }
  sort_members<T>(shared.members, segment.size);
  Owned<T> one{.position = threadIdx.x}, two{.position = threadIdx.x + kDecideThreads<T>};
  one.load(segment.size, shared.members, corners, state);
  two.load(segment.size, shared.members, corners, state);

  int64_t total = 0;
  for (uint32_t tile = 0; tile < tiles_of(segment.size); ++tile) {
    one.publish(tile, shared);
    two.publish(tile, shared);
    __syncthreads();
    for (uint32_t b = warp; b < kTile; b += kDecideThreads<T> / 32) {  // who suppresses box b?
      const Box<T> box = shared.boxes[b];
      const bool low = lane < b && rule(shared.boxes[lane], box);
      const bool high = lane + 32 < b && rule(shared.boxes[lane + 32], box);
      const uint64_t word = ballot64(low, high);
      if (lane == 0) shared.suppressors[b] = word;
    }
    __syncthreads();
    if (warp == 0) {
      const uint64_t open = ballot64(shared.open[lane], shared.open[lane + 32]);
      const uint64_t word = settle(shared.suppressors[lane], shared.suppressors[lane + 32], open);
      if (lane == 0) shared.kept_word = word;
    }
    __syncthreads();
    const uint32_t kept = __popcll(shared.kept_word);
    one.keep(tile, shared, state);
    two.keep(tile, shared, state);
    __syncthreads();
    total += kept;
    const bool first = one.survives(tile, kept, shared, rule), second = two.survives(tile, kept, shared, rule);
    if (!__syncthreads_or(first || second) || total >= most) break;
  }
  __syncthreads();  // the members are no longer needed
}

// All small groups, whose members are first brought together.
template <typename T>
__device__ __forceinline__ void decide_segments(const Groups& groups, uint32_t count, uint32_t total,
                                                const Corners<T>* corners, const Rule<T>& rule, int64_t most,
                                                uint8_t* state, Together* together, SegmentShared<T>& shared) {
  for (int64_t r = grid_thread(); r < total; r += grid_threads()) {
    if (groups.numbers[r] == groups.capacity) continue;
    const uint32_t start = groups.sizes[groups.flat(r / count, groups.numbers[r])];
    if (start != kFree) groups.members[start + groups.places[r]] = r;
  }
  meet_grid(&together->arrived);
  for (uint32_t s = blockIdx.x; s < together->segments; s += gridDim.x) {
    decide_segment(groups.segments[s], corners, groups.members, rule, most, state, shared);
  }
}

}  // namespace doublehead::nms
