// The Python module doublehead._C_cuda. Importing it registers the CUDA kernels linked into it (each csrc/<op>/cuda/<op>.cu
// has its own STABLE_TORCH_LIBRARY_IMPL); build_info() says how it was built.
#include "python_module.h"

#include "build_config.h"
#include "cuda_info.h"

namespace {

PyObject* build_info() {
  return Py_BuildValue("{s:s,s:s,s:i,s:s}",
                       "compiler", DOUBLEHEAD_CUDA_COMPILER,
                       "archs", doublehead::compiled_archs().c_str(),
                       "cuda_runtime", doublehead::runtime_version(),
                       "torch", DOUBLEHEAD_TORCH_VERSION);
}

}  // namespace

DOUBLEHEAD_PYTHON_MODULE(_C_cuda, "doublehead's CUDA operators, registered with torch.", build_info)
