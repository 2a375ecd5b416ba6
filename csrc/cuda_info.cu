#include "cuda_info.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace doublehead {

std::string compiled_archs() {
  std::string text;
  for (int arch : {__CUDA_ARCH_LIST__}) text += (text.empty() ? "" : ",") + std::to_string(arch / 10);
  return text;
}

int runtime_version() {
  int version = 0;
  const cudaError_t status = cudaRuntimeGetVersion(&version);
  if (status != cudaSuccess) throw std::runtime_error(std::string("doublehead._C_cuda: ") + cudaGetErrorString(status));
  return version;
}

}  // namespace doublehead
