// Backward, before the sums: which boxes lie on which level of which image, their weights, and which tiles they touch.
//   list_boxes  (a block per image and level)   the boxes there, in order of their index
//   prepare     (a warp per box, one per tile)  the weights of every box; for every tile a bit per box of its list
#pragma once

#include "taps.cuh"
#include "tiles.cuh"

namespace doublehead::roi_align::device {

constexpr int32_t kListThreads = 512, kPrepareWarps = 8;

// The boxes of image i on level l are numbers ranges[i * levels + l] of the arrays by box, in order of their index. One
// entry for each of the box scales.
struct Range {
  int32_t begin, end;
};

struct alignas(16) BoxWindow {
  Window rows, columns;  // the pixels that the box may touch
};

struct Place {
  int64_t pooled;  // where the box's output or its gradient begins, in elements of the tensor of its box scale
  int32_t scale, level;
};

template <typename W>
struct alignas(2 * sizeof(W)) PixelTap {
  int32_t pixel;
  W weight;
};

// A box's taps are room.rows + room.columns in `taps`, its bins those of the rows, then those of the columns, in `bins`. A
// bin with a negative count has no taps there: the box's weights do not fit.
template <typename W>
struct Boxes {
  int32_t* without;  // whether any box is without a table
  int64_t* pairs;    // of a box and a tile that it may touch, by image and level
  Range* ranges;
  BoxWindow* windows;
  Axes<W>* axes;
  Place* places;
  Bin* bins;
  PixelTap<W>* taps;
  Room room;
  int32_t bins_each, taps_each;  // of a box

