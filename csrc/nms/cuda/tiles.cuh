// The parts of `decide` (decide.cuh) that find out who of a list is kept: the mask, and settling its tiles.
#pragma once

#include "decision.cuh"

namespace doublehead::nms {

// ---------------------------------------------------------------------------------------------
// The mask

// A warp's 32 columns: the better boxes.
template <typename T>
struct Columns {
  SharedBoxes<T, kHalf> boxes;
  uint32_t groups[kHalf];
};

// Of 32 columns, those whose group it is.
__device__ __forceinline__ uint32_t of_group(const uint32_t* groups, uint32_t group) {
  uint32_t same = 0;
#pragma unroll
  for (uint32_t j = 0; j < kHalf; ++j) same |= uint32_t(groups[j] == group) << j;
  return same;
}

// Half tiles `rows` >= `columns` of an image's list.
template <typename T>
__device__ __forceinline__ uint32_t half_word(const Decision<T>& d, uint32_t image, uint32_t row, uint32_t column,
                                              uint32_t listed, Columns<T>& columns) {
  const uint32_t lane = threadIdx.x % 32;
  const int64_t row_rank = d.rank_of(image, row < listed ? row : 0);
  const int64_t column_rank = d.rank_of(image, column < listed ? column : 0);
  uint32_t group = 0, column_group = 0, least = 0, largest = 0;
  if (d.groups) {
    group = d.groups[row_rank], column_group = d.groups[column_rank];
    const uint32_t column_least = __reduce_min_sync(kAllLanes, column_group);
    const uint32_t column_largest = __reduce_max_sync(kAllLanes, column_group);
    least = __reduce_min_sync(kAllLanes, group), largest = __reduce_max_sync(kAllLanes, group);
    if (largest < column_least || column_largest < least) return 0;
    least = least < column_least ? least : column_least;
    largest = largest > column_largest ? largest : column_largest;
  }
  __syncwarp();  // the columns before are no longer needed
  columns.boxes.set(lane, d.corners[column_rank]);
  columns.groups[lane] = column_group;
  __syncwarp();
  const Box<T> box = measure(d.corners[row_rank]);
  DOUBLEHEAD_MARK_BEGIN("nms: 32 tests");
  const uint32_t bits = suppressed_by(d.rule, box, [&](int j) { return columns.boxes[j]; });
  DOUBLEHEAD_MARK_END("nms: 32 tests");
  return least == largest ? bits : bits & of_group(columns.groups, group);
}

// Warps take pairs of half tiles.
template <typename T>
__device__ __forceinline__ void fill_mask(const Decision<T>& d, Columns<T>* columns) {
  const uint32_t lane = threadIdx.x % 32, words = d.words(), halves = 2 * words;
  const uint32_t pairs = halves * (halves + 1) / 2;
  for (uint64_t i = grid_thread(); i < uint64_t(d.images) * words; i += grid_threads()) d.settled[i] = {0, 0};
  each_of_warp(uint64_t(d.images) * pairs, [&](uint64_t item) {
    const uint32_t image = d.images == 1 ? 0 : item / pairs, pair = item - uint64_t(image) * pairs;
    const uint32_t listed = d.progress[image].listed;
    // The rows' half tile h has the pairs from h (h + 1) / 2 on.
    uint32_t h = static_cast<uint32_t>((sqrtf(8.0f * pair + 1) - 1) / 2);
    while (h * (h + 1) / 2 > pair) --h;
    while ((h + 1) * (h + 2) / 2 <= pair) ++h;
    if (h * kHalf >= listed) return;
    const uint32_t c = pair - h * (h + 1) / 2, row = h * kHalf + lane;
    const uint32_t word = half_word(d, image, row, c * kHalf + lane, listed, columns[threadIdx.x / 32]);
    auto* half_words = reinterpret_cast<uint32_t*>(d.mask + (uint64_t(image) * words + c / 2) * d.chunk);
    if (row < listed) half_words[2 * row + c % 2] = word;
  });
}

// ---------------------------------------------------------------------------------------------
// Settling

// What is known of a tile's boxes on account of the tiles before.
struct Before {
  uint32_t struck[2], waiting[2];
};

// The tile's boxes that nothing undecided could suppress any more are kept, and strike others; as long as that finds any.
// Lane l has the boxes l and l + 32, of each the word of those in the tile that suppress it.
__device__ __forceinline__ void settle(uint64_t low, uint64_t high, uint64_t waiting, uint64_t& open, uint64_t& kept) {
  while (true) {
    const uint64_t clear = open & ~waiting & ~ballot64((low & open) != 0, (high & open) != 0);
    if (!clear) return;
    kept |= clear;
    open &= ~clear;
    open &= ~ballot64((low & kept) != 0, (high & kept) != 0);
  }
}

// Decides on a tile of an image's list, in turns: each looks at what has become of the tiles before. Whatever a turn
// finds out is published at once, so that a chain of suppressions takes as many turns as it touches tiles.
template <typename T>
__device__ __forceinline__ void settle_tile(const Decision<T>& d, uint32_t image, uint32_t tile, uint32_t listed) {
  constexpr int kSlices = kDecideThreads<T> / kTile, kWordsEach = kLargestChunk / kTile / kSlices;
  __shared__ Before before[2];
  __shared__ uint64_t now_open, now_kept;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t box = threadIdx.x % kTile, slice = threadIdx.x / kTile, i = tile * kTile + box;
  const uint64_t* mask = d.mask + uint64_t(image) * d.words() * d.chunk;
  Settled* settled = d.settled + uint64_t(image) * d.words();
  const auto word_at = [&](uint32_t box_in_list, uint32_t w) {
    return box_in_list < listed ? mask[uint64_t(w) * d.chunk + box_in_list] : 0;
  };

  uint64_t undecided[kWordsEach];  // boxes before that would suppress this one
#pragma unroll
  for (int k = 0; k < kWordsEach; ++k) {
    const uint32_t w = slice + k * kSlices;
    undecided[k] = w < tile ? word_at(i, w) : 0;
  }
  uint64_t low = 0, high = 0, open = 0, kept = 0;
  if (warp == 0) {
    const uint32_t first = tile * kTile + lane, second = first + 32;
    const uint64_t* own = mask + uint64_t(tile) * d.chunk;
    if (first < listed) low = *reinterpret_cast<const uint32_t*>(own + first) & ((1u << lane) - 1);  // there is no more
    high = word_at(second, tile) & ((uint64_t(1) << (lane + 32)) - 1);
    open = ballot64(first < listed && d.state[d.rank_of(image, first)] == kUndecided,
                    second < listed && d.state[d.rank_of(image, second)] == kUndecided);
  }
  if (threadIdx.x < 2) before[threadIdx.x] = {};
  __syncthreads();

  for (uint32_t turn = 0;; turn = 1 - turn) {
    DOUBLEHEAD_MARK_BEGIN("nms: turn of a tile");
    bool struck = false, waiting = false;
#pragma unroll
    for (int k = 0; k < kWordsEach; ++k) {
      if (!undecided[k]) continue;
      const Settled other = load_settled(&settled[slice + k * kSlices]);
      struck |= (undecided[k] & other.kept) != 0;
      undecided[k] &= ~(other.kept | other.struck);
      waiting |= undecided[k] != 0;
    }
    const uint32_t struck_bits = __ballot_sync(kAllLanes, struck), waiting_bits = __ballot_sync(kAllLanes, waiting);
    if (lane == 0 && struck_bits) atomicOr(&before[turn].struck[warp % 2], struck_bits);
    if (lane == 0 && waiting_bits) atomicOr(&before[turn].waiting[warp % 2], waiting_bits);
    __syncthreads();
    if (warp == 0) {
      const Before& found = before[turn];
      open &= ~(uint64_t(found.struck[1]) << 32 | found.struck[0]);
      settle(low, high, uint64_t(found.waiting[1]) << 32 | found.waiting[0], open, kept);
      if (lane == 0) {
        store_settled(&settled[tile], {kept, ~(kept | open)});
        before[1 - turn] = {};
        now_open = open, now_kept = kept;
      }
    }
    __syncthreads();
    DOUBLEHEAD_MARK_END("nms: turn of a tile");
    if (!now_open) break;
    if (!(now_open >> box & 1)) {
#pragma unroll
      for (int k = 0; k < kWordsEach; ++k) undecided[k] = 0;
    }
  }

  if (threadIdx.x < kTile && i < listed) {
    uint8_t& state = d.state[d.rank_of(image, i)];
    if (now_kept >> box & 1) state = kKept;
    else state = kStruck;
  }
  if (threadIdx.x == 0) atomicAdd(&d.progress[image].kept, uint32_t(__popcll(now_kept)));
  __syncthreads();  // what is shared is free again
}

// A tile waits only for tiles before it, which blocks take first.
template <typename T>
__device__ __forceinline__ void settle_tiles(const Decision<T>& d) {
  each_of_block(uint64_t(d.images) * d.words(), [&](uint64_t item) {
    const uint32_t tile = item / d.images, image = item % d.images, listed = d.progress[image].listed;
    if (tile * kTile < listed) settle_tile(d, image, tile, listed);
  });
}

}  // namespace doublehead::nms
