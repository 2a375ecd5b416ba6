// The Python module doublehead._C. Importing it registers the CPU operators linked into it (each csrc/<op>/cpu/<op>.cpp has
// its own STABLE_TORCH_LIBRARY_IMPL); build_info() says how it was built.
#include "python_module.h"

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

PyObject* build_info() {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:N,s:s}",
                       "compiler", DOUBLEHEAD_COMPILER,
                       "flags", DOUBLEHEAD_FLAGS,
                       "torch", DOUBLEHEAD_TORCH_VERSION,
                       "cuda_reason", DOUBLEHEAD_CUDA_REASON,
                       "multiversion", PyBool_FromLong(DOUBLEHEAD_HAS_MULTIVERSION),
                       "instruction_set", instruction_set());
}

}  // namespace

DOUBLEHEAD_PYTHON_MODULE(_C, "doublehead's CPU operators, registered with torch.", build_info)