  __device__ Bin* bins_of(int32_t box) const { return bins + int64_t(box) * bins_each; }
  __device__ PixelTap<W>* rows_of(int32_t box) const { return taps + int64_t(box) * taps_each; }
};

__device__ inline int64_t sum_of_warp(int64_t value) {
  for (int32_t step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Among the block's threads for which `keep` holds, in order of the threads: how many come before this one, and how many
// there are. `warps` is shared memory, one number for each warp. Contains barriers; `warps` may be used again at once.
template <int32_t kThreads>
__device__ inline int32_t count_before(bool keep, int32_t* warps, int32_t& total) {
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x, warp = thread / 32;
  const uint32_t kept = __ballot_sync(0xffffffffu, keep);
  if (thread % 32 == 0) warps[warp] = __popc(kept);
  __syncthreads();
  int32_t before = __popc(kept & ((1u << thread % 32) - 1u));
  total = 0;
  for (int32_t w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  __syncthreads();
  return before;
}

// Grid: images * levels, one block each. It counts the boxes that the blocks before it list, then lists its own.
template <typename W>
__global__ void __launch_bounds__(kListThreads)
    list_boxes(const __grid_constant__ Problem<W> problem, const __grid_constant__ Tiles tiles, const Boxes<W> boxes) {
  __shared__ int32_t warps[kListThreads / 32];
  __shared__ int64_t pairs[kListThreads / 32];
  const int32_t image = int32_t(blockIdx.x) / problem.levels, level = int32_t(blockIdx.x) % problem.levels;
  const Map& map = problem.maps[level];
  int32_t earlier = 0, total = 0;  // in blocks before this one
  for (int64_t roi = threadIdx.x; roi < problem.count; roi += kListThreads) {
    const Assignment assigned = assign_map(problem, roi);
    earlier += assigned.level >= 0 && (assigned.image < image || (assigned.image == image && assigned.level < level));
  }
  earlier = int32_t(__reduce_add_sync(0xffffffffu, uint32_t(earlier)));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = earlier;
  __syncthreads();
  int32_t begin = 0;
  for (int32_t w = 0; w < kListThreads / 32; ++w) begin += warps[w];
  __syncthreads();
  begin *= problem.scales;

  int32_t end = begin;
  int64_t touched = 0;
  for (int64_t first = 0; first < problem.count; first += kListThreads) {
    const int64_t roi = first + threadIdx.x;
    const Assignment assigned = roi < problem.count ? assign_map(problem, roi) : Assignment{-1, 0};
    const bool mine = assigned.level == level && assigned.image == image;
    const int32_t before = count_before<kListThreads>(mine, warps, total);
    for (int32_t scale = 0; mine && scale < problem.scales; ++scale) {
      const int32_t to = end + before * problem.scales + scale;
      const Axes<W> axes = find_axes(problem, roi, scale, level);
      const BoxWindow window = {window_of(axes.rows, problem.height, map.height),
                                window_of(axes.columns, problem.width, map.width)};
      boxes.windows[to] = window;
      boxes.axes[to] = axes;
      boxes.places[to] = {roi * problem.channels * problem.height * problem.width, scale, level};
      touched += tiles.touched(window.rows, kTile) * tiles.touched(window.columns, tiles.columns);
    }
    end += total * problem.scales;
  }
  touched = sum_of_warp(touched);
  if (threadIdx.x % 32 == 0) pairs[threadIdx.x / 32] = touched;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int32_t w = 1; w < kListThreads / 32; ++w) touched += pairs[w];
  boxes.pairs[blockIdx.x] = touched;
  boxes.ranges[blockIdx.x] = {begin, end};
  if (blockIdx.x == 0) *tiles.used = 0, *boxes.without = 0;
}

// A warp: the taps of box number `box`.
template <typename W>
__device__ inline void tabulate(const Problem<W>& problem, const Boxes<W>& boxes, int32_t box) {
  if (box >= boxes.ranges[problem.images * problem.levels - 1].end) return;
  const BoxWindow window = boxes.windows[box];
  const Axes<W> axes = boxes.axes[box];
  const Map& map = problem.maps[boxes.places[box].level];
  const Slots rows = slots_of(axes.rows, problem.height, problem.sampling_ratio, window.rows);
  const Slots columns = slots_of(axes.columns, problem.width, problem.sampling_ratio, window.columns);
  const bool fits = rows.total <= boxes.room.rows && columns.total <= boxes.room.columns;
  if (!fits && threadIdx.x % 32 == 0) *boxes.without = 1;
  PixelTap<W>* const taps = boxes.rows_of(box);
  for (int32_t i = threadIdx.x % 32; i < boxes.bins_each; i += 32) {
    const bool row = i < problem.height;
    PixelTap<W>* const mine = taps + (row ? 0 : boxes.room.rows);
    Bin bin = {0, -1};
    if (fits) {
      bin = fill_bin(choose_axis(axes, row), row ? i : i - problem.height, row ? map.height : map.width,
                     choose_slots(rows, columns, row),
                     [&](int32_t place, int32_t pixel, W weight) { mine[place] = {pixel, weight}; });
    }
    boxes.bins_of(box)[i] = bin;
  }
}

// A warp: which boxes touch tile `number`, and in how many parts it is summed. A part has at least kLeastPart boxes, and
// so many that all parts of all tiles together fit into tiles.slots.
template <typename W>
__device__ inline void list_tile(const Problem<W>& problem, const Tiles& tiles, const Boxes<W>& boxes, int64_t number) {
  const int32_t lane = threadIdx.x % 32;
  const Tile tile = find_tile(tiles, problem.levels, number);
  const int32_t map = tile.image * problem.levels + tile.level;
  const Range range = boxes.ranges[map];
  uint32_t* const bits = tiles.bits + tiles.first_word(range.begin, map, tile);
  int32_t count = 0;
#pragma unroll 4
  for (int32_t first = range.begin; first < range.end; first += 32) {
    BoxWindow window = {{0, 0}, {0, 0}};
    if (first + lane < range.end) window = boxes.windows[first + lane];
    const bool touches = window.rows.first < tile.top + kTile && window.rows.last > tile.top &&
                         window.columns.first < tile.left + tiles.columns && window.columns.last > tile.left;
    const uint32_t word = __ballot_sync(0xffffffffu, touches);
    if (lane == 0) bits[(first - range.begin) / 32 * tiles.most] = word;
    count += __popc(word);
  }
  TileWork work = {count, 1, 0, 0};
  if (count >= 2 * kLeastPart && tiles.slots > 0) {
    int64_t pairs = 0;
    for (int64_t i = lane; i < problem.images * problem.levels; i += 32) pairs += boxes.pairs[i];
    pairs = sum_of_warp(pairs);
    const int64_t share = (pairs + tiles.slots - 1) / tiles.slots;
    work.parts = int32_t(count / (share > kLeastPart ? share : kLeastPart));
    if (work.parts >= 2) {
      if (lane == 0) work.slot = atomicAdd(tiles.used, work.parts);
      work.slot = __shfl_sync(0xffffffffu, work.slot, 0);
      for (int32_t part = lane; part < work.parts; part += 32) tiles.parts[work.slot + part] = {number, part};
      for (int32_t chunk = lane; chunk < tiles.chunks; chunk += 32) {
        tiles.arrived[int64_t(work.slot) * tiles.chunks + chunk] = 0;
      }
    } else {
      work.parts = 1;
    }
  }
  if (lane == 0) tiles.work[number] = work;
}

// Grid: `table_blocks` blocks with a warp for each box, then blocks with a warp for each tile.
template <typename W>
__global__ void __launch_bounds__(32 * kPrepareWarps, sizeof(W) == 8 ? 1 : 4)
    prepare(const __grid_constant__ Problem<W> problem, const __grid_constant__ Tiles tiles, const Boxes<W> boxes,
            const unsigned table_blocks) {
  const int32_t warp = threadIdx.x / 32;
  if (blockIdx.x < table_blocks) {
    tabulate(problem, boxes, int32_t(blockIdx.x) * kPrepareWarps + warp);
  } else {
    const int64_t number = int64_t(blockIdx.x - table_blocks) * kPrepareWarps + warp;
    if (number < tiles.end[0]) list_tile(problem, tiles, boxes, number);
  }
}

}  // namespace doublehead::roi_align::device
