// The four projects' level rules written out one by one, in the arithmetic of each dtype: what the kernels' rules, which
// are made of an epsilon and a place to add it, must equal to the last bit.
#include "emulation.h"

#include <algorithm>
#include <cmath>

namespace {

enum Project : int64_t { kTorchvision, kDetectron2, kMmdet, kMaskrcnnBenchmark };

// Index of the level, counted from the finest, whose number is `lowest`.
template <typename W>
int64_t level_of(const W* box, Project project, W canonical_size, int64_t canonical_level, int64_t lowest,
                 int64_t levels) {
  const W size = std::sqrt((box[2] - box[0]) * (box[3] - box[1]));
  W level = 0;
  switch (project) {
    case kTorchvision:
      level = std::floor(W(canonical_level) + std::log2(size / canonical_size) + W(1e-6)) - W(lowest);
      break;
    case kDetectron2:
      level = std::floor(W(canonical_level) + std::log2(size / canonical_size + W(1e-8))) - W(lowest);
      break;
    case kMmdet:
      level = std::floor(std::log2(size / std::ldexp(canonical_size, int(lowest - canonical_level)) + W(1e-6)));
      break;
    case kMaskrcnnBenchmark:
      level = std::floor(W(canonical_level) + std::log2(size / canonical_size + W(1e-6))) - W(lowest);
  }
  return int64_t(std::clamp(level, W(0), W(levels - 1)));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* level_rule(
    const void* boxes, int64_t count, int64_t is_double, int64_t project, double canonical_size,
    int64_t canonical_level, int64_t lowest, int64_t levels, int64_t* result) {
  const auto write = [&]<typename W>(const W* box) {
    for (int64_t i = 0; i < count; ++i, box += 4) {
      result[i] = level_of<W>(box, Project(project), W(canonical_size), canonical_level, lowest, levels);
    }
  };
  return report_errors([&] { is_double ? write(static_cast<const double*>(boxes)) : write(static_cast<const float*>(boxes)); });
}
