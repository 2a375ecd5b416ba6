// Backward, before the sums: which boxes lie on which level of which image, and where.
#pragma once

#include "device.cuh"

namespace doublehead::roi_align::device {

constexpr int32_t kListThreads = 512;

// The boxes of image i on level l are numbers ranges[i * levels + l] of `windows`, `axes` and `items`, in order of
// their index. One entry for each of the box scales: item = roi * scales + scale.
struct Range {
  int32_t begin, end;
};

struct alignas(16) BoxWindow {
  Window rows, columns;  // the pixels that the box may touch
};

template <typename W>
struct Boxes {
  Range* ranges;
  BoxWindow* windows;
  Axes<W>* axes;
  int32_t* items;
};

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
    list_boxes(const __grid_constant__ Problem<W> problem, const Boxes<W> boxes) {
  __shared__ int32_t warps[kListThreads / 32];
  const int32_t image = int32_t(blockIdx.x) / problem.levels, level = int32_t(blockIdx.x) % problem.levels;
  const Map& map = problem.maps[level];
  int32_t earlier = 0, total = 0;  // in blocks before this one
  for (int64_t roi = threadIdx.x; roi < problem.count; roi += kListThreads) {
    const W of = problem.rois[roi * 5];
    if (!(of > W(-1) && of < W(problem.images)) || int32_t(of) > image) continue;
    earlier += int32_t(of) < image || assign_map(problem, roi).level < level;
  }
  earlier = int32_t(__reduce_add_sync(0xffffffffu, uint32_t(earlier)));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = earlier;
  __syncthreads();
  int32_t begin = 0;
  for (int32_t w = 0; w < kListThreads / 32; ++w) begin += warps[w];
  __syncthreads();
  begin *= problem.scales;

  int32_t end = begin;
  for (int64_t first = 0; first < problem.count; first += kListThreads) {
    const int64_t roi = first + threadIdx.x;
    const Assignment assigned = roi < problem.count ? assign_map(problem, roi) : Assignment{-1, 0};
    const bool mine = assigned.level == level && assigned.image == image;
    const int32_t before = count_before<kListThreads>(mine, warps, total);
    for (int32_t scale = 0; mine && scale < problem.scales; ++scale) {
      const int32_t to = end + before * problem.scales + scale;
      const Axes<W> axes = find_axes(problem, roi, scale, level);
      boxes.windows[to] = {window_of(axes.rows, problem.height, map.height),
                           window_of(axes.columns, problem.width, map.width)};
      boxes.axes[to] = axes;
      boxes.items[to] = int32_t(roi) * problem.scales + scale;
    }
    end += total * problem.scales;
  }
  if (threadIdx.x == 0) boxes.ranges[blockIdx.x] = {begin, end};
}

}  // namespace doublehead::roi_align::device
