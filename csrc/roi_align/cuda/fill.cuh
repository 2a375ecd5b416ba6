// Backward: the weights of a batch of boxes on a tile, in shared memory. A warp fills in a box: each of its lanes puts the
// taps of one bin into place, and ballots tell which bins reach a pixel.
#pragma once

#include "boxes.cuh"
#include "marks.h"

namespace doublehead::roi_align::device {

constexpr int kTapsAtOnce = 4;  // loads under way
constexpr int32_t kBatch = 16;  // boxes whose weights are in shared memory at a time

// Bins of an axis whose weights are in shared memory at a time. Where a tile is narrow, half a warp has the rows' bins and
// the other half the columns'.
template <int32_t kColumns>
constexpr int32_t kMostBins = kColumns == kTile ? 16 : 32;

// Bins [first, end) of a box's part.
struct Bins {
  int32_t first, end;
};

// What a box's part does on the tile. of: the bins that reach row 0, 1, ... of the tile, the left and the right half of a
// channels-last tile, any row, any column.
template <typename T>
struct alignas(16) BoxInfo {
  const T* grads;
  Bins of[kTile + 4];
  uint32_t inverse;  // of how many columns of bins reach the tile, times 2^16 and rounded up: for divisions
};
constexpr int32_t kHalves = kTile, kAllRows = kTile + 2, kAllColumns = kTile + 3;  // places in BoxInfo::of

// Boxes [first, first + count) of a block's share, and of each the bins [top, top + rows) x [left, left + columns).
struct Position {
  int32_t first, count, top, left, rows, columns;
  int64_t corner;  // where the gradients of these bins begin, behind the box's
};

// The boxes of a batch. The weights are in the block's dynamic shared memory, all else in static. Nothing of it is kept in
// registers, which the sums need. Of each box up to kMostBins bins of each axis: W[bins, kTile] for the tile's rows,
// W[bins, kColumns] for its columns.
template <typename T, typename W, int32_t kColumns>
struct Batch {
  BoxInfo<T> info[kBatch];
  Bins of_columns[kColumns == kTile ? 1 : kBatch * kColumns];  // [boxes, kColumns], of each column of a planar tile
  int32_t queue[kBatch];   // the boxes' numbers
  int32_t row_bins, column_bins, size, most;  // most: boxes that there is room for
  int32_t chunk;           // of channels
  Position at;
  Share share;

