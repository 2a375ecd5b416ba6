// Backward: a block sums up a tile of a level's gradient, or a part of it, for a chunk of channels, in registers. It goes
// through the boxes that touch the tile in order of their index: within a part the order of the sums is that of the boxes,
// and parts are added in their order (tiles.cuh). Each element is written once: no atomics on it, no memset, and the same
// result every time.
#pragma once

#include "fill.cuh"
#include "async.cuh"

namespace doublehead::roi_align::device {

constexpr int32_t kGatherThreads = 512;        // channels-last
constexpr int32_t kPlanarGatherThreads = 256;
// When a gathering kernel has anything to do: always, or if every box has its weights in the table, or if one has not.
enum When : int32_t { kAlways, kAllInTable, kNotAllInTable };

template <typename W>
__device__ inline bool is_now(const Boxes<W>& boxes, When when) {
  return when == kAlways || (*boxes.without == 0) == (when == kAllInTable);
}

constexpr int32_t kStageBytes = 18 << 10;      // of gradients in shared memory; there are two such stages

// sums[i] += weights[i] * value, for the pixels that the bin reaches: zero times infinity is not a number.
template <int kPixels, int V, int kStep, typename W>
__device__ __forceinline__ void spread(const W (&weights)[kPixels], const W (&value)[V], W* sums) {
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    if (weights[i] != W(0)) {
#pragma unroll
      for (int v = 0; v < V; ++v) sums[i * kStep + v] = std::fma(weights[i], value[v], sums[i * kStep + v]);
    }
  }
}

template <int N, typename W>
__device__ __forceinline__ void load_weights(const W* from, W (&weights)[N]) {
  constexpr int V = 16 / sizeof(W);
#pragma unroll
  for (int i = 0; i < N; i += V) {
    const Vector<W, V> loaded = load<V>(from + i);
#pragma unroll
    for (int v = 0; v < V; ++v) weights[i + v] = loaded.at[v];
  }
}

// ---------------------------------------------------------------------------------------------
// Channels-last

// Of a chunk a lane has kEach channels, V side by side at a time: kEach / V times 32 V channels.
template <typename T>
constexpr int kEach = sizeof(T) == 8 ? 4 : 8;
template <typename T>
constexpr int kChunk = 32 * kEach<T>;
constexpr int kHalf = kTile / 2;  // pixels of a thread, side by side

// The bins of a box that stand in a stage at a time: rows [first, end) of those that reach the tile. Numbers up to 16.
struct Piece {
  uint32_t packed;

  __device__ static Piece make(int32_t box, int32_t first, int32_t end) {
    return {uint32_t(box) << 16 | uint32_t(first) << 8 | uint32_t(end)};
  }
  __device__ int32_t box() const { return int32_t(packed >> 16); }
  __device__ int32_t first() const { return int32_t(packed >> 8 & 0xff); }
  __device__ int32_t end() const { return int32_t(packed & 0xff); }
};

constexpr int32_t kMostPieces = kBatch * kMostBins<kTile>;

// A warp: the pieces of a batch's boxes, in order. Returns how many.
template <typename T, typename W>
__device__ inline int32_t list_pieces(Batch<T, W, kTile>& batch, Piece* pieces) {
  constexpr int32_t kStageBins = kStageBytes / (kChunk<T> * sizeof(T));
  static_assert(kStageBins >= kMostBins<kTile>);
  const int32_t lane = threadIdx.x;
  int32_t row = 0, end = 0, step = 1;
  if (lane < batch.at.count) {
    const Bins rows = batch.info[lane].of[kAllRows], columns = batch.info[lane].of[kAllColumns];
    const int32_t across = columns.end - columns.first;
    if (across > 0) row = rows.first, end = rows.end, step = kStageBins / across;
    batch.info[lane].inverse = (65536u + across) / (across + (across == 0));
  }
  const int32_t mine = (end - row + step - 1) / step;
  int32_t upto = mine;
  for (int32_t other = 1; other < 32; other *= 2) {
    const int32_t before = __shfl_up_sync(0xffffffffu, upto, other);
    if (lane >= other) upto += before;
  }
  for (int32_t at = upto - mine; row < end; ++at, row += step) {
    pieces[at] = Piece::make(lane, row, row + step < end ? row + step : end);
  }
  return __shfl_sync(0xffffffffu, upto, 31);
}

