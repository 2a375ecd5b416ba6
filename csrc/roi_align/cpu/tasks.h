// Division of the work among threads, and memory.
#pragma once

#include "plan.h"
#include "planar.h"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace doublehead::roi_align {

// Runs body(task) for every task on torch's threads; whichever thread is free takes the next one. `work` is the number
// of elements that all tasks touch together: waking a thread up costs more than some thousands of them.
template <typename Body>
void parallel_tasks(int64_t tasks, int64_t work, const Body& body) {
  constexpr int64_t worthwhile = 1 << 15;
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min({tasks, num_threads(), work / worthwhile + 1}), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) body(task);
  });
}

// Uninitialised memory on a cache line's boundary.
template <typename W>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<W*>(::operator new(count * sizeof(W), kAlignment))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, kAlignment); }
  W* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  W* data_;
};

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// A large result is new memory, and half of the backward's time would go into the page faults of its 4 KiB pages. All
// of it will be written, so large pages take no more memory.
template <typename T>
void ask_for_large_pages([[maybe_unused]] const std::vector<Tensor>& outputs) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096, worthwhile = uintptr_t(4) << 20;
  for (const Tensor& output : outputs) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(output.data_ptr());
    const uintptr_t begin = (address + page - 1) / page * page;
    const uintptr_t end = (address + output.numel() * sizeof(T)) / page * page;
    if (begin + worthwhile <= end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

// Elements of all outputs.
template <typename W>
int64_t pooled_elements(const Plan<W>& plan, int64_t channels) {
  return plan.pooled() * channels * plan.pooling().height * plan.pooling().width;
}

// The groups' items in ranges of at most `most`.
inline std::vector<Group> split(const std::vector<Group>& groups, int64_t most) {
  std::vector<Group> parts;
  for (const Group& group : groups) {
    for (int64_t begin = group.begin; begin < group.end; begin += most) {
      parts.push_back({group.level, group.image, begin, std::min(group.end, begin + most)});
    }
  }
  return parts;
}

// `maps`: a tensor of each level, for its width.
template <typename W>
std::vector<PlanarWeights<W>> planar_weights(const Plan<W>& plan, const std::vector<Tensor>& maps) {
  std::vector<PlanarWeights<W>> weights(plan.pooled());
  const std::vector<Group> parts = split(plan.groups(), 16);
  parallel_tasks(parts.size(), plan.pooled() * 256, [&](int64_t task) {
    for (int64_t i = parts[task].begin; i < parts[task].end; ++i) {
      PlanarWeights<W>& w = weights[i];
      plan.weights(plan.items()[i], parts[task].level, w.rows, w.columns);
      w.uniform = make_uniform(w.rows.bins);
      w.strip = make_strip(w.columns, maps[parts[task].level].size(3));
    }
  });
  return weights;
}

}  // namespace doublehead::roi_align
