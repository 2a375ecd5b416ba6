// CUDA kernels that decide on groups of any size, in rounds: of each image the best undecided boxes, `chunk` of them,
// are listed; a mask of bits says which suppresses which; one block goes through them in order; and those kept strike
// all boxes behind them. The boxes are taken in order of rank over all groups, so an image that has as many kept boxes
// as are wanted is done, and the mask needs chunk^2 / 8 bytes for each image, however many boxes there are.
#pragma once

#include "device.cuh"

namespace doublehead::nms {

constexpr int kMaskThreads = kTile, kResolveThreads = 1024, kStrikeThreads = 256, kStrikeRows = 256;
constexpr uint32_t kLargestChunk = 16384;

// How far an image is; zeros at the start.
struct Progress {
  uint32_t next;    // the rank behind the last that was ever listed
  uint32_t listed;  // this round's boxes
  uint32_t kept;    // how many of them are kept
  uint32_t done;    // whether no more are wanted
  int64_t total;    // kept in all rounds
};

template <typename T>
struct Rounds {
  const Corners<T>* corners;  // by rank
  const uint32_t* groups;     // by rank; null: all boxes of an image are one group
  uint8_t* state;             // by rank
  uint32_t images, count;     // B and N
  uint32_t chunk;             // boxes of an image in a round
  int64_t most;
  Rule<T> rule;
  uint32_t* list;   // [B, chunk] ranks
  uint32_t* kept;   // [B, chunk] ranks, of those kept
  uint64_t* mask;   // [B, chunk, words()]: word w of box i has the boxes of tile w that i suppresses, in i's own
                    // tile those that suppress i; only tiles w from i's own on are ever written or read, and in the
                    // last tile nobody asks for the bits behind the last box
  Progress* progress;

