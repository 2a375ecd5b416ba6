// The CUDA kernels of non-maximum suppression, emulated: the steps are csrc/nms/cuda/steps.h's, only sorting is the host's.
#include "emulation.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "nms/cuda/steps.h"

namespace {

using namespace doublehead::nms;

struct Emulator {
  int64_t launches = 0;

  template <typename... Parameters, typename... Arguments>
  void launch(dim3 grid, uint32_t threads, void (*kernel)(Parameters...), const Arguments&... arguments) {
    emulate(grid, threads, 0, kernel, static_cast<Parameters>(arguments)...);
    ++launches;
  }

  template <auto kKernel, typename Argument>
  void launch_together(uint32_t blocks, uint32_t threads, const Argument& argument) {
    emulate_together(blocks, threads, 0, kKernel, argument);
    ++launches;
  }

  void fill(void* memory, int byte, size_t bytes) { std::memset(memory, byte, bytes); }

  // As the device does: only the lowest bits count, the order of equals stays, and the result may change places.
  void sort(Pair<uint64_t>& keys, Pair<uint32_t>& values, uint32_t count, int bits) {
    const uint64_t mask = bits < 64 ? (uint64_t(1) << bits) - 1 : ~uint64_t(0);
    std::vector<uint32_t> by_key(count);
    std::iota(by_key.begin(), by_key.end(), 0);
    std::stable_sort(by_key.begin(), by_key.end(),
                     [&](uint32_t a, uint32_t b) { return (keys.data[a] & mask) < (keys.data[b] & mask); });
    for (uint32_t i = 0; i < count; ++i) {
      keys.spare[i] = keys.data[by_key[i]];
      values.spare[i] = values.data[by_key[i]];
    }
    std::swap(keys.data, keys.spare);
    std::swap(values.data, values.spare);
  }
};

struct Tensor {
  const void* data;
  const int64_t* strides;  // image, item, coordinate
};

template <typename T>
Strided<T> strided(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.data), tensor.strides[0], tensor.strides[1], tensor.strides[2]};
}

struct Call {
  Tensor boxes, scores, groups;
  int64_t negative_is_padding, images, count, most, largest_group;
  int64_t chunk, largest_segment;  // in place of the plan's own, unless 0 and -1
  int64_t ranked, blocks;          // the same, unless -1; blocks that work together at most
  double threshold;
  int64_t *indices, *counts, *launches;
};

template <typename C>
Plan plan_of(const Call& call) {
  const bool grouped = call.groups.data != nullptr;
  const int64_t largest = call.largest_group;
  Plan plan = make_plan<C>(call.images, call.count, call.most, grouped, call.negative_is_padding, largest, call.ranked != 0);
  if (call.chunk > 0 && !plan.ranked) plan.chunk = std::min<uint32_t>(call.chunk, kLargestChunk);
  if (grouped && call.largest_segment >= 0 && !plan.ranked) {
    plan.largest_segment = std::min<int64_t>(call.largest_segment, kLargestSegment<C>);
  }
  return plan;
}

template <typename T, typename S>
void run(const Call& call) {
  using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Plan plan = plan_of<C>(call);
  const uint32_t blocks = blocks_of_decision(plan, call.blocks);
  const size_t bytes = Workspace<C>(plan, blocks, 0, nullptr).bytes;
  // What comes from an allocator is garbage. Memory that is not written before it is read shows, as does a write behind.
  std::vector<std::byte> memory(bytes + 4096 + 256, std::byte(0xCD));
  auto* base = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256);
  std::fill_n(base + bytes, 3840, std::byte(0xA5));
  Workspace<C> space(plan, blocks, 0, base);
  Emulator emulator;
  suppress(emulator, plan, strided<T>(call.boxes), strided<S>(call.scores), strided<int64_t>(call.groups),
           call.threshold, blocks, space, call.indices, call.counts);
  *call.launches = emulator.launches;
  for (size_t i = 0; i < 3840; ++i) {
    if (base[bytes + i] != std::byte(0xA5)) throw std::runtime_error("a write behind the workspace");
  }
}

// float32, float64, float16, bfloat16
template <typename Use>
void dispatch(int64_t dtype, const Use& use) {
  switch (dtype) {
    case 0: return use.template operator()<float>();
    case 1: return use.template operator()<double>();
    case 2: return use.template operator()<torch::headeronly::Half>();
    default: return use.template operator()<torch::headeronly::BFloat16>();
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* nms(
    const void* boxes, const int64_t* box_strides, int64_t box_dtype, const void* scores, const int64_t* score_strides,
    int64_t score_dtype, const void* groups, const int64_t* group_strides, int64_t negative_is_padding, int64_t images,
    int64_t count, double threshold, int64_t most, int64_t largest_group, int64_t chunk, int64_t largest_segment,
    int64_t ranked, int64_t blocks, int64_t* indices, int64_t* counts, int64_t* launches) {
  return report_errors([&] {
    const Call call{{boxes, box_strides}, {scores, score_strides}, {groups, group_strides}, negative_is_padding,
                    images,               count,                   most,                    largest_group,
                    chunk,                largest_segment,         ranked,                  blocks,
                    threshold,            indices,                 counts,                  launches};
    dispatch(box_dtype, [&]<typename T>() { dispatch(score_dtype, [&]<typename S>() { run<T, S>(call); }); });
  });
}

// plan: bytes of the workspace without those for sorting, of its masks, and boxes of a round; 0: no rounds.
extern "C" __attribute__((visibility("default"))) const char* nms_plan(int64_t images, int64_t count, int64_t grouped,
                                                                       int64_t is_double, int64_t largest_group,
                                                                       int64_t* plan) {
  const auto write = [&]<typename C>() {
    const Plan made = make_plan<C>(images, count, count, grouped != 0, true, largest_group);
    plan[0] = Workspace<C>(made, 264, 0, nullptr).bytes;
    plan[1] = uint64_t(images) * made.chunk * tiles_of(made.chunk) * sizeof(uint64_t);
    plan[2] = made.chunk;
  };
  return report_errors([&] { is_double ? write.template operator()<double>() : write.template operator()<float>(); });
}

namespace {

// Whether box i and box j suppress each other, of count boxes: by 32 at a time into `many`, by each pair into `single`.
template <typename T>
__global__ void test_rule(Rule<T> rule, const Corners<T>* boxes, int count, uint8_t* many, uint8_t* single) {
  const Box<T> box = measure(boxes[threadIdx.x]);
  for (int first = 0; first < count; first += 32) {
    const auto at = [&](int j) { return measure(boxes[first + j < count ? first + j : 0]); };
    const uint32_t bits = suppressed_by(rule, box, at);
    for (int j = 0; j < 32 && first + j < count; ++j) {
      many[threadIdx.x * count + first + j] = bits >> j & 1;
      single[threadIdx.x * count + first + j] = rule(box, at(j));
    }
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* nms_rule(const void* boxes, int64_t is_double, int64_t count,
                                                                       double threshold, uint8_t* many,
                                                                       uint8_t* single) {
  const auto test = [&]<typename T>() {
    emulate(1, count, 0, test_rule<T>, make_rule<T>(threshold), static_cast<const Corners<T>*>(boxes),
            static_cast<int>(count), many, single);
  };
  return report_errors([&] { is_double ? test.template operator()<double>() : test.template operator()<float>(); });
}
