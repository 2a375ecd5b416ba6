// Runs CUDA kernels on the CPU, so that their index arithmetic and their barriers can be tested without a GPU.
//
//   #include "emulation.h"   // before the kernels' own header, under g++ -std=c++20
//   #include "nms/kernels.cuh"
//   emulate(grid, block, shared_bytes, kernel<float>, arguments...);
//
// A block's threads take turns: a thread runs until it reaches a barrier or a warp collective, and is resumed once all
// that take part have reached it. Blocks run one after the other, or some of them take turns, each with a few threads at
// a time and with a pause before every atomic operation. So a run is deterministic, and threads that never meet are an
// error, as are lanes that meet at different places. The orders of threads and of blocks can be changed
// (emulation_set_order): a result that changes with them shows a missing barrier, or blocks that rely on each other. Warps
// go from one meeting of their lanes to the next in step, or each as far as it gets, which shows a barrier of a warp in
// place of one of the block.
// Shared memory holds garbage when a block starts, and writes just outside of the dynamic part are an error. What this
// cannot show: races between single instructions, since a thread loses its turn only at barriers, collectives and
// atomics; the memory model, since every write is seen at once by all; how warps are scheduled; and anything of time.
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

// Threads that run before another block does: a warp of a small block, a quarter of a large one.
inline size_t turn_of(size_t threads) { return std::max<size_t>(32, threads / 4); }

// The module's thread-local segment, which is its static shared memory.
struct Segment {
  void* data;
  size_t bytes;
};

// One of the segment's variables. A thread's segment is allocated when it first uses one, so until then there is none to
// be found: static_shared() takes this one's address before it looks.
static thread_local std::byte in_segment;

inline Segment static_shared() {
  struct Search {
    const std::byte* variable;
    Segment found;
  } search{&in_segment, {}};
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void* data) {
    auto& [variable, found] = *static_cast<Search*>(data);
    const auto* start = static_cast<const std::byte*>(info->dlpi_tls_data);
    for (int i = 0; start && i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      const bool holds = part.p_type == PT_TLS && variable >= start && variable < start + part.p_memsz;
      if (holds) found = {info->dlpi_tls_data, part.p_memsz};
    }
    return 0;
  }, &search);
  if (!search.found.data) fail("the static shared memory is not found");
  return search.found;
}

inline std::vector<size_t> in_order(size_t count, Order by) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (by == 1) std::reverse(order.begin(), order.end());
  if (by > 1) std::shuffle(order.begin(), order.end(), std::mt19937(by));
  return order;
}

inline void check_guards(const Block& block) {
  const std::byte* start = block.shared.get();
  const std::byte* end = start + kGuardBytes + machine.shared_bytes;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (start[i] != std::byte(kGuard)) fail("a write before the dynamic shared memory");
    if (end[i] != std::byte(kGuard)) fail("a write ", i, " bytes behind the end of the dynamic shared memory");
  }
}

// Room for `count` blocks of `threads` threads.
inline void prepare(size_t count, size_t threads) {
  if (machine.blocks.size() < count) machine.blocks.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Block& block = machine.blocks[i];
    if (block.stack_count < threads) {
      block.fibers.clear();
      block.stacks.reset(new std::byte[threads * kStackBytes]);
      block.stack_count = threads;
    }
    block.fibers.resize(threads);
    block.shared.reset(new std::byte[machine.shared_bytes + 2 * kGuardBytes]);
    block.running = false;
  }
}

// Gives the turn to a block; its static shared memory lies where that of the one before lay.
inline void switch_to(Block& block, const Segment& segment) {
  if (machine.block == &block) return;
  const auto* data = static_cast<const std::byte*>(segment.data);
  if (machine.block && machine.block->running) machine.block->static_shared.assign(data, data + segment.bytes);
  machine.block = &block;
  blockIdx = block.index;
  if (block.running) std::memcpy(segment.data, block.static_shared.data(), segment.bytes);
}

inline void start(Block& block, uint3 index, const Segment& segment) {
  switch_to(block, segment);
  block.index = blockIdx = index;
  block.running = true;
  std::memset(block.shared.get(), kGuard, machine.shared_bytes + 2 * kGuardBytes);
  std::memset(dynamic_shared(), kGarbage, machine.shared_bytes);
  std::memset(segment.data, kGarbage, segment.bytes);
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    const unsigned t = static_cast<unsigned>(i);
    block.fibers[i].thread = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    block.fibers[i].state = Fiber::kReady;
  }
}

// Lets those meet who can, once all threads have had a turn. Returns whether the block goes on.
inline bool meet_or_end(Block& block) {
  bool any = false, done = true;
  for (size_t w = 0; w < block.fibers.size(); w += 32) {
    any |= release_warp(&block.fibers[w], std::min<size_t>(32, block.fibers.size() - w));
  }
  for (const Fiber& fiber : block.fibers) {
    done &= fiber.state == Fiber::kDone;
    any |= fiber.state == Fiber::kReady;
  }
  if (!done && !any) release_block();
  if (done) check_guards(block);
  return !done;
}