  __device__ __forceinline__ uint32_t group(int64_t r) const { return groups ? groups[r] : 0; }
  __device__ __forceinline__ uint32_t words() const { return tiles_of(chunk); }
};

template <typename T>
__global__ __launch_bounds__(1024) void list_undecided(Rounds<T> rounds) {
  const int64_t first = int64_t(blockIdx.x) * rounds.count;
  Progress& progress = rounds.progress[blockIdx.x];
  uint32_t* list = rounds.list + int64_t(blockIdx.x) * rounds.chunk;
  const uint32_t from = progress.next;
  if (progress.done) return;
  const Found found = each_in_order<1024>(
      from, rounds.count, rounds.chunk, [&](uint32_t r) { return rounds.state[first + r] == kUndecided; },
      [&](uint32_t k, uint32_t r) { list[k] = r; });
  __syncthreads();
  if (threadIdx.x == 0) {
    progress.next = found.next;
    progress.listed = found.count;
  }
}

// A block takes pairs of tiles; its threads the rows of the first, the better ones.
template <typename T>
__global__ __launch_bounds__(kMaskThreads) void fill_mask(Rounds<T> rounds) {
  __shared__ SharedBoxes<T, kTile> columns;
  __shared__ uint32_t column_groups[kTile];
  const uint32_t image = blockIdx.x, thread = threadIdx.x;
  if (rounds.progress[image].done) return;
  const uint32_t listed = rounds.progress[image].listed, tiles = tiles_of(listed);
  const uint32_t words = rounds.words();
  const int64_t first = int64_t(image) * rounds.count;
  const uint32_t* list = rounds.list + int64_t(image) * rounds.chunk;

  for (uint32_t pair = blockIdx.y; pair < tiles * tiles; pair += gridDim.y) {
    const uint32_t row_tile = pair / tiles, column_tile = pair % tiles;
    if (column_tile < row_tile) continue;
    const uint32_t row = row_tile * kTile + thread, column = column_tile * kTile + thread;
    const int64_t row_rank = first + list[row < listed ? row : 0];
    const int64_t column_rank = first + list[column < listed ? column : 0];
    __syncthreads();  // the columns before are no longer needed
    columns.set(thread, rounds.corners[column_rank]);
    column_groups[thread] = rounds.group(column_rank);
    __syncthreads();
    const Box<T> box = measure(rounds.corners[row_rank]);
    const uint32_t group = rounds.group(row_rank);
    uint32_t halves[2] = {0, 0};
    for (int half = 0; half < 2; ++half) {
      const auto at = [&](int j) { return columns[32 * half + j]; };
      halves[half] = suppressed_by(rounds.rule, box, at);
      if (!rounds.groups) continue;
      uint32_t same = 0;
#pragma unroll
      for (int j = 0; j < 32; ++j) same |= uint32_t(group == column_groups[32 * half + j]) << j;
      halves[half] &= same;
    }
    uint64_t word = uint64_t(halves[1]) << 32 | halves[0];
    if (row_tile == column_tile) word &= (uint64_t(1) << thread) - 1;
    if (row < listed) rounds.mask[(int64_t(image) * rounds.chunk + row) * words + column_tile] = word;
  }
}

// What the rows of tile t that are kept suppress in the tiles from t + 2 on: into `removed`, by all warps but the first.
__device__ __forceinline__ void push(const uint64_t* mask, uint32_t words, uint32_t t, uint32_t tiles, uint64_t kept,
                                     uint32_t* removed) {
  const uint32_t warps = kResolveThreads / 32 - 1, warp = threadIdx.x / 32 - 1, lane = threadIdx.x % 32;
  if (t + 2 >= tiles) return;
  const uint32_t stripes = (tiles - t - 2 + 31) / 32;  // of 32 words; at most 8
  const uint32_t step = warps / stripes, w = t + 2 + warp % stripes * 32 + lane;
  if (warp / stripes >= step || w >= tiles) return;
  uint64_t word = 0;
#pragma unroll 4
  for (uint32_t row = warp / stripes; row < kTile; row += step) {
    if (kept >> row & 1) word |= mask[int64_t(t * kTile + row) * words + w];
  }
  if (static_cast<uint32_t>(word)) atomicOr(&removed[2 * w], static_cast<uint32_t>(word));
  if (word >> 32) atomicOr(&removed[2 * w + 1], static_cast<uint32_t>(word >> 32));
}

__device__ __forceinline__ uint32_t or_of_warp(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int step = 16; step > 0; step /= 2) value |= __shfl_xor_sync(kAllLanes, value, step);
  return value;
#else
  return __reduce_or_sync(kAllLanes, value);
#endif
}

