// The CUDA kernels of the detections, emulated: the steps are csrc/detections/cuda/steps.h's.
#include "emulation.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "detections/cuda/steps.h"

namespace {

using namespace doublehead::detections;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

struct Emulator {
  int64_t launches = 0;

  template <typename... Parameters, typename... Arguments>
  void launch(uint32_t grid, uint32_t threads, size_t shared, void (*kernel)(Parameters...),
              const Arguments&... arguments) {
    emulate(grid, threads, shared, kernel, static_cast<Parameters>(arguments)...);
    ++launches;
  }
};

// Of both functions below. dtypes: 0 float32, 1 float16, 2 bfloat16; those of sizes as Sizes::Type.
struct Call {
  const void *fc, *conv;  // conv: null if the first classifier alone counts
  const uint8_t* valid;
  const void *deltas, *proposals, *sizes;
  int64_t logit_dtype, delta_dtype, proposal_dtype, size_type;
  int64_t fusion, images, rois, classes, most;
  int64_t fc_strides[3], conv_strides[3], valid_strides[2], delta_strides[4], proposal_strides[3], size_strides[2];
  int64_t deltas_together, proposals_together;
  double score_threshold, nms_iou, min_size, least_side, weights[4];
};

template <typename Use>
void dispatch(int64_t dtype, const Use& use) {
  if (dtype == 0) return use.template operator()<float>();
  if (dtype == 1) return use.template operator()<Half>();
  use.template operator()<BFloat16>();
}

template <typename Use>
void dispatch_boxes(const Call& call, const Use& use) {
  dispatch(call.delta_dtype, [&]<typename D>() {
    if (call.proposal_dtype == 0) return use.template operator()<D, float>();
    use.template operator()<D, D>();
  });
}

template <typename T>
Logits<T> logits_of(const void* data, const int64_t* strides) {
  return {static_cast<const T*>(data), strides[0], strides[1], strides[2]};
}

template <typename T>
Classifiers<T> classifiers_of(const Call& call) {
  Classifiers<T> classifiers{};
  classifiers.first = logits_of<T>(call.fc, call.fc_strides);
  classifiers.second = logits_of<T>(call.conv, call.conv_strides);
  classifiers.valid = call.valid;
  classifiers.valid_image = call.valid_strides[0], classifiers.valid_roi = call.valid_strides[1];
  classifiers.fusion = Fusion(call.fusion), classifiers.threshold = float(call.score_threshold);
  return classifiers;
}

template <typename D, typename P>
Boxes<D, P> boxes_of(const Call& call) {
  BoxOptions options{{}, float(call.min_size), float(call.least_side)};
  for (int i = 0; i < 4; ++i) options.weights[i] = float(call.weights[i]);
  const int64_t *d = call.delta_strides, *p = call.proposal_strides;
  const Sizes sizes{call.sizes, call.size_strides[0], call.size_strides[1], Sizes::Type(call.size_type)};
  return {{static_cast<const D*>(call.deltas), d[3], call.deltas_together != 0}, d[0], d[1], d[2],
          {static_cast<const P*>(call.proposals), p[2], call.proposals_together != 0}, p[0], p[1], sizes, options};
}

// The box of each class of each RoI, and whether it is usable, by the function that the kernels call.
template <typename D, typename P>
__global__ void all_boxes(Boxes<D, P> boxes, int64_t rois, int64_t classes, Corners* made, uint8_t* usable) {
  const int64_t i = blockIdx.x, label = i % classes, roi = i / classes % rois, image = i / classes / rois;
  usable[i] = make_box_of(boxes, image, roi, label, made[i]);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* detections(const Call* call, float* boxes, float* scores,
                                                                         int64_t* labels, int64_t* count,
                                                                         int64_t* launches) {
  return report_errors([&] {
    const Plan plan{call->images, call->rois, call->classes, call->most};
    const int64_t bytes = Workspace(plan, nullptr).bytes;
    // What comes from an allocator is garbage. Memory that is not written before it is read shows, as does a write behind.
    std::vector<std::byte> memory(bytes + 4096 + 256, std::byte(0xCD));
    auto* base = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256);
    std::fill_n(base + bytes, 3840, std::byte(0xA5));
    const Workspace space(plan, base);
    Emulator emulator;
    dispatch(call->logit_dtype, [&]<typename T>() {
      dispatch_boxes(*call, [&]<typename D, typename P>() {
        detect(emulator, plan, classifiers_of<T>(*call), boxes_of<D, P>(*call), call->nms_iou, space,
               {reinterpret_cast<Corners*>(boxes), scores, labels, count});
      });
    });
    *launches = emulator.launches;
    for (size_t i = 0; i < 3840; ++i) {
      if (base[bytes + i] != std::byte(0xA5)) throw std::runtime_error("a write behind the workspace");
    }
  });
}

// The keys of score_classes alone.
extern "C" __attribute__((visibility("default"))) const char* detection_scores(const Call* call, uint32_t* keys) {
  return report_errors([&] {
    Emulator emulator;
    const Plan plan{call->images, call->rois, call->classes, call->most};
    dispatch(call->logit_dtype, [&]<typename T>() { score(emulator, plan, classifiers_of<T>(*call), keys); });
  });
}

extern "C" __attribute__((visibility("default"))) const char* detection_boxes(const Call* call, float* boxes,
                                                                              uint8_t* usable) {
  return report_errors([&] {
    dispatch_boxes(*call, [&]<typename D, typename P>() {
      emulate(uint32_t(call->images * call->rois * call->classes), 1, 0, all_boxes<D, P>, boxes_of<D, P>(*call),
              call->rois, call->classes, reinterpret_cast<Corners*>(boxes), usable);
    });
  });
}

extern "C" __attribute__((visibility("default"))) const char* detection_limits(int64_t* limits) {
  limits[0] = kMostRois, limits[1] = kMostClasses, limits[2] = kMostDetections;
  return nullptr;
}