// Lets a warp whose lanes have met go on, and on, until it waits for the block.
inline void run_ahead(Block& block, size_t warp) {
  Fiber* lanes = &block.fibers[warp * 32];
  const size_t size = std::min<size_t>(32, block.fibers.size() - warp * 32);
  while (release_warp(lanes, size)) {
    for (size_t lane = 0; lane < size; ++lane) {
      if (lanes[lane].state == Fiber::kReady) resume(lanes[lane]);
      if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
    }
  }
}

// Runs the threads at order[from] and some behind it.
inline void run_threads(Block& block, const std::vector<size_t>& order, size_t from, size_t count) {
  for (size_t i = from; i < order.size() && i - from < count; ++i) {
    Fiber& fiber = block.fibers[order[i]];
    if (fiber.state == Fiber::kReady) resume(fiber);
    if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
    if (machine.ahead) run_ahead(block, order[i] / 32);
  }
}

inline uint3 block_index(size_t b) {
  const auto at = [&](size_t divisor, unsigned extent) { return static_cast<unsigned>(b / divisor % extent); };
  return {at(1, gridDim.x), at(gridDim.x, gridDim.y), at(size_t(gridDim.x) * gridDim.y, gridDim.z)};
}

// Runs all blocks of the grid, `resident` at a time; `turn` threads of one, then of the next.
inline void run_blocks(const std::vector<size_t>& blocks, const std::vector<size_t>& threads, size_t resident,
                       size_t turn) {
  const Segment segment = static_shared();
  size_t next = 0, running = 0;
  do {
    for (size_t i = 0; i < resident; ++i) {
      Block& block = machine.blocks[i];
      if (block.running || next == blocks.size()) continue;
      start(block, block_index(blocks[next++]), segment);
      ++running;
    }
    for (size_t from = 0; from < threads.size(); from += std::min(turn, threads.size())) {
      for (size_t i = 0; i < resident; ++i) {
        if (!machine.blocks[i].running) continue;
        switch_to(machine.blocks[i], segment);
        run_threads(machine.blocks[i], threads, from, turn);
      }
    }
    for (size_t i = 0; i < resident; ++i) {
      if (!machine.blocks[i].running) continue;
      switch_to(machine.blocks[i], segment);
      machine.blocks[i].running = meet_or_end(machine.blocks[i]);
      running -= !machine.blocks[i].running;
    }
  } while (running > 0 || next < blocks.size());
}

}  // namespace doublehead::emulation

namespace doublehead::emulation {

// `at_once`: how many blocks take turns.
template <typename Kernel, typename... Arguments>
void run_kernel(dim3 grid, dim3 block, size_t shared_bytes, size_t at_once, Kernel kernel, const Arguments&... arguments) {
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > 1024 || block.z > 64) fail("a block cannot have ", threads, " threads");
  if (blocks < 1 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) fail("no such grid: ", blocks, " blocks");
  if (shared_bytes > kMaxShared) fail("a block cannot have ", shared_bytes, " bytes of shared memory");
  blockDim = block;
  gridDim = grid;
  const size_t resident = std::min(at_once, blocks);
  machine.in_turns = resident > 1;
  machine.pauses = machine.barriers = 0;
  machine.shared_bytes = shared_bytes;
  machine.block = nullptr;
  machine.body = [&] { kernel(arguments...); };
  prepare(resident, threads);
  try {
    run_blocks(in_order(blocks, machine.block_order), in_order(threads, machine.thread_order), resident,
               machine.resident > 1 ? turn_of(threads) : threads);
  } catch (...) {
    machine.blocks.clear();  // their threads stand in the middle of a kernel
    throw;
  }
}

}  // namespace doublehead::emulation

template <typename Kernel, typename... Arguments>
void emulate(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel, const Arguments&... arguments) {
  using namespace doublehead::emulation;
  run_kernel(grid, block, shared_bytes, machine.resident, kernel, arguments...);
}

// A cooperative launch: all blocks run side by side.
template <typename Kernel, typename... Arguments>
void emulate_together(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel, const Arguments&... arguments) {
  using namespace doublehead::emulation;
  run_kernel(grid, block, shared_bytes, SIZE_MAX, kernel, arguments...);
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

// The orders of threads and blocks (Order), how many blocks take turns, and whether warps run ahead of each other.
extern "C" __attribute__((visibility("default"))) void emulation_set_order(int threads, int blocks, int resident,
                                                                           int ahead) {
  auto& machine = doublehead::emulation::machine;
  machine.thread_order = threads, machine.block_order = blocks, machine.resident = resident, machine.ahead = ahead != 0;
}

#include "intrinsics.h"
