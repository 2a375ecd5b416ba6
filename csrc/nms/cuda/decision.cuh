// What `decide` works on (decide.cuh), and lists of boxes in order of rank, which all blocks make together.
#pragma once

#include "segments.cuh"

namespace doublehead::nms {

constexpr uint32_t kHalf = 32, kStrikeRows = 4 * kTile, kLargestChunk = 128 * kTile;

template <typename T>
struct Decision {
  const Corners<T>* corners;  // by rank, as all others but the last
  const uint32_t* order;      // b * N + n
  const uint32_t* groups;     // null: all boxes of an image are one group
  Groups small;               // how to find the small groups; largest = 0: none is to be found
  uint8_t* state;
  uint32_t images, count;  // B and N
  uint32_t chunk;          // boxes of an image in a round; 0: only small groups are decided
  uint32_t slices;         // into which an image's ranks are cut
  bool listed;             // whether the first round's list is there
  int64_t most;
  Rule<T> rule;
  uint32_t* list;    // [B, chunk] ranks, better ones of a group before worse ones
  uint64_t* mask;    // [B, words(), chunk]: word w of box i has the boxes of tile w that suppress i; only tiles up to i's
                     // own are ever written or read, and of that one only the boxes before i
  Settled* settled;  // [B, words()]
  uint32_t* counts;  // [B, slices]
  Progress* progress;
  Together* together;
  int64_t *indices, *index_counts;  // the result

  __device__ __forceinline__ uint32_t words() const { return tiles_of(chunk); }
  __device__ __forceinline__ int64_t rank_of(uint32_t image, uint32_t i) const {
    return int64_t(image) * count + list[int64_t(image) * chunk + i];
  }
  __device__ __forceinline__ bool done(uint32_t image) const { return progress[image].kept >= most; }
};

// Which items of [0, count) this block has, or this warp.
template <typename Body>
__device__ __forceinline__ void each_of_block(uint64_t count, const Body& body) {
  for (uint64_t i = blockIdx.x; i < count; i += gridDim.x) body(i);
}
template <typename Body>
__device__ __forceinline__ void each_of_warp(uint64_t count, const Body& body) {
  const uint64_t warps = blockDim.x / 32 * gridDim.x, mine = blockIdx.x + uint64_t(threadIdx.x / 32) * gridDim.x;
  for (uint64_t i = mine; i < count; i += warps) body(i);
}

// ---------------------------------------------------------------------------------------------
// Lists: what passes test(b, r), of each image in order of rank

template <typename T, typename From, typename Test>
__device__ __forceinline__ void count_slices(const Decision<T>& d, const From& from, const Test& test) {
  each_of_block(uint64_t(d.images) * d.slices, [&](uint64_t item) {
    const uint32_t image = item / d.slices;
    const Slice slice(from(image), d.count, item % d.slices, d.slices);
    const uint32_t found = count_in<kDecideThreads<T>>(slice, [&](uint32_t r) { return test(image, r); });
    if (threadIdx.x == 0) d.counts[item] = found;
  });
}

// finish(b, k, next): by one block for each image; k were emitted, the next would be looked for at rank `next`.
template <typename T, typename From, typename Test, typename Emit, typename Finish>
__device__ __forceinline__ void emit_slices(const Decision<T>& d, int64_t most, const From& from, const Test& test,
                                            const Emit& emit, const Finish& finish) {
  each_of_block(uint64_t(d.images) * d.slices, [&](uint64_t item) {
    const uint32_t image = item / d.slices, index = item % d.slices;
    const uint32_t limit = most < d.count ? most : d.count;
    const uint32_t* counts = d.counts + uint64_t(image) * d.slices;
    const uint32_t before = sum_of<kDecideThreads<T>>(counts, index), mine = counts[index];
    const Slice slice(from(image), d.count, index, d.slices);
    const uint32_t next = emit_in_order<kDecideThreads<T>>(
        slice, before, limit, [&](uint32_t r) { return test(image, r); },
        [&](uint32_t k, uint32_t r) { emit(image, k, r); });
    const bool fills = before < limit && before + mine >= limit;
    const bool last = index == d.slices - 1 && before + mine < limit;
    if (fills || last) finish(image, fills ? limit : before + mine, fills ? next : d.count);
  });
}

template <typename T>
__device__ __forceinline__ void list_undecided(const Decision<T>& d, uint32_t round) {
  const uint32_t now = round % 2;  // `next` of this round is read until the grid meets, that of the next one written
  const auto from = [&](uint32_t image) { return d.done(image) ? d.count : d.progress[image].next[now]; };
  const auto test = [&](uint32_t image, uint32_t r) { return d.state[int64_t(image) * d.count + r] == kUndecided; };
  count_slices(d, from, test);
  meet_grid(&d.together->arrived);
  emit_slices(
      d, d.chunk, from, test,
      [&](uint32_t image, uint32_t k, uint32_t r) { d.list[int64_t(image) * d.chunk + k] = r; },
      [&](uint32_t image, uint32_t k, uint32_t next) {
        if (threadIdx.x != 0) return;
        d.progress[image].listed = k;
        d.progress[image].next[1 - now] = next;
        if (k > 0) d.together->listed = round;
        if (next < d.count) d.together->more = round;
      });
  meet_grid(&d.together->arrived);
}

template <typename T>
__device__ __forceinline__ void write_result(const Decision<T>& d) {
  const auto from = [](uint32_t) { return 0; };
  const auto test = [&](uint32_t image, uint32_t r) { return d.state[int64_t(image) * d.count + r] == kKept; };
  count_slices(d, from, test);
  meet_grid(&d.together->arrived);
  emit_slices(
      d, d.most, from, test,
      [&](uint32_t image, uint32_t k, uint32_t r) {
        const int64_t first = int64_t(image) * d.count;
        d.indices[image * d.most + k] = d.order[first + r] - first;
      },
      [&](uint32_t image, uint32_t k, uint32_t) {
        for (int64_t i = k + threadIdx.x; i < d.most; i += kDecideThreads<T>) d.indices[image * d.most + i] = -1;
        if (threadIdx.x == 0) d.index_counts[image] = k;
      });
}

}  // namespace doublehead::nms
