// Greedy non-maximum suppression on CUDA: arguments, memory, sorting and launches. steps.h has the order of the steps.
#include "../arguments.h"
#include "cuda_common.h"
#include "steps.h"

#include <cub/device/device_radix_sort.cuh>

#include <array>
#include <atomic>
#include <optional>
#include <tuple>

namespace {

using namespace doublehead;
using namespace doublehead::nms;

// How steps.h launches and sorts: on torch's current stream.
class Cuda {
 public:
  explicit Cuda(const OnDevice& on) : on_(on) {}

  template <typename... Parameters, typename... Arguments>
  void launch(dim3 grid, uint32_t threads, void (*kernel)(Parameters...), const Arguments&... arguments) {
    kernel<<<grid, threads, 0, on_.stream()>>>(static_cast<Parameters>(arguments)...);
    on_.check_launch("nms");
  }

  // One launch of at most `blocks` blocks that run side by side.
  template <auto kKernel, typename Argument>
  void launch_together(uint32_t blocks, uint32_t threads, const Argument& argument) {
    void* arguments[] = {const_cast<Argument*>(&argument)};
    const auto* kernel = reinterpret_cast<const void*>(kKernel);
    cudaError_t status = cudaErrorCooperativeLaunchTooLarge;
    if (blocks > 1) {
      status = cudaLaunchCooperativeKernel(kernel, blocks, threads, arguments, 0, on_.stream());
    }
    if (status == cudaErrorCooperativeLaunchTooLarge) {  // one block waits for nobody: slow, but it works everywhere
      cudaGetLastError();
      status = cudaLaunchKernel(kernel, 1, threads, arguments, 0, on_.stream());
    }
    check_cuda(status, "nms");
  }

  // How many blocks of the kernel can run side by side on the current device; asked once for each.
  template <auto kKernel>
  static uint32_t blocks_together(uint32_t threads) {
    static std::array<std::atomic<uint32_t>, 64> known{};
    int device = 0;
    DOUBLEHEAD_CUDA_CHECK(cudaGetDevice(&device));
    std::atomic<uint32_t>& mine = known[device % known.size()];
    if (mine == 0) mine = ask_blocks_together(reinterpret_cast<const void*>(kKernel), threads, device);
    return mine;
  }

  void fill(void* memory, int byte, size_t bytes) {
    DOUBLEHEAD_CUDA_CHECK(cudaMemsetAsync(memory, byte, bytes, on_.stream()));
  }

  // Sorts stably by the lowest `bits` bits of the keys; what was the spare array may become the data.
  void sort(Pair<uint64_t>& keys, Pair<uint32_t>& values, uint32_t count, int bits) {
    cub::DoubleBuffer<uint64_t> key_buffer(keys.data, keys.spare);
    cub::DoubleBuffer<uint32_t> value_buffer(values.data, values.spare);
    DOUBLEHEAD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(sort_space, sort_bytes, key_buffer, value_buffer, count, 0,
                                                          bits, on_.stream()));
    keys = {key_buffer.Current(), key_buffer.Alternate()};
    values = {value_buffer.Current(), value_buffer.Alternate()};
  }

  // The memory that sorting `count` pairs by all bits needs.
  static size_t sort_needs(uint32_t count) {
    size_t bytes = 0;
    cub::DoubleBuffer<uint64_t> keys(nullptr, nullptr);
    cub::DoubleBuffer<uint32_t> values(nullptr, nullptr);
    DOUBLEHEAD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, values, count, 0, 64));
    return bytes;
  }

  void* sort_space = nullptr;
  size_t sort_bytes = 0;

 private:
  static uint32_t ask_blocks_together(const void* kernel, uint32_t threads, int device) {
    int supported = 0, each = 0, processors = 0;
    DOUBLEHEAD_CUDA_CHECK(cudaDeviceGetAttribute(&supported, cudaDevAttrCooperativeLaunch, device));
    DOUBLEHEAD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    DOUBLEHEAD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0));
    return supported ? std::max(each * processors, 1) : 1;
  }

  const OnDevice& on_;
};

// The arguments of one image have `dim` 2, those of a batch 3.
void check_on_cuda(const Tensor& boxes, const Tensor& scores, int64_t dim) {
  check_cuda_device(boxes, "nms: boxes");
  check_arguments(boxes, scores, dim);
  DOUBLEHEAD_CHECK(scores.numel() < int64_t(1) << 30, "nms: boxes must be fewer than 2^30");
}