// Goes through an image's list in order. The first warp settles a tile at a time; what the kept rows of tile t suppress
// in tile t + 1 it finds by itself, and the other warps have until then to push what those of tile t - 1 suppress
// behind.
template <typename T>
__global__ __launch_bounds__(kResolveThreads) void resolve(Rounds<T> rounds) {
  constexpr uint32_t kMaxTiles = kLargestChunk / kTile;
  __shared__ uint32_t removed[2 * kMaxTiles];
  __shared__ uint64_t kept[kMaxTiles];
  const uint32_t image = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Progress& progress = rounds.progress[image];
  if (progress.done) return;
  const uint32_t listed = progress.listed, tiles = tiles_of(listed), words = rounds.words();
  const uint64_t* mask = rounds.mask + int64_t(image) * rounds.chunk * words;
  for (uint32_t i = threadIdx.x; i < 2 * kMaxTiles; i += kResolveThreads) removed[i] = 0;
  __syncthreads();

  // Of the first warp: word w of the listed box i, 0 if there is none.
  const auto word_at = [&](uint32_t i, uint32_t w) {
    return i < listed && w < tiles ? mask[int64_t(i) * words + w] : 0;
  };
  uint64_t low = 0, high = 0, low_next = 0, high_next = 0, carried = 0;
  if (warp == 0) {
    low = word_at(lane, 0), high = word_at(lane + 32, 0);
    low_next = word_at(lane, 1), high_next = word_at(lane + 32, 1);
  }
  int64_t total = progress.total;
  uint32_t settled = 0;
  while (settled < tiles) {
    const uint32_t t = settled++;
    if (warp == 0) {
      const uint32_t ahead = (t + 1) * kTile + lane;  // loaded while this tile is settled
      const uint64_t low_ahead = word_at(ahead, t + 1), high_ahead = word_at(ahead + 32, t + 1);
      const uint64_t low_next_ahead = word_at(ahead, t + 2), high_next_ahead = word_at(ahead + 32, t + 2);
      const uint64_t gone = carried | uint64_t(removed[2 * t + 1]) << 32 | removed[2 * t];
      const uint32_t left = listed - t * kTile;
      const uint64_t there = left < kTile ? (uint64_t(1) << left) - 1 : ~uint64_t(0);
      const uint64_t word = settle(low, high, there & ~gone);
      const uint64_t strikes = (word >> lane & 1 ? low_next : 0) | (word >> (lane + 32) & 1 ? high_next : 0);
      carried = uint64_t(or_of_warp(strikes >> 32)) << 32 | or_of_warp(static_cast<uint32_t>(strikes));
      low = low_ahead, high = high_ahead, low_next = low_next_ahead, high_next = high_next_ahead;
      total += __popcll(word);
      if (lane == 0) kept[t] = word;
    } else if (t > 0) {
      push(mask, words, t - 1, tiles, kept[t - 1], removed);
    }
    if (__syncthreads_or(warp == 0 && total >= rounds.most)) break;
  }

  uint8_t* state = rounds.state + int64_t(image) * rounds.count;
  const uint32_t* list = rounds.list + int64_t(image) * rounds.chunk;
  uint32_t* kept_list = rounds.kept + int64_t(image) * rounds.chunk;
  const auto is_kept = [&](uint32_t i) { return kept[i / kTile] >> (i % kTile) & 1; };
  const uint32_t decided = settled * kTile < listed ? settled * kTile : listed;
  for (uint32_t i = threadIdx.x; i < decided; i += kResolveThreads) state[list[i]] = is_kept(i) ? kKept : kStruck;
  const Found found = each_in_order<kResolveThreads>(
      0, decided, decided, is_kept, [&](uint32_t k, uint32_t i) { kept_list[k] = list[i]; });
  if (threadIdx.x == 0) {
    progress.kept = found.count;
    progress.total += found.count;
    progress.done = progress.total >= rounds.most;
  }
}

// The boxes kept in this round strike those behind them: a block takes kStrikeRows of the former, a thread some of the
// latter. Blocks that strike the same box all write the same.
template <typename T>
__global__ __launch_bounds__(kStrikeThreads, 4) void strike(Rounds<T> rounds) {
  __shared__ SharedBoxes<T, kStrikeRows> rows;
  __shared__ uint32_t row_groups[kStrikeRows];
  const uint32_t image = blockIdx.x, first_row = blockIdx.z * kStrikeRows;
  const Progress& progress = rounds.progress[image];
  if (progress.done || first_row >= progress.kept) return;
  const uint32_t row_count = progress.kept - first_row < kStrikeRows ? progress.kept - first_row : kStrikeRows;
  const int64_t first = int64_t(image) * rounds.count;
  const uint32_t* kept = rounds.kept + int64_t(image) * rounds.chunk;
  for (uint32_t i = threadIdx.x; i < row_count; i += kStrikeThreads) {
    const int64_t r = first + kept[first_row + i];
    rows.set(i, rounds.corners[r]);
    row_groups[i] = rounds.group(r);
  }
  __syncthreads();

  const uint32_t step = gridDim.y * kStrikeThreads;
  for (uint32_t r = progress.next + blockIdx.y * kStrikeThreads + threadIdx.x; r < rounds.count; r += step) {
    if (rounds.state[first + r] != kUndecided) continue;
    const Box<T> box = measure(rounds.corners[first + r]);
    const uint32_t group = rounds.group(first + r);
    for (uint32_t i = 0; i < row_count; ++i) {
      if (row_groups[i] != group || !rounds.rule(rows[i], box)) continue;
      rounds.state[first + r] = kStruck;
      break;
    }
  }
}

}  // namespace doublehead::nms
