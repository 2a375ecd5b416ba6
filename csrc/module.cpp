// The Python module doublehead._C. Importing it registers the CPU operators linked into it (each csrc/<op>/cpu/<op>.cpp has
// its own STABLE_TORCH_LIBRARY_IMPL); build_info() says how it was built.
#include <pybind11/pybind11.h>

#include "build_config.h"
#include "common.h"

namespace {

// The instruction set that DOUBLEHEAD_MULTIVERSION functions run with on this processor.
const char* instruction_set() {
#if DOUBLEHEAD_HAS_MULTIVERSION
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "x86-64";
#else
  return "one version, as compiled";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = DOUBLEHEAD_COMPILER;
  info["flags"] = DOUBLEHEAD_FLAGS;
  info["torch"] = DOUBLEHEAD_TORCH_VERSION;
  info["cuda_reason"] = DOUBLEHEAD_CUDA_REASON;
  info["multiversion"] = bool(DOUBLEHEAD_HAS_MULTIVERSION);
  info["instruction_set"] = instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "doublehead's CPU operators, registered with torch.";
  module.def("build_info", &build_info, "How this module was built, and the instruction set it runs with here.");
}
