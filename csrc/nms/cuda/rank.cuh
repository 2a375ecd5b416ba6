// The CUDA kernel that orders few boxes: all of them are compared with all, which takes one launch where a sort takes
// a dozen that wait for each other.
#pragma once

#include "order.cuh"

namespace doublehead::nms {

constexpr uint32_t kRankThreads = 512, kRankRows = 32, kRankSpan = 1024;
constexpr uint32_t kRankSlice = kRankSpan / (kRankThreads / 32);  // of the columns, for a warp

// All that is known of the boxes when they are in order. By rank but for `list`.
template <typename C>
struct Ranked {
  uint32_t* order;   // b * N + n
  Corners<C>* corners;
  uint8_t* state;
  uint32_t* groups;  // null: one group; else numbers that ascend as the groups do
  uint32_t* list;    // the ranks, ordered by group and in a group by rank
};

template <typename Key>
struct RankShared {
  Key keys[kRankSpan];
  int64_t values[kRankSpan];  // the groups
  uint32_t sums[3][kRankThreads / 32][kRankRows];
};

// One for all kernels with such keys.
template <typename Key>
__device__ __forceinline__ RankShared<Key>& rank_shared() {
  __shared__ __align__(16) RankShared<Key> shared;
  return shared;
}

// A block ranks 32 boxes of an image: its lanes are the boxes, its warps share those to compare with.
template <typename T, typename S, typename C = typename ComputeIn<T>::type>
__global__ __launch_bounds__(kRankThreads) void rank_boxes(Strided<T> boxes, Strided<S> scores, Strided<int64_t> groups,
                                                           bool negative_is_padding, uint32_t count, Ranked<C> ranked,
                                                           Progress* progress, Together* together) {
  using Key = decltype(sort_key(typename ComputeIn<S>::type()));
  auto& [keys, values, sums] = rank_shared<Key>();
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t row_blocks = (count + kRankRows - 1) / kRankRows, image = blockIdx.x / row_blocks;
  const uint32_t first_row = blockIdx.x % row_blocks * kRankRows, row = first_row + lane;
  const bool grouped = groups.data != nullptr, there = row < count;
  const auto key_of = [&](uint32_t n) {
    return n < count ? sort_key(static_cast<typename ComputeIn<S>::type>(*scores.at(image, n))) : ~Key(0);
  };
  const Key key = key_of(row);
  const int64_t value = grouped && there ? *groups.at(image, row) : 0;

  // How many boxes are better; how many are of lesser groups; how many are better and of the same.
  uint32_t better = 0, lesser = 0, beside = 0;
  for (uint32_t base = 0; base < count; base += kRankSpan) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kRankSpan && base + i < count; i += kRankThreads) {
      keys[i] = key_of(base + i);
      if (grouped) values[i] = *groups.at(image, base + i);
    }
    __syncthreads();
    const uint32_t from = warp * kRankSlice, first = base + from;
    if (first >= count) continue;
    const uint32_t size = count - first < kRankSlice ? count - first : kRankSlice;
    const bool mixed = first <= first_row && first_row < first + kRankSlice;  // slices are aligned to rows
    // Of equal keys the earlier box is better. No key is the type's largest value.
    const auto compare = [&](uint32_t i, Key limit) {
      const bool before = keys[from + i] < limit;
      better += before;
      if (!grouped) return;
      const int64_t other = values[from + i];
      lesser += other < value;
      beside += before && other == value;
    };
    DOUBLEHEAD_MARK_BEGIN("nms: 8 comparisons");  // of a loop
    if (mixed) {
      for (uint32_t i = 0; i < size; ++i) compare(i, key + Key(first + i < row));
    } else {
      const Key limit = key + Key(first < first_row);
#pragma unroll 8
      for (uint32_t i = 0; i < size; ++i) compare(i, limit);
    }
    DOUBLEHEAD_MARK_END("nms: 8 comparisons");
  }
  sums[0][warp][lane] = better, sums[1][warp][lane] = lesser, sums[2][warp][lane] = beside;
  __syncthreads();
  if (blockIdx.x % row_blocks == 0 && threadIdx.x == 0) progress[image] = {{count, count}, count, 0};
  if (blockIdx.x == 0 && threadIdx.x == 0) *together = {};
  if (warp != 0 || !there) return;
  better = lesser = beside = 0;
  for (uint32_t w = 0; w < kRankThreads / 32; ++w) {
    better += sums[0][w][lane], lesser += sums[1][w][lane], beside += sums[2][w][lane];
  }
  const int64_t start = int64_t(image) * count, r = start + better;
  ranked.order[r] = start + row;
  ranked.corners[r] = load_corners<C>(boxes, image, row);
  ranked.state[r] = grouped && negative_is_padding && value < 0 ? kStruck : kUndecided;
  if (grouped) ranked.groups[r] = lesser;
  ranked.list[start + (grouped ? lesser + beside : better)] = better;
}

}  // namespace doublehead::nms