  // weights: W[boxes, size]. A pointer kept in here would not be known to be one to shared memory.
  __device__ W* rows_of(W* weights, int32_t box) const { return weights + box * size; }
  __device__ W* columns_of(W* weights, int32_t box) const { return weights + box * size + row_bins * kTile; }
  __device__ Bins* of_column(int32_t box) { return of_columns + box * kColumns; }
};

// One thread; a barrier must follow.
template <typename T, typename W, int32_t kColumns>
__device__ inline void begin(Batch<T, W, kColumns>& batch, const Problem<W>& problem, const Share& share, int32_t chunk,
                             int32_t most) {
  batch.row_bins = problem.height < kMostBins<kColumns> ? problem.height : kMostBins<kColumns>;
  batch.column_bins = problem.width < kMostBins<kColumns> ? problem.width : kMostBins<kColumns>;
  batch.size = batch.row_bins * kTile + batch.column_bins * kColumns;
  batch.most = most;
  batch.chunk = chunk;
  batch.at = {share.first, 0, problem.height, 0, 0, 0, 0};
  batch.share = share;
}

// The weight of a pixel in a bin, sample by sample.
template <typename W>
__device__ inline W weight_of(const Axis<W>& axis, int32_t bin, int32_t pixel, int32_t extent) {
  const W from = W(pixel - 1), to = W(pixel + 1);  // samples in between read the pixel, also where they are clamped
  const Span<W> span = span_of(axis, bin, bin + 1);
  if (axis.samples == 0 || pixel >= extent || span.high < from || span.low > to) return W(0);
  const W share = W(1) / W(axis.samples);
  W sum = 0;
  for (int32_t sample = first_sample(axis, bin, from); sample < axis.samples; ++sample) {
    const W position = sample_position(axis, bin, sample);
    if (axis.bin > W(0) && position > to) break;
    if (!sample_counts(position, extent)) continue;
    const Bilinear<W> between = bilinear(position, extent);
    if (between.low == pixel) sum += between.low_weight * share;
    if (between.high == pixel && between.high != between.low) sum += between.high_weight * share;
  }
  return sum;
}

// One thread, one bin: its weights on pixels [first, first + kPixels). Returns a bit for each pixel that it reaches.
// kAnyBox: also of a box whose taps are in no table.
template <bool kAnyBox, int kPixels, typename W>
__device__ __forceinline__ uint32_t fill_weights(const Problem<W>& problem, const Boxes<W>& boxes, int32_t box, bool row,
                                                 int32_t bin, int32_t first, W* weights) {
  constexpr int V = 16 / sizeof(W);
  constexpr W kNothing[V] = {};
#pragma unroll
  for (int i = 0; i < kPixels; i += V) store<V>(weights + i, kNothing);
  const Bin taps = boxes.bins_of(box)[row ? bin : problem.height + bin];
  uint32_t reached = 0;
  if (kAnyBox && taps.count < 0) {
    const Axis<W> axis = choose_axis(boxes.axes[box], row);
    const Map& map = problem.maps[boxes.places[box].level];
    for (int32_t i = 0; i < kPixels; ++i) {
      weights[i] = weight_of(axis, bin, first + i, row ? map.height : map.width);
      if (weights[i] != W(0)) reached |= 1u << i;
    }
    return reached;
  }
  const PixelTap<W>* const from = boxes.rows_of(box) + (row ? 0 : boxes.room.rows) + taps.begin;
#pragma unroll 1
  for (int32_t i = 0; i < taps.count; i += kTapsAtOnce) {
    PixelTap<W> some[kTapsAtOnce];
#pragma unroll
    for (int j = 0; j < kTapsAtOnce; ++j) some[j] = i + j < taps.count ? from[i + j] : PixelTap<W>{first, W(0)};
#pragma unroll
    for (int j = 0; j < kTapsAtOnce; ++j) {
      const uint32_t at = uint32_t(some[j].pixel - first);
      if (at >= uint32_t(kPixels) || some[j].weight == W(0)) continue;
      weights[at] = some[j].weight;  // a bin has one tap for a pixel
      reached |= 1u << at;
    }
  }
  return reached;
}

__device__ __forceinline__ Bins bins_of(uint32_t bits) {
  return bits ? Bins{__ffs(int(bits)) - 1, 32 - __clz(int(bits))} : Bins{0, 0};
}

// A bit for each lane whose bin reaches pixel number `lane` of kPixels.
template <int kPixels>
__device__ __forceinline__ uint32_t transpose(uint32_t reached, int32_t lane) {
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const uint32_t bins = __ballot_sync(0xffffffffu, reached >> i & 1);
    if (lane == i) mine = bins;
  }
  return mine;
}

// A warp: fills in box number `to` of the batch.
template <bool kAnyBox, typename T, typename W, int32_t kColumns>
__device__ __forceinline__ void fill_box(const Problem<W>& problem, const Boxes<W>& boxes, Batch<T, W, kColumns>& batch,
                                         W* weights, int32_t to) {
  const int32_t lane = threadIdx.x, box = batch.queue[to];
  const Position& part = batch.at;
  const Tile& tile = batch.share.tile;
  W* const rows = batch.rows_of(weights, to);
  W* const columns = batch.columns_of(weights, to);
  BoxInfo<T>& info = batch.info[to];
  uint32_t of_rows, all_rows, all_columns, halves[2] = {0, 0};  // bits for bins
  if constexpr (kColumns == kTile) {
    const bool row = lane < 16;
    const int32_t bin = lane % 16;
    uint32_t reached = 0;
    if (bin < (row ? part.rows : part.columns)) {
      reached = fill_weights<kAnyBox, kTile>(problem, boxes, box, row, (row ? part.top : part.left) + bin,
                                    row ? tile.top : tile.left, (row ? rows : columns) + bin * kTile);
    }
    of_rows = transpose<kTile>(reached, lane) & 0xffffu;
    const uint32_t all = __ballot_sync(0xffffffffu, reached != 0);
    all_rows = all & 0xffffu, all_columns = all >> 16;
    halves[0] = __ballot_sync(0xffffffffu, (reached & 0x0fu) != 0) >> 16;
    halves[1] = __ballot_sync(0xffffffffu, (reached & 0xf0u) != 0) >> 16;
  } else {
    uint32_t reached = 0;
    if (lane < part.rows) {
      reached = fill_weights<kAnyBox, kTile>(problem, boxes, box, true, part.top + lane, tile.top, rows + lane * kTile);
    }
    of_rows = transpose<kTile>(reached, lane);
    all_rows = __ballot_sync(0xffffffffu, reached != 0);
    reached = 0;
    if (lane < part.columns) {
      reached = fill_weights<kAnyBox, kColumns>(problem, boxes, box, false, part.left + lane, tile.left,
                                                columns + lane * kColumns);
    }
    all_columns = __ballot_sync(0xffffffffu, reached != 0);
    batch.of_column(to)[lane] = bins_of(transpose<kColumns>(reached, lane));
  }
  if (lane < kTile + 4) {
    info.of[lane] = bins_of(lane < kTile ? of_rows : lane == kHalves ? halves[0] : lane == kHalves + 1 ? halves[1]
                            : lane == kAllRows ? all_rows : all_columns);
  } else if (lane == kTile + 4) {
    const Place place = boxes.places[box];
    info.grads = static_cast<const T*>(problem.pooled[place.scale]) + place.pooled + part.corner;
  }
}

