#include "cuda_info.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace doublehead {
namespace {

// Never launched: its attributes say which of the compiled versions fits a GPU.
__global__ void probe() {}

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("doublehead._C_cuda: ") + cudaGetErrorString(status));
}

}  // namespace

std::string compiled_archs() {
  std::string text;
  for (int arch : {__CUDA_ARCH_LIST__}) text += (text.empty() ? "" : ",") + std::to_string(arch / 10);
  return text;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version));
  return version;
}

int arch_on(int device) {
  int current = 0;
  check(cudaGetDevice(&current));
  check(cudaSetDevice(device));
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe);
  check(cudaSetDevice(current));
  check(status);
  return attributes.binaryVersion;
}

}  // namespace doublehead
