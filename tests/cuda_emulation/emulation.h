// Runs CUDA kernels on the CPU, so that their index arithmetic and their barriers can be tested without a GPU.
//
//   #include "emulation.h"   // before the kernels' own header, under g++ -std=c++20
//   #include "nms/kernels.cuh"
//   emulate(grid, block, shared_bytes, kernel<float>, arguments...);
//
// Blocks run one after the other, and a block's threads take turns: a thread runs until it reaches a barrier or a warp
// collective, and is resumed once all that take part have reached it. So a run is deterministic, and threads that never
// meet are an error, as are lanes that meet at different places. The order of blocks and threads can be changed
// (emulation_set_order): a result that changes with it shows a missing barrier. Shared memory holds garbage when a block
// starts, and writes just outside of the dynamic part are an error. What this cannot show: races of single
// instructions, wrong memory fences, and anything of time.
#pragma once

#include <link.h>

#include <cstring>
#include <numeric>
#include <random>
#include <utility>

#include "meetings.h"
#include "threads.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static
// All of a module's thread-local variables lie in one segment, which the emulator finds and fills with garbage.
#define __shared__ static thread_local
#define DOUBLEHEAD_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(doublehead::emulation::dynamic_shared())
#ifndef DOUBLEHEAD_INLINE
#define DOUBLEHEAD_INLINE inline __attribute__((always_inline))
#endif

namespace doublehead::emulation {

// Fills the module's thread-local segment, which is its static shared memory.
inline void fill_static_shared() {
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void*) {
    const auto address = reinterpret_cast<uintptr_t>(&run_fiber);
    bool mine = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      const uintptr_t start = info->dlpi_addr + part.p_vaddr;
      mine |= part.p_type == PT_LOAD && address >= start && address < start + part.p_memsz;
      if (part.p_type == PT_TLS) bytes = part.p_memsz;
    }
    if (mine && bytes && info->dlpi_tls_data) std::memset(info->dlpi_tls_data, kGarbage, bytes);
    return 0;
  }, nullptr);
}

inline std::vector<size_t> in_order(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order > 1) std::shuffle(order.begin(), order.end(), std::mt19937(machine.order));
  return order;
}

inline void check_guards() {
  const std::byte* end = machine.shared.get() + kGuardBytes + machine.shared_bytes;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (machine.shared[i] != std::byte(kGuard)) fail("a write before the dynamic shared memory");
    if (end[i] != std::byte(kGuard)) fail("a write ", i, " bytes behind the end of the dynamic shared memory");
  }
}

inline void run_block(const std::vector<size_t>& order) {
  std::memset(machine.shared.get(), kGuard, machine.shared_bytes + 2 * kGuardBytes);
  std::memset(dynamic_shared(), kGarbage, machine.shared_bytes);
  fill_static_shared();
  for (size_t i = 0; i < machine.fibers.size(); ++i) {
    const unsigned t = static_cast<unsigned>(i);
    machine.fibers[i].thread = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    machine.fibers[i].state = Fiber::kReady;
  }
  while (true) {
    for (size_t i : order) {
      if (machine.fibers[i].state == Fiber::kReady) resume(machine.fibers[i]);
      if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
    }
    bool any = false, done = true;
    for (size_t w = 0; w < machine.fibers.size(); w += 32) {
      any |= release_warp(&machine.fibers[w], std::min<size_t>(32, machine.fibers.size() - w));
    }
    for (const Fiber& fiber : machine.fibers) done &= fiber.state == Fiber::kDone;
    if (done) break;
    if (!any) release_block();
  }
  check_guards();
}

}  // namespace doublehead::emulation

template <typename Kernel, typename... Arguments>
void emulate(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel, const Arguments&... arguments) {
  using namespace doublehead::emulation;
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > 1024 || block.z > 64) fail("a block cannot have ", threads, " threads");
  if (blocks < 1 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) fail("no such grid: ", blocks, " blocks");
  if (shared_bytes > kMaxShared) fail("a block cannot have ", shared_bytes, " bytes of shared memory");
  blockDim = block;
  gridDim = grid;
  if (machine.stack_count < threads) {
    machine.fibers.clear();
    machine.stacks.reset(new std::byte[threads * kStackBytes]);
    machine.stack_count = threads;
  }
  machine.fibers.resize(threads);
  machine.shared.reset(new std::byte[shared_bytes + 2 * kGuardBytes]);
  machine.shared_bytes = shared_bytes;
  machine.body = [&] { kernel(arguments...); };
  const std::vector<size_t> thread_order = in_order(threads);
  for (size_t b : in_order(blocks)) {
    const auto at = [&](size_t divisor, unsigned extent) { return static_cast<unsigned>(b / divisor % extent); };
    blockIdx = {at(1, grid.x), at(grid.x, grid.y), at(size_t(grid.x) * grid.y, grid.z)};
    try {
      run_block(thread_order);
    } catch (...) {
      machine.fibers.clear();  // their threads stand in the middle of a kernel
      throw;
    }
  }
}

// For functions called from Python: runs body() and returns what went wrong, or null.
template <typename Body>
const char* report_errors(const Body& body) {
  static std::string message;
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

extern "C" __attribute__((visibility("default"))) void emulation_set_order(int order) {
  doublehead::emulation::machine.order = order;
}

#include "intrinsics.h"
