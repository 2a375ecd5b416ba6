// Sizes of the launches, in plain C++: how many tiles, how much shared memory and workspace. Included after the kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace doublehead::roi_align::device {

// Of an axis; bins of both axes. With 16 KiB of sums the planar forward has less than 48 KiB in all.
template <typename W>
constexpr int64_t kMostTaps = sizeof(W) == 8 ? 544 : 800;
constexpr int64_t kMostTableBins = 512;
constexpr size_t kMostShared = 42 << 10;                  // dynamic, of a block of the backward; it has up to 6 KiB more

// Room for the tables of any box, or as much as there may be: boxes that need more are pooled sample by sample.
template <typename W>
Room make_room(const Problem<W>& problem) {
  int64_t height = 0, width = 0;
  for (int32_t l = 0; l < problem.levels; ++l) {
    height = std::max<int64_t>(height, problem.maps[l].height);
    width = std::max<int64_t>(width, problem.maps[l].width);
  }
  const auto taps = [&](int64_t bins, int64_t extent) {
    const int64_t most = problem.sampling_ratio > 0 ? std::min(problem.sampling_ratio, kMostTaps<W>) * 2 * bins
                                                    : extent + 2 * bins;
    static_assert(kMostTaps<W> % 2 == 0);
    return int32_t(std::min(most + most % 2, kMostTaps<W>));  // even: what stands behind is then on 16 bytes
  };
  const int64_t bins = int64_t(problem.height) + problem.width;
  if (bins > kMostTableBins) return {0, 0, 0};
  return {taps(problem.height, height), taps(problem.width, width), int32_t(bins + bins % 2)};
}

template <typename W, typename O>
size_t room_bytes(const Room& room) {
  return (room.rows + room.columns) * sizeof(Tap<W, O>) + room.bins * sizeof(Bin);
}

// Of the planar forward.
template <typename W>
size_t planar_bytes(const Room& room) {
  static_assert(kMostTaps<W> * (2 * sizeof(Tap<W, int32_t>) + sizeof(RowTap<W>)) + kMostTableBins * sizeof(Bin) +
                    kPlanarSumBytes <= 47 << 10);
  return room_bytes<W, int32_t>(room) + (room.rows + kRowTaps) * sizeof(RowTap<W>) + kPlanarSumBytes;
}

// ---------------------------------------------------------------------------------------------
// Backward

// `chunks` of channels, each a block's.
template <typename W>
Tiles make_tiles(const Problem<W>& problem, int32_t columns, int64_t chunks) {
  Tiles tiles{};
  int64_t end = 0;
  for (int32_t l = problem.levels - 1; l >= 0; --l) {
    const int64_t down = (int64_t(problem.maps[l].height) + kTile - 1) / kTile;
    const int64_t across = (int64_t(problem.maps[l].width) + columns - 1) / columns;
    tiles.across[l] = int32_t(across);
    tiles.each[l] = down * across;
    tiles.end[l] = end += down * across * problem.images;
    tiles.most = std::max(tiles.most, down * across);
  }
  tiles.columns = columns;
  tiles.chunks = int32_t(chunks);
  const int64_t items = problem.count * problem.scales;
  tiles.slots = int32_t(std::min<int64_t>(items * tiles.most / kLeastPart, kMostSlots / chunks));
  return tiles;
}

// A launch of a gathering kernel.
template <typename W>
struct Gather {
  void (*kernel)(Problem<W>, Tiles, Boxes<W>, int32_t, When);
  When when;
  int32_t columns, threads, batch;  // columns of a tile; boxes of a batch
  int64_t channels, sums;           // of a block; sums: numbers
  size_t shared;                    // bytes, dynamic
};

template <int32_t kColumns, typename W>
Gather<W> make_gather(const Problem<W>& problem, void (*kernel)(Problem<W>, Tiles, Boxes<W>, int32_t, When), When when,
                      int32_t threads, int64_t channels, int64_t sums, size_t stages) {
  const size_t row_bins = std::min(problem.height, kMostBins<kColumns>);
  const size_t column_bins = std::min(problem.width, kMostBins<kColumns>);
  const size_t bytes = (row_bins * kTile + column_bins * kColumns) * sizeof(W);
  const int32_t batch = int32_t(std::min<size_t>(kBatch, (kMostShared - stages) / bytes));
  return {kernel, when, kColumns, threads, batch, channels, sums, stages + batch * bytes};
}

// The launches for a problem, which share a workspace. vectors: 16 bytes of channels can be loaded at once, everywhere.
template <typename T, typename W>
std::vector<Gather<W>> choose_gathers(const Problem<W>& problem, const Room& room, bool channels_last, bool vectors) {
  if (!channels_last) {
    constexpr int Q = sizeof(T) == 8 ? 2 : 4;
    return {make_gather<kPlanarTile>(problem, gather_planar<T, W, Q>, kAlways, kPlanarGatherThreads,
                                     kPlanarGatherThreads / 32 * Q, kPlanarGatherThreads * kTile * Q, 0)};
  }
  const auto launch = [&](auto kernel, When when) {
    return make_gather<kTile>(problem, kernel, when, kGatherThreads, kChunk<T>, kGatherThreads * kHalf * kEach<T>,
                              2 * kStageBytes);
  };
  constexpr auto kFast = gather_channels_last<T, W, 16 / sizeof(T)>;
  constexpr auto kAny = gather_channels_last<T, W, 1>;
  const int64_t ratio = problem.sampling_ratio;
  const bool fits = ratio > 0 && 2 * ratio * problem.height <= room.rows && 2 * ratio * problem.width <= room.columns;
  if (!vectors || room.rows == 0 || (ratio > 0 && !fits)) return {launch(kAny, kAlways)};
  if (fits) return {launch(kFast, kAlways)};
  return {launch(kFast, kAllInTable), launch(kAny, kNotAllInTable)};
}

// The workspace of the backward.
template <typename W>
struct Workspace {
  Boxes<W> boxes;
  Tiles tiles;
  int64_t bytes;
};

// Puts the backward's arrays into a workspace, those of the largest alignment first. `sums`: numbers that a block sums.
template <typename W>
Workspace<W> lay_out_workspace(const Problem<W>& problem, Tiles tiles, const Room& room, int64_t sums,
                               unsigned char* workspace) {
  const int64_t items = problem.count * problem.scales, maps = problem.images * problem.levels;
  Boxes<W> boxes{};
  int64_t bytes = 0;
  const auto place = [&]<typename X>(X*& array, int64_t count) {
    array = reinterpret_cast<X*>(workspace + bytes);
    bytes += (count * int64_t(sizeof(X)) + 15) / 16 * 16;
  };
  W* parts_sums = nullptr;
  place(parts_sums, int64_t(tiles.slots) * tiles.chunks * sums);
  tiles.sums = parts_sums;
  place(tiles.work, tiles.end[0]);
  place(tiles.parts, tiles.slots);
  place(tiles.arrived, int64_t(tiles.slots) * tiles.chunks);
  place(tiles.used, 1);
  place(tiles.bits, (items / 32 + maps + 1) * tiles.most);
  place(boxes.without, 1);
  place(boxes.pairs, maps);
  place(boxes.ranges, maps);
  place(boxes.windows, items);
  place(boxes.axes, items);
  place(boxes.places, items);
  place(boxes.bins, items * (int64_t(problem.height) + problem.width));
  place(boxes.taps, items * (int64_t(room.rows) + room.columns));
  boxes.room = room;
  boxes.bins_each = problem.height + problem.width;
  boxes.taps_each = room.rows + room.columns;
  return {boxes, tiles, bytes};
}

}  // namespace doublehead::roi_align::device
