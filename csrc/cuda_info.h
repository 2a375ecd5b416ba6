// What the CUDA part knows of itself and of a GPU.
#pragma once

#include <string>

namespace doublehead {

// The architectures the kernels were compiled for: "80,86,90".
std::string compiled_archs();

// The CUDA runtime linked in: 13000 is 13.0.
int runtime_version();

// The architecture whose code GPU `device` runs: the machine code's, or, if there is none for this GPU, that of the PTX
// it was translated from. Throws if the GPU can run neither.
int arch_on(int device);

}  // namespace doublehead
