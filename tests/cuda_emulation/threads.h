// The threads of an emulated block: each runs on a stack of its own until it waits for others. For emulation.h.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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
constexpr size_t kMostPauses = 20'000'000, kMostBarriers = 100'000;  // of a kernel; one with more never ends
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
  std::vector<std::pair<void*, const void*>> copies;  // under way
};

// A block under way. What serves it serves block after block.
struct Block {
  std::vector<Fiber> fibers;
  std::unique_ptr<std::byte[]> stacks, shared;
  std::vector<std::byte> static_shared;  // while another block runs
  size_t stack_count = 0;
  uint3 index{};
  bool running = false;
};

// The order of threads or blocks. 0: ascending, 1: descending, else a shuffle with this seed.
using Order = int;

// What runs at the moment; one kernel at a time.
struct Machine {
  std::vector<Block> blocks;  // as many as may be under way
  Block* block = nullptr;     // whose turn it is
  size_t shared_bytes = 0;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  std::function<void()> body;
  std::exception_ptr error;
  Order thread_order = 0, block_order = 0;
  bool ahead = false;   // whether warps go on, as far as each gets
  size_t resident = 1;  // blocks that take turns
  bool in_turns = false;  // whether any do in the running kernel
  size_t pauses = 0, barriers = 0;  // of it
};
inline Machine machine;

inline std::byte* dynamic_shared() { return machine.block->shared.get() + kGuardBytes; }

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
  const size_t lane = (self - machine.block->fibers.data()) % warpSize;
  self->wait = wait;
  self->state = Fiber::kWaiting;
  if (!of_block(wait.meeting) && !(wait.mask >> lane & 1)) fail(describe(*self), " and is not in the mask");
  yield(*self);
  return self->result;
}

// Called in a thread before an access that others are to see: where blocks take turns, they may come in between.
inline void pause() {
  if (++machine.pauses > kMostPauses) fail("a kernel that never ends: its threads wait for what does not happen");
  if (machine.in_turns) yield(*machine.current);
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
  context.uc_stack = {machine.block->stacks.get() + (&fiber - machine.block->fibers.data()) * kStackBytes, 0,
                      kStackBytes};
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

// Called by what -fsanitize=alignment puts before each access. The thread ends here, as this processor may refuse it too.
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(const char* const* where,
                                                                                      const void* address) {
  std::ostringstream message;  // `where` begins with the file's name and the line
  const std::string file = where[0];
  message << "a misaligned access at " << file.substr(file.rfind('/') + 1) << ":"
          << *reinterpret_cast<const uint32_t*>(where + 1) << ", address " << address;
  machine.error = std::make_exception_ptr(std::runtime_error(message.str()));
  machine.current->state = Fiber::kDone;
  machine.current->started = false;  // its stack is left as it is
  _longjmp(machine.scheduler, 1);
}

}  // namespace doublehead::emulation
