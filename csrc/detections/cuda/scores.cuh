// Scores of all classes, class by class: the first kernel of the detections. No torch, no launch.
#pragma once

#include "marks.h"
#include "sort.cuh"

namespace doublehead::detections {

constexpr uint32_t kRows = 8;  // RoIs of a block, a warp for each: 8 keys are a sector of 32 bytes
constexpr uint32_t kScoreThreads = 32 * kRows;

enum Fusion : int32_t { kComplementary, kMax, kAverage };  // of two classifiers, in the order of FUSIONS in Python

// T[B, R, C], of any strides.
template <typename T>
struct Logits {
  const T* data;
  int64_t image, roi, label;
};

template <typename T>
struct Classifiers {
  Logits<T> first, second;  // second.data is null if the first alone counts
  const uint8_t* valid;     // [B, R]
  int64_t valid_image, valid_roi;
  uint32_t rois, classes;
  uint32_t column;  // keys of a class: `rois`, and more up to a multiple of kRows
  Fusion fusion;
  float threshold;
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x = std::fmax(x, __shfl_xor_sync(0xffffffffu, x, apart));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

// This lane's classes: lane, lane + 32, ...; -inf behind the last.
template <int kEach, typename T>
__device__ __forceinline__ void load_row(const Logits<T>& logits, int64_t image, int64_t roi, uint32_t classes,
                                         float (&x)[kEach]) {
  const T* row = logits.data + image * logits.image + roi * logits.roi;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint32_t label = threadIdx.x % 32 + 32 * i;
    x[i] = label < classes ? static_cast<float>(row[label * logits.label]) : -INFINITY;
  }
}

// As in PyTorch a NaN or +inf logit, or none but -inf, makes the whole row NaN. The order of the sum depends on the
// number of classes alone: equal rows have equal scores.
template <int kEach>
__device__ __forceinline__ void softmax(float (&x)[kEach]) {
  float most = x[0];
#pragma unroll
  for (int i = 1; i < kEach; ++i) most = std::fmax(most, x[i]);
  most = warp_max(most);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += x[i] = std::exp(x[i] - most);
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kEach; ++i) x[i] = x[i] / sum;
}

// doublehead/ops/score_fusion/reference.py
__device__ __forceinline__ float fuse(float fc, float conv, Fusion fusion) {
  if (fusion == kComplementary) return fc + conv * (1.0f - fc);
  if (fusion == kMax) return fc > conv || fc != fc ? fc : conv;
  return (fc + conv) * 0.5f;
}

// keys [B, C - 1, column]: nms.h's sort_key of the score of each foreground class of each RoI, kNoScore where that is no
// candidate. A block has kRows RoIs of an image, and turns the labels of a RoI into RoIs of a label in shared memory.
template <typename T, int kEach>
__global__ __launch_bounds__(kScoreThreads, 2) void score_classes(Classifiers<T> in, uint32_t* keys) {
  DOUBLEHEAD_DYNAMIC_SHARED(uint32_t, turned);  // [C][kRows + 1]
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = in.column / kRows;
  const uint32_t image = blockIdx.x / blocks, first = blockIdx.x % blocks * kRows, roi = first + warp;
  const bool exists = roi < in.rois && in.valid[image * in.valid_image + roi * in.valid_roi] != 0;
  float fc[kEach] = {}, conv[kEach] = {};
  DOUBLEHEAD_MARK_BEGIN("detections scores of a RoI");
  if (exists) {
    constexpr bool kAtOnce = kEach <= 4;  // both rows are under way; long ones would fill the registers
    load_row(in.first, image, roi, in.classes, fc);
    if (kAtOnce && in.second.data) load_row(in.second, image, roi, in.classes, conv);
    softmax(fc);
    if (in.second.data) {
      if (!kAtOnce) load_row(in.second, image, roi, in.classes, conv);
      softmax(conv);
#pragma unroll
      for (int i = 0; i < kEach; ++i) fc[i] = fuse(fc[i], conv[i], in.fusion);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint32_t label = lane + 32 * i;
    const uint32_t key = exists && fc[i] > in.threshold ? nms::sort_key(fc[i]) : kNoScore;
    if (label < in.classes) turned[label * (kRows + 1) + warp] = key;
  }
  DOUBLEHEAD_MARK_END("detections scores of a RoI");
  __syncthreads();
  uint32_t* mine = keys + int64_t(image) * (in.classes - 1) * in.column + first;
  for (uint32_t i = threadIdx.x; i < (in.classes - 1) * kRows; i += kScoreThreads) {
    const uint32_t column = i / kRows, row = i % kRows;  // label column + 1
    mine[int64_t(column) * in.column + row] = turned[(column + 1) * (kRows + 1) + row];
  }
}

}  // namespace doublehead::detections
