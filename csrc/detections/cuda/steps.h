// From logits to detections on a device, step by step: what memory it needs and what is launched in which order. It is the
// same for CUDA (detections.cu) and for the emulator of the tests, which bring their own way to launch.
//
// Nothing depends on the data but what the kernels do: three launches, and nothing is read back.
#pragma once

#include <algorithm>
#include <cstddef>

#include "merge.cuh"
#include "scores.cuh"
#include "suppress.cuh"

namespace doublehead::detections {

// Up to kMostRois, kMostClasses and kMostDetections, and at least one RoI, two classes and one detection.
struct Plan {
  int64_t images, rois, classes, most;

  int64_t column() const { return (rois + kRows - 1) / kRows * kRows; }
  int64_t lists() const { return images * (classes - 1); }  // one for each foreground class of each image
  int64_t each() const { return std::min(rois, most); }
};

// All that is needed on the device between the kernels, in one piece of memory.
struct Workspace {
  uint32_t* keys;
  uint64_t* kept;
  uint32_t* counts;
  int64_t bytes = 0;

  // With base null, only `bytes` is of use.
  Workspace(const Plan& plan, std::byte* base) {
    const auto take = [&]<typename T>(T*& array, int64_t count) {
      array = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
      bytes += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    };
    take(keys, plan.lists() * plan.column());
    take(kept, plan.lists() * plan.each());
    take(counts, plan.lists());
  }
};

struct Results {
  Corners* boxes;
  float* scores;
  int64_t *labels, *count;
};

// The device has launch(grid, threads, bytes of shared memory, kernel, arguments...).
template <typename T, typename Device>
void score(Device& device, const Plan& plan, Classifiers<T> classifiers, uint32_t* keys) {
  classifiers.rois = uint32_t(plan.rois), classifiers.classes = uint32_t(plan.classes);
  classifiers.column = uint32_t(plan.column());
  const auto blocks = uint32_t(plan.images * plan.column() / kRows);
  const size_t shared = size_t(plan.classes) * (kRows + 1) * sizeof(uint32_t);
  if (plan.classes <= 4 * 32) {
    device.launch(blocks, kScoreThreads, shared, score_classes<T, 4>, classifiers, keys);
  } else {
    device.launch(blocks, kScoreThreads, shared, score_classes<T, kMostClasses / 32>, classifiers, keys);
  }
}

template <typename T, typename D, typename P, typename Device>
void detect(Device& device, const Plan& plan, const Classifiers<T>& classifiers, const Boxes<D, P>& boxes,
            double iou_threshold, const Workspace& space, const Results& results) {
  const auto foreground = uint32_t(plan.classes - 1), column = uint32_t(plan.column()), each = uint32_t(plan.each());
  score(device, plan, classifiers, space.keys);
  const Suppression suppression{space.keys, foreground,  column, each, nms::make_rule<float>(iou_threshold),
                                space.kept, space.counts};
  device.launch(uint32_t(plan.lists()), kClassThreads, 0, suppress_class<D, P>, boxes, suppression);
  const Merging merging{space.kept,    space.counts,   foreground,     each,         uint32_t(plan.most),
                        results.boxes, results.scores, results.labels, results.count};
  device.launch(uint32_t(plan.images), kMergeThreads, 0, merge_classes<D, P>, boxes, merging);
}

}  // namespace doublehead::detections