// [B, N] or [B, N, 4]; or, of one image, [N] or [N, 4]. `n`: the dimension of N.
template <typename T>
Strided<T> strided(const Tensor& tensor, int64_t n) {
  return {static_cast<const T*>(tensor.data_ptr()), n > 0 ? tensor.stride(0) : 0, tensor.stride(n),
          tensor.dim() > n + 1 ? tensor.stride(n + 1) : 0};
}

// Fills indices [B, most] and counts [B]. groups: null if all boxes of an image are one group.
void suppress_on(const OnDevice& on, const Tensor& boxes, const Tensor& scores, const Tensor* groups,
                 bool negative_is_padding, double threshold, int64_t most, int64_t largest_group,
                 const Tensor& indices, const Tensor& counts) {
  const int64_t n = scores.dim() - 1, images = n > 0 ? scores.size(0) : 1, count = scores.size(n);
  int64_t* index_data = static_cast<int64_t*>(indices.data_ptr());
  int64_t* count_data = static_cast<int64_t*>(counts.data_ptr());
  Cuda device(on);
  if (images == 0) return;
  if (count == 0 || most == 0) {
    device.fill(count_data, 0, images * sizeof(int64_t));
    if (most > 0) device.fill(index_data, 0xff, images * most * sizeof(int64_t));
    return;
  }
  dispatch_floating(boxes.scalar_type(), "nms: boxes", [&]<typename T>() {
    dispatch_floating(scores.scalar_type(), "nms: scores", [&]<typename S>() {
      using C = compute_t<T>;
      const Plan plan = make_plan<C>(images, count, most, groups != nullptr, negative_is_padding, largest_group);
      const uint32_t blocks = blocks_of_decision(plan, Cuda::blocks_together<decide<C>>(kDecideThreads<C>));
      if (!plan.ranked) device.sort_bytes = Cuda::sort_needs(plan.total);
      const int64_t bytes = Workspace<C>(plan, blocks, device.sort_bytes, nullptr).bytes;
      const Tensor memory = empty_on(boxes, {bytes}, ScalarType::Byte);
      Workspace<C> space(plan, blocks, device.sort_bytes, static_cast<std::byte*>(memory.data_ptr()));
      device.sort_space = space.sort_space;
      suppress(device, plan, strided<T>(boxes, n), strided<S>(scores, n),
               groups ? strided<int64_t>(*groups, n) : Strided<int64_t>{}, threshold, blocks, space, index_data,
               count_data);
    });
  });
}

std::tuple<Tensor, Tensor> nms_padded_cuda(const Tensor& boxes, const Tensor& scores, const Tensor& groups,
                                           double threshold, int64_t max_output, int64_t largest_group) {
  check_on_cuda(boxes, scores, 3);
  check_groups(groups, scores);
  check_padded(max_output, largest_group);
  const OnDevice on(boxes);
  Tensor indices = empty_on(boxes, {boxes.size(0), max_output}, ScalarType::Long);
  Tensor counts = empty_on(boxes, {boxes.size(0)}, ScalarType::Long);
  suppress_on(on, boxes, scores, &groups, true, threshold, max_output, largest_group, indices, counts);
  return {indices, counts};
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups, double threshold) {
  check_on_cuda(boxes, scores, 2);
  if (groups) check_groups(*groups, scores);
  const OnDevice on(boxes);
  const int64_t most = boxes.size(0);
  Tensor indices = empty_on(boxes, {most}, ScalarType::Long), counts = empty_on(boxes, {1}, ScalarType::Long);
  suppress_on(on, boxes, scores, groups ? &*groups : nullptr, false, threshold, most, 0, indices, counts);
  int64_t kept = 0;  // the only wait for the device: the result's size
  DOUBLEHEAD_CUDA_CHECK(cudaMemcpyAsync(&kept, counts.data_ptr(), sizeof kept, cudaMemcpyDeviceToHost, on.stream()));
  DOUBLEHEAD_CUDA_CHECK(cudaStreamSynchronize(on.stream()));
  return torch::stable::narrow(indices, 0, 0, kept);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(doublehead, CUDA, m) {
  m.impl("nms_padded", TORCH_BOX(&nms_padded_cuda));
  m.impl("nms", TORCH_BOX(&nms_cuda));
}