// All threads: copies the piece's gradients into a stage, T[rows, columns, kChunk]. A warp copies 32 vectors of a bin.
template <typename T, typename W, int V>
__device__ __forceinline__ void copy_piece(const Problem<W>& problem, const Batch<T, W, kTile>& batch, const Piece& piece,
                                           T* stage) {
  constexpr int N = kEach<T> / V;
  const BoxInfo<T>& info = batch.info[piece.box()];
  const Bins columns = info.of[kAllColumns];
  const int32_t across = columns.end - columns.first, units = (piece.end() - piece.first()) * across * N;
#pragma unroll 1
  for (int32_t unit = threadIdx.y; unit < units; unit += kGatherThreads / 32) {
    DOUBLEHEAD_MARK_BEGIN("roi_align: copy of a bin");
    const int32_t channel = batch.chunk * kChunk<T> + (unit % N * 32 + int32_t(threadIdx.x)) * V;
    if (channel < problem.channels) {
      const int32_t number = unit / N, row = int32_t(number * info.inverse >> 16), column = number - row * across;
      const int32_t bin = (piece.first() + row) * problem.width + columns.first + column;
      const T* const source = info.grads + bin * problem.channels + channel;
      T* const to = stage + (unit * 32 + threadIdx.x) * V;
      if constexpr (sizeof(T) * V == 16) {
        copy_async(to, source);
      } else {
        *to = *source;
      }
    }
    DOUBLEHEAD_MARK_END("roi_align: copy of a bin");
  }
}

// A warp: adds the piece to its pixels, bin column after bin column.
template <typename T, typename W, int V>
__device__ __forceinline__ void add_piece(const Batch<T, W, kTile>& batch, W* weights, const Piece& piece,
                                          const T* stage, W (&sums)[kHalf * kEach<T>]) {
  constexpr int N = kEach<T> / V;
  const int32_t row = threadIdx.y % kTile, half = threadIdx.y / kTile;
  const BoxInfo<T>& info = batch.info[piece.box()];
  Bins rows = info.of[row];
  const Bins columns = info.of[kHalves + half], all = info.of[kAllColumns];
  rows.first = rows.first < piece.first() ? piece.first() : rows.first;
  rows.end = rows.end > piece.end() ? piece.end() : rows.end;
  if (rows.first >= rows.end || columns.first >= columns.end) return;
  const int32_t bin_row = (all.end - all.first) * kChunk<T>;
  const T* from = stage + (rows.first - piece.first()) * bin_row + (columns.first - all.first) * kChunk<T> + threadIdx.x * V;
  const W* const row_weights = batch.rows_of(weights, piece.box()) + rows.first * kTile + row;
  const W* column_weights = batch.columns_of(weights, piece.box()) + columns.first * kTile + half * kHalf;
  const W* const end = column_weights + (columns.end - columns.first) * kTile;
  const int32_t count = rows.end - rows.first;
#pragma unroll 1
  for (; column_weights < end; from += kChunk<T>, column_weights += kTile) {
    DOUBLEHEAD_MARK_BEGIN("roi_align: column of bins");
#pragma unroll
    for (int n = 0; n < N; ++n) {
      W value[V] = {}, of_column[kHalf];
      const T* at = from + n * (32 * V);
#pragma unroll 1
      for (int32_t ph = 0; ph < count; ++ph, at += bin_row) {
        add_loaded<V>(load<V>(at), row_weights[ph * kTile], value);
      }
      load_weights(column_weights, of_column);
      spread<kHalf, V, kEach<T>>(of_column, value, sums + n * V);
    }
    DOUBLEHEAD_MARK_END("roi_align: column of bins");
  }
}

// Goes through a batch's boxes. While one piece is added, the next one's gradients are on their way. A piece's stage is
// free again once all have passed the barrier behind it.
template <typename T, typename W, int V>
__device__ __forceinline__ void add_batch(const Problem<W>& problem, Batch<T, W, kTile>& batch, W* weights,
                                          T* stages, W (&sums)[kHalf * kEach<T>]) {
  __shared__ Piece pieces[kMostPieces];
  __shared__ int32_t count;
  constexpr int32_t kStage = kStageBytes / sizeof(T);
  if (threadIdx.y == 0) {
    const int32_t listed = list_pieces(batch, pieces);
    if (threadIdx.x == 0) count = listed;
  }
  __syncthreads();
  if (count > 0) copy_piece<T, W, V>(problem, batch, pieces[0], stages);
#pragma unroll 1
  for (int32_t i = 0; i < count; ++i) {
    wait_for_copies();
    __syncthreads();
    if (i + 1 < count) copy_piece<T, W, V>(problem, batch, pieces[i + 1], stages + (i + 1) % 2 * kStage);
    add_piece<T, W, V>(batch, weights, pieces[i], stages + i % 2 * kStage, sums);
  }
}

