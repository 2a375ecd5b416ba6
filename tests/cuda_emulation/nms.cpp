// The CUDA kernels of non-maximum suppression, emulated: the steps are csrc/nms/steps.h's, only sorting is the host's.
#include "emulation.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "nms/steps.h"

namespace {

using namespace doublehead::nms;

struct Emulator {
  int64_t launches = 0;

  template <typename... Parameters, typename... Arguments>
  void launch(dim3 grid, uint32_t threads, void (*kernel)(Parameters...), const Arguments&... arguments) {
    emulate(grid, threads, 0, kernel, static_cast<Parameters>(arguments)...);
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
  Plan plan;
  Tensor boxes, scores, groups;
  double threshold;
  int64_t *indices, *counts;
};

template <typename T, typename S>
void run(const Call& call) {
  using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const size_t bytes = Workspace<C>(call.plan, 0, nullptr).bytes;
  // What comes from an allocator is garbage. Memory that is not written before it is read shows, as does a write behind.
  std::vector<std::byte> memory(bytes + 4096 + 256, std::byte(0xCD));
  auto* base = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256);
  std::fill_n(base + bytes, 3840, std::byte(0xA5));
  Workspace<C> space(call.plan, 0, base);
  Emulator emulator;
  suppress(emulator, call.plan, strided<T>(call.boxes), strided<S>(call.scores), strided<int64_t>(call.groups),
           call.threshold, space, call.indices, call.counts);
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
    int64_t count, double threshold, int64_t most, int64_t chunk, int64_t largest_segment, int64_t* indices,
    int64_t* counts) {
  return report_errors([&] {
    Plan plan = make_plan(images, count, most, groups != nullptr, negative_is_padding != 0);
    if (chunk > 0) plan.chunk = chunk, plan.rounds = (count + chunk - 1) / chunk;
    if (groups && largest_segment >= 0) plan.largest_segment = largest_segment;
    const Call call{plan,      {boxes, box_strides}, {scores, score_strides}, {groups, group_strides},
                    threshold, indices,              counts};
    dispatch(box_dtype, [&]<typename T>() { dispatch(score_dtype, [&]<typename S>() { run<T, S>(call); }); });
  });
}
