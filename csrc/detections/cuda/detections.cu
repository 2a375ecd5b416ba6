// Detections on CUDA: arguments, memory and launches. steps.h has the order of the steps.
#include "cuda_common.h"  // the kernels, which name no torch, use its macro
#include "steps.h"

#include <tuple>
#include <type_traits>
#include <vector>

namespace doublehead::detections {
namespace {

// How steps.h launches: on torch's current stream.
struct Cuda {
  const OnDevice& on;

  template <typename... Parameters, typename... Arguments>
  void launch(uint32_t grid, uint32_t threads, size_t shared, void (*kernel)(Parameters...),
              const Arguments&... arguments) {
    kernel<<<grid, threads, shared, on.stream()>>>(static_cast<Parameters>(arguments)...);
    on.check_launch("detections");
  }
};

struct Arguments {
  const std::vector<Tensor>& logits;
  const Tensor &deltas, &proposals, &valid, &sizes;
};

void check_shape(const Tensor& tensor, const std::vector<int64_t>& sizes, const Tensor& first, const char* what) {
  check_same_device(tensor, first, what);
  check_dim(tensor, int64_t(sizes.size()), what);
  for (size_t d = 0; d < sizes.size(); ++d) check_size(tensor, int64_t(d), sizes[d], what);
}

Plan check_arguments(const Arguments& in, int64_t most) {
  DOUBLEHEAD_CHECK(in.logits.size() == 1 || in.logits.size() == 2, "detections: logits must be 1 or 2 tensors, got ",
                   in.logits.size());
  const Tensor& first = in.logits[0];
  check_cuda_device(first, "detections: logits");
  check_dim(first, 3, "detections: logits");
  const int64_t images = first.size(0), rois = first.size(1), classes = first.size(2);
  check_shape(in.logits.back(), {images, rois, classes}, first, "detections: logits");
  check_dtype(in.logits.back(), first.scalar_type(), "detections: logits");
  check_shape(in.deltas, {images, rois, classes, 4}, first, "detections: deltas");
  check_shape(in.proposals, {images, rois, 4}, first, "detections: proposals");
  check_shape(in.valid, {images, rois}, first, "detections: valid");
  check_dtype(in.valid, ScalarType::Bool, "detections: valid");
  check_shape(in.sizes, {images, 2}, first, "detections: sizes");
  DOUBLEHEAD_CHECK(rois >= 1 && rois <= kMostRois, "detections: RoIs must be 1 to ", kMostRois, ", got ", rois);
  DOUBLEHEAD_CHECK(classes >= 2 && classes <= kMostClasses, "detections: classes must be 2 to ", kMostClasses, ", got ",
                   classes);
  DOUBLEHEAD_CHECK(most >= 1 && most <= kMostDetections, "detections: max_detections must be 1 to ", kMostDetections,
                   ", got ", most);
  DOUBLEHEAD_CHECK(images * std::max(rois, classes) <= INT32_MAX, "detections: too many images for one launch, ", images);
  return {images, rois, classes, most};
}

// As doublehead/ops/detections/by_class.py numbers them; with "none" the first classifier alone counts.
constexpr int64_t kNone = 3;

// float32, float16 or bfloat16.
template <typename Body>
void dispatch_single(ScalarType type, const char* what, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::Half: return body.template operator()<Half>();
    case ScalarType::BFloat16: return body.template operator()<BFloat16>();
    default: fail(what, " must be float32, float16 or bfloat16, got ", torch::headeronly::toString(type));
  }
}

template <typename T>
Logits<T> logits_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <typename T>
Classifiers<T> classifiers_of(const Arguments& in, int64_t fusion, double threshold) {
  Classifiers<T> classifiers{};
  classifiers.first = logits_of<T>(in.logits[0]);
  if (in.logits.size() == 2 && fusion != kNone) classifiers.second = logits_of<T>(in.logits[1]);
  classifiers.valid = static_cast<const uint8_t*>(in.valid.data_ptr());
  classifiers.valid_image = in.valid.stride(0), classifiers.valid_roi = in.valid.stride(1);
  classifiers.fusion = Fusion(fusion), classifiers.threshold = float(threshold);
  return classifiers;
}

Sizes sizes_of(const Tensor& sizes) {
  const auto type = [&] {
    switch (sizes.scalar_type()) {
      case ScalarType::Float: return Sizes::kFloat;
      case ScalarType::Double: return Sizes::kDouble;
      case ScalarType::Int: return Sizes::kInt;
      case ScalarType::Long: return Sizes::kLong;
      default: fail("detections: sizes must be float32, float64, int32 or int64");
    }
  }();
  return {sizes.data_ptr(), sizes.stride(0), sizes.stride(1), type};
}

// The last dimension of `tensor` is 4.
template <typename T>
Four<T> four_of(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  bool together = tensor.stride(last) == 1 && uintptr_t(tensor.data_ptr()) % (4 * sizeof(T)) == 0;
  for (int64_t d = 0; d < last; ++d) together = together && tensor.stride(d) % 4 == 0;
  return {static_cast<const T*>(tensor.data_ptr()), tensor.stride(last), together};
}

template <typename D, typename P>
Boxes<D, P> boxes_of(const Arguments& in, const BoxOptions& options) {
  const Tensor &deltas = in.deltas, &proposals = in.proposals;
  return {four_of<D>(deltas),    deltas.stride(0),    deltas.stride(1), deltas.stride(2),
          four_of<P>(proposals), proposals.stride(0), proposals.stride(1), sizes_of(in.sizes), options};
}

// Proposals are float32, or of the deltas' type.
template <typename Body>
void dispatch_boxes(const Arguments& in, const Body& body) {
  dispatch_single(in.deltas.scalar_type(), "detections: deltas", [&]<typename D>() {
    if (in.proposals.scalar_type() == in.deltas.scalar_type()) return body.template operator()<D, D>();
    check_dtype(in.proposals, ScalarType::Float, "detections: proposals");
    if constexpr (!std::is_same_v<D, float>) body.template operator()<D, float>();
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> detections_by_class(
    const std::vector<Tensor>& logits, const Tensor& deltas, const Tensor& proposals, const Tensor& valid,
    const Tensor& sizes, int64_t fusion, double score_threshold, double nms_iou, int64_t max_detections,
    double min_size, double least_side, const std::vector<double>& box_weights) {
  const Arguments in{logits, deltas, proposals, valid, sizes};
  const Plan plan = check_arguments(in, max_detections);
  DOUBLEHEAD_CHECK(fusion >= 0 && fusion <= kNone, "detections: fusion must be 0 to ", kNone, ", got ", fusion);
  DOUBLEHEAD_CHECK(box_weights.size() == 4, "detections: box_weights must be 4 numbers, got ", box_weights.size());
  BoxOptions options{{}, float(min_size), float(least_side)};
  for (int i = 0; i < 4; ++i) options.weights[i] = float(box_weights[i]);
  const OnDevice on(logits[0]);
  Tensor boxes = empty_on(deltas, {plan.images, plan.most, 4}, ScalarType::Float);
  Tensor scores = empty_on(deltas, {plan.images, plan.most}, ScalarType::Float);
  Tensor labels = empty_on(deltas, {plan.images, plan.most}, ScalarType::Long);
  Tensor count = empty_on(deltas, {plan.images}, ScalarType::Long);
  const Tensor memory = empty_on(deltas, {Workspace(plan, nullptr).bytes}, ScalarType::Byte);
  const Workspace space(plan, static_cast<std::byte*>(memory.data_ptr()));
  const Results results{static_cast<Corners*>(boxes.data_ptr()), static_cast<float*>(scores.data_ptr()),
                        static_cast<int64_t*>(labels.data_ptr()), static_cast<int64_t*>(count.data_ptr())};
  if (plan.images == 0) return {boxes, scores, labels, count};
  Cuda device{on};
  dispatch_single(logits[0].scalar_type(), "detections: logits", [&]<typename T>() {
    const Classifiers<T> classifiers = classifiers_of<T>(in, fusion, score_threshold);
    dispatch_boxes(in, [&]<typename D, typename P>() {
      detect(device, plan, classifiers, boxes_of<D, P>(in, options), nms_iou, space, results);
    });
  });
  return {boxes, scores, labels, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(doublehead, CUDA, m) { m.impl("detections_by_class", TORCH_BOX(&detections_by_class)); }

}  // namespace doublehead::detections
