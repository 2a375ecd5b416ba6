// What every operator's CUDA host code shares: the current stream and device, error checks, launches.
// Launches go to torch's current stream of the tensors' device, workspace comes from torch's allocator (empty_on), and
// nothing waits for the device: so every operator can be captured in a CUDA graph.
#pragma once

#include "common.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>
#include <vector>

#if defined(__CUDACC__)
// DOUBLEHEAD_DYNAMIC_SHARED(float, buffer); in a kernel: `float* buffer`, the dynamic shared memory of its block, on a
// 16-byte boundary. The array behind it has one name and one type for all kernels, since it is one symbol.
#define DOUBLEHEAD_DYNAMIC_SHARED(type, name)                               \
  extern __shared__ __align__(16) unsigned char doublehead_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(doublehead_shared_memory)
#endif

// DOUBLEHEAD_CUDA_CHECK(cudaMemsetAsync(...)); throws what CUDA says.
#define DOUBLEHEAD_CUDA_CHECK(call) ::doublehead::check_cuda((call), #call)

namespace doublehead {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that does not stick to the device must not surface again elsewhere
  fail("CUDA error: ", cudaGetErrorString(status), " (", what, ")");
}

// While a stream is captured, CUDA refuses its thread what may wait for the device, which includes loading a kernel at
// its first launch. Loading is harmless to a capture, so launches allow it, as torch's allocator does for memory.
class AllowLoading {
 public:
  AllowLoading() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~AllowLoading() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllowLoading(const AllowLoading&) = delete;
  AllowLoading& operator=(const AllowLoading&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // the thread's own, while this lives
};

// Makes the tensor's device the current one for its lifetime, and knows torch's current stream there:
//   const OnDevice on(boxes);  kernel<<<grid, block, 0, on.stream()>>>(...);  on.check_launch("nms");
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    DOUBLEHEAD_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                     "torch has no current stream on cuda:", tensor.get_device_index());
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // Right after a launch: whether it could be launched. What goes wrong while it runs is reported by a later call.
  void check_launch(const char* what) const { check_cuda(cudaGetLastError(), what); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  AllowLoading allow_loading_;
  cudaStream_t stream_ = nullptr;
};

// Uninitialised memory on the tensor's device, from torch's allocator on the current stream.
inline Tensor empty_on(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

}  // namespace doublehead
