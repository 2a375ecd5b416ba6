// The best detections of all classes of an image: the third kernel of the detections. No torch, no launch.
#pragma once

#include "boxes.cuh"
#include "sort.cuh"

namespace doublehead::detections {

constexpr uint32_t kMergeThreads = 1024;
constexpr uint32_t kMostDetections = 1024;
constexpr uint32_t kMostClasses = 1216;

struct Merging {
  const uint64_t* kept;    // [B, C - 1, each], of suppress_class
  const uint32_t* counts;  // [B, C - 1]
  uint32_t foreground, each, most;
  Corners* boxes;  // [B, most], as are scores and labels
  float* scores;
  int64_t *labels, *count;
};

// The best keys so far, in shared memory: `most` of them, and room for as many as there are threads.
struct Best {
  uint64_t keys[kMostDetections + kMergeThreads];
  uint32_t counts[kMostClasses];
  uint32_t used, longest;
};

__device__ __forceinline__ void load_counts(const uint32_t* counts, uint32_t foreground, Best& best) {
  if (threadIdx.x == 0) best.used = best.longest = 0;
  __syncthreads();
  uint32_t longest = 0;
  for (uint32_t i = threadIdx.x; i < foreground; i += kMergeThreads) {
    best.counts[i] = counts[i];
    longest = max(longest, counts[i]);
  }
  longest = __reduce_max_sync(0xffffffffu, longest);
  if (threadIdx.x % 32 == 0) atomicMax(&best.longest, longest);
  __syncthreads();
}

// Sorts the best `most` keys of the image to the front and returns how many there are.
//
// The lists of the classes are sorted, so all of them are read a few keys at a time, the best first, and only keys that
// are better than the worst of `most` are taken up. Where a sweep over the classes finds none, there are none behind it.
__device__ __forceinline__ uint32_t find_best(const Merging& problem, int64_t image, Best& best) {
  const uint32_t step = max(4u, kMergeThreads / problem.foreground), entries = problem.foreground * step;
  const uint64_t* kept = problem.kept + image * problem.foreground * problem.each;
  uint64_t limit = kNoKey;
  uint32_t found = 0;
  bool sorted = true, any = true;
  for (uint32_t from = 0; from < best.longest && any; from += step) {
    any = false;
    for (uint32_t first = 0; first < entries; first += kMergeThreads) {
      const uint32_t entry = first + threadIdx.x, column = entry / step, place = from + entry % step;
      uint64_t key = kNoKey;
      if (entry < entries && place < best.counts[column]) {
        const uint64_t listed = kept[int64_t(column) * problem.each + place];
        // Its RoI becomes its place among the candidates: ties go to the lower RoI, then to the lower class.
        key = key_of(listed >> 32, static_cast<uint32_t>(listed) * problem.foreground + column);
      }
      const bool better = key < limit;
      const uint32_t slot = take_slot(&best.used, better);
      if (better) best.keys[slot] = key;
      const bool changed = __syncthreads_or(better);
      found = best.used;
      any |= changed, sorted &= !changed;
      if (found > problem.most) {
        sort_keys<kMergeThreads>(best.keys, found);
        found = problem.most, limit = best.keys[problem.most - 1], sorted = true;
        if (threadIdx.x == 0) best.used = found;
      }
      __syncthreads();  // all have read `used`
    }
  }
  if (!sorted) sort_keys<kMergeThreads>(best.keys, found);
  return found;
}

// A block for each image: its detections, and zeros behind them.
template <typename D, typename P>
__global__ __launch_bounds__(kMergeThreads) void merge_classes(Boxes<D, P> boxes, Merging problem) {
  __shared__ Best best;
  const int64_t image = blockIdx.x;
  load_counts(problem.counts + image * problem.foreground, problem.foreground, best);
  const uint32_t found = find_best(problem, image, best);
  for (uint32_t i = threadIdx.x; i < problem.most; i += kMergeThreads) {
    Corners box = {};
    float score = 0.0f;
    int64_t label = 0;
    if (i < found) {
      const uint64_t key = best.keys[i];
      const uint32_t place = static_cast<uint32_t>(key);
      score = score_of(static_cast<uint32_t>(key >> 32));
      label = place % problem.foreground + 1;
      make_box_of(boxes, image, place / problem.foreground, label, box);
    }
    problem.boxes[image * problem.most + i] = box;
    problem.scores[image * problem.most + i] = score;
    problem.labels[image * problem.most + i] = label;
  }
  if (threadIdx.x == 0) problem.count[image] = found;
}

}  // namespace doublehead::detections
