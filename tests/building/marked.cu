// The CUDA kernels that have budgets (test_budgets.py), compiled to be read and never run: nvcc -cubin with the marks of
// csrc/marks.h. Only the variants that a detector launches.
#include "cuda_common.h"  // the kernels, which name no torch, use its macro

#include "detections/cuda/merge.cuh"
#include "detections/cuda/scores.cuh"
#include "detections/cuda/suppress.cuh"
#include "nms/cuda/decide.cuh"
#include "nms/cuda/rank.cuh"
#include "roi_align/cuda/backward.cuh"
#include "roi_align/cuda/forward_planar.cuh"

namespace doublehead {

using torch::headeronly::BFloat16;

extern const void* const kernels[];
const void* const kernels[] = {
    (const void*)roi_align::device::pool_channels_last<float, float, 4>,
    (const void*)roi_align::device::pool_channels_last<BFloat16, float, 8>,
    (const void*)roi_align::device::pool_planar<float, float>,
    (const void*)roi_align::device::prepare<float>,
    (const void*)roi_align::device::gather_channels_last<float, float, 4>,
    (const void*)roi_align::device::gather_channels_last<BFloat16, float, 8>,
    (const void*)nms::rank_boxes<float, float>,
    (const void*)nms::decide<float>,
    (const void*)detections::score_classes<BFloat16, 4>,
    (const void*)detections::suppress_class<float, float>,
    (const void*)detections::merge_classes<float, float>,
};

}  // namespace doublehead
