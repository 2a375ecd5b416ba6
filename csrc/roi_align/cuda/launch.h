// Sizes of the launches, in plain C++: how many tiles, how much shared memory and workspace. Included after the kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace doublehead::roi_align::device {

constexpr int64_t kMostTaps = 896, kMostTableBins = 512;  // an axis; both axes. With 16 KiB of sums 48 KiB in all
constexpr size_t kBatchBytes = 40 << 10;                  // shared memory for a batch of boxes

// Room for the tables of any box, or as much as there may be: boxes that need more are pooled sample by sample.
template <typename W>
Room make_room(const Problem<W>& problem) {
  int64_t height = 0, width = 0;
  for (int32_t l = 0; l < problem.levels; ++l) {
    height = std::max<int64_t>(height, problem.maps[l].height);
    width = std::max<int64_t>(width, problem.maps[l].width);
  }
  const auto taps = [&](int64_t bins, int64_t extent) {
    const int64_t most = problem.sampling_ratio > 0 ? std::min(problem.sampling_ratio, kMostTaps) * 2 * bins
                                                    : extent + 2 * bins;
    return int32_t(std::min(most, kMostTaps));
  };
  const int64_t bins = int64_t(problem.height) + problem.width;
  if (bins > kMostTableBins) return {0, 0, 0};
  return {taps(problem.height, height), taps(problem.width, width), int32_t(bins + bins % 2)};
}

template <typename W>
size_t room_bytes(const Room& room) {
  return (room.rows + room.columns) * sizeof(Tap<W>) + room.bins * sizeof(Bin);
}

template <typename W>
Tiles make_tiles(const Problem<W>& problem, int32_t columns) {
  Tiles tiles{};
  int64_t end = 0;
  for (int32_t l = problem.levels - 1; l >= 0; --l) {
    const int64_t down = (int64_t(problem.maps[l].height) + kTile - 1) / kTile;
    const int64_t across = (int64_t(problem.maps[l].width) + columns - 1) / columns;
    tiles.across[l] = int32_t(across);
    tiles.each[l] = down * across;
    tiles.end[l] = end += down * across * problem.images;
  }
  return tiles;
}

// Shared memory for a box of a batch: lay_out_batch.
template <typename W>
size_t batch_bytes(const Problem<W>& problem, int32_t columns) {
  const size_t row_bins = std::min(problem.height, kMostBins), column_bins = std::min(problem.width, kMostBins);
  return (row_bins * kTile + column_bins * columns) * sizeof(W) + sizeof(void*) + (kTile + columns) * sizeof(Bins);
}

template <typename W>
int32_t batch_for(const Problem<W>& problem, int32_t columns) {
  return int32_t(std::min<size_t>(kBatch, kBatchBytes / batch_bytes(problem, columns)));
}

// The workspace of the backward: the lists of boxes.
template <typename W>
int64_t workspace_bytes(const Problem<W>& problem) {
  const int64_t items = problem.count * problem.scales;
  return items * int64_t(sizeof(BoxWindow) + sizeof(Axes<W>) + sizeof(int32_t)) + 8 +
         problem.images * problem.levels * int64_t(sizeof(Range));
}

template <typename W>
Boxes<W> lay_out_boxes(const Problem<W>& problem, unsigned char* workspace) {
  const int64_t items = problem.count * problem.scales;
  Boxes<W> boxes;
  boxes.windows = reinterpret_cast<BoxWindow*>(workspace);
  boxes.axes = reinterpret_cast<Axes<W>*>(boxes.windows + items);
  boxes.ranges = reinterpret_cast<Range*>(boxes.axes + items);
  boxes.items = reinterpret_cast<int32_t*>(boxes.ranges + problem.images * problem.levels);
  return boxes;
}

}  // namespace doublehead::roi_align::device