// A warp: numbers [from, end) of the boxes that touch the tile, into `queue`.
template <typename W>
__device__ inline void look_up(const Problem<W>& problem, const Tiles& tiles, const Boxes<W>& boxes, const Tile& tile,
                               int32_t from, int32_t end, int32_t* queue) {
  const int32_t lane = threadIdx.x, map = tile.image * problem.levels + tile.level;
  const Range range = boxes.ranges[map];
  const uint32_t* const bits = tiles.bits + tiles.first_word(range.begin, map, tile);
  const int32_t words = (range.end - range.begin + 31) / 32;
  int32_t seen = 0;
  for (int32_t first = 0; first < words && seen < end; first += 32) {
    uint32_t word = first + lane < words ? bits[(first + lane) * tiles.most] : 0;
    int32_t upto = __popc(word);
    int32_t at = seen - upto;
    for (int32_t step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(0xffffffffu, upto, step);
      if (lane >= step) upto += other;
    }
    at += upto;
    seen += __shfl_sync(0xffffffffu, upto, 31);
    for (; word != 0 && at < end; word &= word - 1, ++at) {
      if (at >= from) queue[at - from] = range.begin + (first + lane) * 32 + __ffs(int(word)) - 1;
    }
  }
}

// A warp: goes on to the next bins of the batch, or to the next batch; one without boxes is behind the last.
template <typename T, typename W, int32_t kColumns>
__device__ inline void advance(const Problem<W>& problem, const Tiles& tiles, const Boxes<W>& boxes,
                               Batch<T, W, kColumns>& batch, bool channels_last) {
  Position at = batch.at;
  __syncwarp();
  at.left += at.columns;
  if (at.left >= problem.width) at.left = 0, at.top += at.rows;
  if (at.top >= problem.height) {
    at.first += at.count;
    const int32_t left = batch.share.end - at.first;
    at.count = left < batch.most ? left : batch.most;
    at.top = at.left = 0;
    look_up(problem, tiles, boxes, batch.share.tile, at.first, at.first + at.count, batch.queue);
  }
  const int32_t rows = problem.height - at.top, columns = problem.width - at.left;
  at.rows = rows < batch.row_bins ? rows : batch.row_bins;
  at.columns = columns < batch.column_bins ? columns : batch.column_bins;
  at.corner = (int64_t(at.top) * problem.width + at.left) * (channels_last ? problem.channels : 1);
  if (threadIdx.x == 0) batch.at = at;
}

// Fills in the boxes of a block's share, batch after batch, and calls add() for each, in all threads.
template <int kThreads, bool kAnyBox, typename T, typename W, int32_t kColumns, typename Add>
__device__ __forceinline__ void for_each_batch(const Problem<W>& problem, const Tiles& tiles, const Boxes<W>& boxes,
                                               Batch<T, W, kColumns>& batch, W* weights, bool channels_last, Add add) {
  while (true) {
    if (threadIdx.y == 0) advance(problem, tiles, boxes, batch, channels_last);
    __syncthreads();
    if (batch.at.count == 0) return;
#pragma unroll 1
    for (int32_t box = threadIdx.y; box < batch.at.count; box += kThreads / 32) {
      DOUBLEHEAD_MARK_BEGIN("roi_align: fill of a box");
      fill_box<kAnyBox>(problem, boxes, batch, weights, box);
      DOUBLEHEAD_MARK_END("roi_align: fill of a box");
    }
    __syncthreads();
    add();
    __syncthreads();
  }
}

}  // namespace doublehead::roi_align::device
