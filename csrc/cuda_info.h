// What the CUDA part knows of itself; no GPU is needed to ask.
#pragma once

#include <string>

namespace doublehead {

// The architectures nvcc compiled for: "80,86,90".
std::string compiled_archs();

// The CUDA runtime linked in: 13000 is 13.0.
int runtime_version();

}  // namespace doublehead
