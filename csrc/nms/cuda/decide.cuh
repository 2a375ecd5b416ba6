// The CUDA kernel that decides and writes the result. Its blocks run side by side and wait for each other (grid.cuh).
// Small groups are a block's each (segments.cuh). All others go in rounds: of each image the best undecided boxes, `chunk`
// of them, are listed; a mask of bits says which suppresses which; the tiles of the list are settled; and those kept
// strike all boxes behind the list. The boxes are taken in order of rank over all groups, so an image that has as many kept
// boxes as are wanted is done, and the mask needs chunk^2 / 8 bytes for each image, however many boxes there are. The kernel
// ends when nothing is undecided.
#pragma once

#include "tiles.cuh"

namespace doublehead::nms {

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
