// The Python module doublehead._C_cuda. Importing it registers the CUDA kernels linked into it (each csrc/<op>/cuda/<op>.cu
// has its own STABLE_TORCH_LIBRARY_IMPL); build_info() says how it was built.
#include <pybind11/pybind11.h>

#include "build_config.h"
#include "cuda_info.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = DOUBLEHEAD_CUDA_COMPILER;
  info["archs"] = doublehead::compiled_archs();
  info["cuda_runtime"] = doublehead::runtime_version();
  info["torch"] = DOUBLEHEAD_TORCH_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "doublehead's CUDA operators, registered with torch.";
  module.def("build_info", &build_info, "How this module was built.");
}
