#include "cuda_info.h"

#include "message.h"

#include <cuda_runtime.h>

namespace doublehead {

std::string compiled_archs() {
  std::string text;
  for (int arch : {__CUDA_ARCH_LIST__}) text += (text.empty() ? "" : ",") + std::to_string(arch / 10);
  return text;
}

int runtime_version() {
  int version = 0;
  const cudaError_t status = cudaRuntimeGetVersion(&version);
  if (status != cudaSuccess) fail("doublehead._C_cuda: ", cudaGetErrorString(status));
  return version;
}

}  // namespace doublehead
