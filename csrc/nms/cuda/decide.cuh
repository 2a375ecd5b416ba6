// The CUDA kernel that decides and writes the result. Its blocks run side by side and wait for each other (grid.cuh). Small
// groups are a block's each (segments.cuh). All others go in rounds: of each image the best undecided boxes, `chunk` of them, are listed; a mask of bits says
// which suppresses which; the tiles of the list are settled; and those kept strike all boxes behind the list. The boxes are
// taken in order of rank over all groups, so an image that has as many kept boxes as are wanted is done, and the mask needs
// chunk^2 / 8 bytes for each image, however many boxes there are. The kernel ends when nothing is undecided.
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
    low = word_at(first, tile) & ((uint64_t(1) << lane) - 1);
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

// ---------------------------------------------------------------------------------------------
// Striking

template <typename T>
struct StrikeRows {
  SharedBoxes<T, kStrikeRows> boxes;
  uint32_t groups[kStrikeRows];
  uint32_t count;
};

// The kept boxes of four tiles.
template <typename T>
__device__ __forceinline__ void load_rows(const Decision<T>& d, uint32_t image, uint32_t first_tile, StrikeRows<T>& rows) {
  const Settled* settled = d.settled + uint64_t(image) * d.words();
  const uint32_t tiles = tiles_of(d.progress[image].listed);
  __syncthreads();  // the rows before are no longer needed
  if (threadIdx.x < kStrikeRows) {
    const uint32_t mine = threadIdx.x / kTile, bit = threadIdx.x % kTile;
    uint64_t kept = 0;
    uint32_t position = 0;
    for (uint32_t t = 0; t <= mine; ++t) {
      position += __popcll(kept);
      kept = first_tile + t < tiles ? settled[first_tile + t].kept : 0;
    }
    position += __popcll(kept & ((uint64_t(1) << bit) - 1));
    if (kept >> bit & 1) {
      const int64_t r = d.rank_of(image, (first_tile + mine) * kTile + bit);
      rows.boxes.set(position, d.corners[r]);
      if (d.groups) rows.groups[position] = d.groups[r];
    }
    if (threadIdx.x == kStrikeRows - 1) rows.count = position + (kept >> bit & 1);
  }
  __syncthreads();
}

// The boxes kept in this round strike those behind its list. Blocks that strike the same box all write the same.
template <typename T>
__device__ __forceinline__ void strike(const Decision<T>& d, uint32_t round, StrikeRows<T>& rows) {
  const uint32_t row_parts = (d.words() + kStrikeRows / kTile - 1) / (kStrikeRows / kTile);
  const uint32_t column_parts = (d.count + kDecideThreads<T> - 1) / kDecideThreads<T>, parts = row_parts * column_parts;
  each_of_block(uint64_t(d.images) * parts, [&](uint64_t item) {
    const uint32_t image = item / parts, part = item % parts, first_tile = part % row_parts * (kStrikeRows / kTile);
    const uint32_t next = d.progress[image].next[1 - round % 2];
    const uint32_t first = next + part / row_parts * kDecideThreads<T>, r = first + threadIdx.x;
    if (d.done(image) || first_tile * kTile >= d.progress[image].listed || first < next || first >= d.count) return;
    load_rows(d, image, first_tile, rows);
    uint8_t* state = d.state + int64_t(image) * d.count + r;
    if (r >= d.count || *state != kUndecided) return;
    const Box<T> box = measure(d.corners[int64_t(image) * d.count + r]);
    const uint32_t group = d.groups ? d.groups[int64_t(image) * d.count + r] : 0;
    for (uint32_t base = 0; base < rows.count; base += kHalf) {
      const uint32_t left = rows.count - base;
      DOUBLEHEAD_MARK_BEGIN("nms: 32 strikes");
      uint32_t bits = suppressed_by(d.rule, box, [&](int j) { return rows.boxes[base + j]; });
      DOUBLEHEAD_MARK_END("nms: 32 strikes");
      if (left < kHalf) bits &= (1u << left) - 1;
      if (d.groups && bits) bits &= of_group(rows.groups + base, group);
      if (!bits) continue;
      *state = kStruck;
      break;
    }
  });
}

// ---------------------------------------------------------------------------------------------

template <typename T>
__global__ __launch_bounds__(kDecideThreads<T>, 1) void decide(Decision<T> d) {
  __shared__ union {
    Columns<T> columns[kDecideThreads<T> / 32];
    StrikeRows<T> rows;
    SegmentShared<T> segment;
  } shared;
  uint32_t* arrived = &d.together->arrived;
  bool rounds = d.chunk > 0;
  if (d.small.largest > 0) {
    decide_segments(d.small, d.count, d.images * d.count, d.corners, d.rule, d.most, d.state, d.together, shared.segment);
    meet_grid(arrived);
    rounds = rounds && d.together->large;
  }
  for (uint32_t round = 1; rounds; ++round) {
    const bool given = d.listed && round == 1;
    if (!given) {
      list_undecided(d, round);
      if (d.together->listed != round) break;
    }
    fill_mask(d, shared.columns);
    meet_grid(arrived);
    settle_tiles(d);
    meet_grid(arrived);
    if (given || d.together->more != round) break;
    strike(d, round, shared.rows);
    meet_grid(arrived);
  }
  write_result(d);
}

}  // namespace doublehead::nms