// Grid: (slots + tiles) * chunks. A warp has half a row of the tile and all channels of the chunk. With V = 1 any box can be
// summed, and there may be less than two blocks at a time; else all boxes must have their taps in the table.
template <typename T, typename W, int V>
__global__ void __launch_bounds__(kGatherThreads, sizeof(T) == 8 || V == 1 ? 1 : 2)
    gather_channels_last(const __grid_constant__ Problem<W> problem, const __grid_constant__ Tiles tiles,
                         const __grid_constant__ Boxes<W> boxes, const int32_t batch_size, const When when) {
  DOUBLEHEAD_DYNAMIC_SHARED(T, stages);
  constexpr int N = kEach<T> / V;
  constexpr bool kAnyBox = V == 1;
  __shared__ Batch<T, W, kTile> batch;
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    begin(batch, problem, find_share(tiles, problem.levels, blockIdx.x / tiles.chunks),
          int32_t(blockIdx.x % tiles.chunks), batch_size);
    if (!is_now(boxes, when)) batch.share.any = false;
  }
  __syncthreads();
  if (!batch.share.any) return;
  W sums[kHalf * kEach<T>] = {};
  W* const weights = reinterpret_cast<W*>(stages + 2 * kStageBytes / sizeof(T));
  for_each_batch<kGatherThreads, kAnyBox>(problem, tiles, boxes, batch, weights, true, [&]() {
    add_batch<T, W, V>(problem, batch, weights, stages, sums);
  });
  if (batch.share.parts > 1 && !join_parts<kGatherThreads>(tiles, batch.share, batch.chunk, sums)) return;

  const Tile& tile = batch.share.tile;
  const Map& map = problem.maps[tile.level];
  const int32_t y = tile.top + int32_t(threadIdx.y) % kTile, x = tile.left + int32_t(threadIdx.y) / kTile * kHalf;
  if (y >= map.height) return;
  T* const to = static_cast<T*>(map.data) + tile.image * map.image_stride + y * map.row_stride + x * map.pixel_stride;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int32_t channel = batch.chunk * kChunk<T> + (n * 32 + int32_t(threadIdx.x)) * V;
    if (channel >= problem.channels) continue;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      W some[V];
#pragma unroll
      for (int v = 0; v < V; ++v) some[v] = sums[i * kEach<T> + n * V + v];
      if (x + i < map.width) store_global<V>(to + i * map.pixel_stride + channel, some);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Planar

// Grid: (slots + tiles) * chunks of 8 Q channels. A lane has a column of the tile, a warp Q channels: of every box, bin row
// after bin row, a lane combines the bins of its column and gives the sum to the pixels that they reach.
template <typename T, typename W, int Q>
__global__ void __launch_bounds__(kPlanarGatherThreads, 2)
    gather_planar(const __grid_constant__ Problem<W> problem, const __grid_constant__ Tiles tiles,
                  const __grid_constant__ Boxes<W> boxes, const int32_t batch_size, const When when) {
  DOUBLEHEAD_DYNAMIC_SHARED(W, weights);
  __shared__ Batch<T, W, kPlanarTile> batch;
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    begin(batch, problem, find_share(tiles, problem.levels, blockIdx.x / tiles.chunks),
          int32_t(blockIdx.x % tiles.chunks), batch_size);
    if (!is_now(boxes, when)) batch.share.any = false;
  }
  __syncthreads();
  if (!batch.share.any) return;
  const int64_t channel = (int64_t(batch.chunk) * (kPlanarGatherThreads / 32) + threadIdx.y) * Q;
  const int64_t area = int64_t(problem.height) * problem.width;
  int64_t offsets[Q];  // of the channels; those that do not exist read the last one, and are not written
#pragma unroll
  for (int q = 0; q < Q; ++q) offsets[q] = (channel + q < problem.channels ? channel + q : problem.channels - 1) * area;
  W sums[kTile * Q] = {};
  for_each_batch<kPlanarGatherThreads, true>(problem, tiles, boxes, batch, weights, false, [&]() {
    for (int32_t box = 0; box < batch.at.count; ++box) {
      const BoxInfo<T>& info = batch.info[box];
      const Bins columns = batch.of_column(box)[threadIdx.x], rows = info.of[kAllRows];
      const W* const column_weights = batch.columns_of(weights, box) + threadIdx.x;
      for (int32_t ph = rows.first; ph < rows.end; ++ph) {
        const T* const from = info.grads + int64_t(ph) * problem.width;
        W value[Q] = {}, of_row[kTile];
        for (int32_t pw = columns.first; pw < columns.end; ++pw) {
          const W weight = column_weights[pw * kPlanarTile];
#pragma unroll
          for (int q = 0; q < Q; ++q) value[q] = std::fma(weight, static_cast<W>(from[offsets[q] + pw]), value[q]);
        }
        load_weights(batch.rows_of(weights, box) + ph * kTile, of_row);
        spread<kTile, Q, Q>(of_row, value, sums);
      }
    }
  });
  if (batch.share.parts > 1 && !join_parts<kPlanarGatherThreads>(tiles, batch.share, batch.chunk, sums)) return;

  const Tile& tile = batch.share.tile;
  const Map& map = problem.maps[tile.level];
  const int32_t x = tile.left + threadIdx.x;
  if (x >= map.width) return;
  T* const to = static_cast<T*>(map.data) + tile.image * map.image_stride + x;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (channel + q >= problem.channels) break;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const int64_t y = tile.top + i;
      if (y >= map.height) break;
      to[(channel + q) * map.channel_stride + y * map.row_stride] = static_cast<T>(sums[i * Q + q]);
    }
  }
}

}  // namespace doublehead::roi_align::device
