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
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace doublehead::emulation {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4096, kMaxShared = 227 << 10;
constexpr int kGarbage = 0xCD, kGuard = 0xA5;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

enum class Meeting { block_sync, block_or, block_and, block_count, warp_sync, shuffle, shuffle_up, shuffle_down,
                     shuffle_xor, ballot, match_any, reduce_add, reduce_or, reduce_and, reduce_max, reduce_min };

inline const char* name(Meeting meeting) {
  static const char* names[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count",
                                "__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                                "__ballot_sync", "__match_any_sync", "__reduce_add_sync", "__reduce_or_sync",
                                "__reduce_and_sync", "__reduce_max_sync", "__reduce_min_sync"};
  return names[static_cast<int>(meeting)];
}

inline bool of_block(Meeting meeting) { return meeting <= Meeting::block_count; }

// Where a thread waits, and what it brings along.
struct Wait {
  Meeting meeting;
  uint32_t mask;
  uint64_t value;
  int argument, width;
  std::source_location where;

  bool meets(const Wait& other) const {
    return meeting == other.meeting && mask == other.mask && where.line() == other.where.line() &&
           where.column() == other.where.column() && where.file_name() == other.where.file_name();
  }
};

// A thread of the block. Its stack serves block after block: contexts are for the first start of each, from then on
// jumps do, which are much faster.
struct Fiber {
  enum State { kReady, kWaiting, kDone } state;
  bool started = false;
  jmp_buf place;
  uint3 thread;
  Wait wait;
  uint64_t result;
};

// What runs at the moment; one kernel at a time.
struct Machine {
  std::vector<Fiber> fibers;
  std::unique_ptr<std::byte[]> stacks, shared;
  size_t stack_count = 0, shared_bytes = 0;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  std::function<void()> body;
  std::exception_ptr error;
  int order = 0;  // 0: ascending, 1: descending, else a shuffle with this seed
};
inline Machine machine;

inline std::byte* dynamic_shared() { return machine.shared.get() + kGuardBytes; }

inline std::string describe(const Fiber& fiber) {
  std::ostringstream text;
  text << "thread (" << fiber.thread.x << ", " << fiber.thread.y << ", " << fiber.thread.z << ") of block ("
       << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ") ";
  if (fiber.state == Fiber::kDone) {
    text << "has returned";
  } else {
    const std::string file = fiber.wait.where.file_name();
    text << "waits at " << name(fiber.wait.meeting) << ", " << file.substr(file.rfind('/') + 1) << ":"
         << fiber.wait.where.line();
    if (!of_block(fiber.wait.meeting)) text << ", mask 0x" << std::hex << fiber.wait.mask;
  }
  return text.str();
}

__attribute__((noinline)) inline void yield(Fiber& fiber) {
  if (_setjmp(fiber.place) == 0) _longjmp(machine.scheduler, 1);
}

// Called in a thread: it waits, the others run, and the result is what the meeting gives this thread.
inline uint64_t meet(const Wait& wait) {
  Fiber* self = machine.current;
  const size_t lane = (self - machine.fibers.data()) % warpSize;
  self->wait = wait;
  self->state = Fiber::kWaiting;
  if (!of_block(wait.meeting) && !(wait.mask >> lane & 1)) fail(describe(*self), " and is not in the mask");
  yield(*self);
  return self->result;
}

inline uint64_t reduce(Meeting meeting, const std::vector<Fiber*>& fibers) {
  uint64_t result = fibers[0]->wait.value;
  for (size_t i = 1; i < fibers.size(); ++i) {
    const uint64_t value = fibers[i]->wait.value;
    switch (meeting) {
      case Meeting::reduce_add: result += value; break;
      case Meeting::reduce_or: result |= value; break;
      case Meeting::reduce_and: result &= value; break;
      case Meeting::reduce_max: result = std::max<int64_t>(result, value); break;
      default: result = std::min<int64_t>(result, value);
    }
  }
  return result;
}

// The lane that `lane` reads in a shuffle.
inline int source_lane(const Wait& wait, int lane) {
  const int base = lane & ~(wait.width - 1), end = base + wait.width;
  switch (wait.meeting) {
    case Meeting::shuffle: return base + (wait.argument & (wait.width - 1));
    case Meeting::shuffle_up: return lane - wait.argument < base ? lane : lane - wait.argument;
    case Meeting::shuffle_down: return lane + wait.argument >= end ? lane : lane + wait.argument;
    default: return (lane ^ wait.argument) >= end ? lane : lane ^ wait.argument;
  }
}

// All lanes of a mask have met: gives each its result.
inline void settle_warp(Fiber* warp, const std::vector<Fiber*>& lanes) {
  const Wait wait = lanes[0]->wait;
  for (Fiber* fiber : lanes) {
    const int lane = static_cast<int>(fiber - warp);
    fiber->result = 0;
    if (wait.meeting >= Meeting::reduce_add) {
      fiber->result = reduce(wait.meeting, lanes);
    } else if (wait.meeting == Meeting::ballot || wait.meeting == Meeting::match_any) {
      for (Fiber* other : lanes) {
        const bool in = wait.meeting == Meeting::ballot ? other->wait.value : other->wait.value == fiber->wait.value;
        fiber->result |= static_cast<uint64_t>(in) << (other - warp);
      }
    } else if (wait.meeting != Meeting::warp_sync) {
      const int source = source_lane(fiber->wait, lane);
      if (!(wait.mask >> source & 1)) fail(describe(*fiber), " and reads lane ", source, ", which is not in the mask");
      fiber->result = warp[source].wait.value;
    }
  }
  for (Fiber* fiber : lanes) fiber->state = Fiber::kReady;
}

// Resumes the lanes of a warp that have met. Returns whether there were any.
inline bool release_warp(Fiber* warp, size_t size) {
  bool any = false;
  for (size_t first = 0; first < size; ++first) {
    if (warp[first].state != Fiber::kWaiting || of_block(warp[first].wait.meeting)) continue;
    const Wait& wait = warp[first].wait;
    std::vector<Fiber*> lanes;
    for (size_t lane = 0; lane < size; ++lane) {
      const bool here = warp[lane].state == Fiber::kWaiting && warp[lane].wait.meets(wait);
      if ((wait.mask >> lane & 1) && here) lanes.push_back(&warp[lane]);
    }
    if (static_cast<int>(lanes.size()) != __builtin_popcount(wait.mask)) continue;
    settle_warp(warp, lanes);
    any = true;
  }
  return any;
}

// The thread on account of which `fiber` waits in vain.
inline std::string missing(const Fiber& fiber) {
  const size_t index = &fiber - machine.fibers.data();
  const bool everyone = of_block(fiber.wait.meeting);
  for (size_t i = everyone ? 0 : index & ~size_t(31); i < (everyone ? machine.fibers.size() : (index | 31) + 1); ++i) {
    if (i >= machine.fibers.size()) return "the block has no thread " + std::to_string(i);
    const Fiber& other = machine.fibers[i];
    if (everyone ? other.state == Fiber::kDone : !(fiber.wait.mask >> (i & 31) & 1)) continue;
    if (other.state == Fiber::kDone || !other.wait.meets(fiber.wait)) return describe(other);
  }
  return "";
}

// No thread can run and no warp has met: all threads that have not returned must be at one barrier of the block.
inline void release_block() {
  std::vector<Fiber*> waiting;
  uint64_t count = 0;
  for (Fiber& fiber : machine.fibers) {
    if (fiber.state == Fiber::kDone) continue;
    const std::string other = missing(fiber);
    if (!other.empty()) fail("threads never meet: ", describe(fiber), ", but ", other);
    waiting.push_back(&fiber);
    count += fiber.wait.value;
  }
  const Meeting meeting = waiting[0]->wait.meeting;
  for (Fiber* fiber : waiting) {
    fiber->result = count;
    if (meeting == Meeting::block_or) fiber->result = count > 0;
    if (meeting == Meeting::block_and) fiber->result = count == waiting.size();
    fiber->state = Fiber::kReady;
  }
}

inline void run_fiber() {
  while (true) {
    try {
      machine.body();
    } catch (...) {
      machine.error = std::current_exception();
    }
    machine.current->state = Fiber::kDone;
    yield(*machine.current);
  }
}

// Runs a thread until it waits or returns.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = fiber.thread;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack = {machine.stacks.get() + (&fiber - machine.fibers.data()) * kStackBytes, 0, kStackBytes};
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

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
