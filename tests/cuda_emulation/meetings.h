// What happens when the threads of a warp or of a block meet, and what is wrong when they do not. For emulation.h.
#pragma once

#include <algorithm>

#include "threads.h"

namespace doublehead::emulation {

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
  const std::vector<Fiber>& fibers = machine.block->fibers;
  const size_t index = &fiber - fibers.data();
  const bool everyone = of_block(fiber.wait.meeting);
  for (size_t i = everyone ? 0 : index & ~size_t(31); i < (everyone ? fibers.size() : (index | 31) + 1); ++i) {
    if (i >= fibers.size()) return "the block has no thread " + std::to_string(i);
    const Fiber& other = fibers[i];
    if (everyone ? other.state == Fiber::kDone : !(fiber.wait.mask >> (i & 31) & 1)) continue;
    if (other.state == Fiber::kDone || !other.wait.meets(fiber.wait)) return describe(other);
  }
  return "";
}

// No thread can run and no warp has met: all threads that have not returned must be at one barrier of the block.
inline void release_block() {
  if (++machine.barriers > kMostBarriers) fail("a kernel that never ends: it reaches one barrier after the other");
  std::vector<Fiber*> waiting;
  for (Fiber& fiber : machine.block->fibers) {
    if (fiber.state != Fiber::kDone) waiting.push_back(&fiber);
  }
  const Wait wait = waiting[0]->wait;
  uint64_t count = 0;
  for (const Fiber* fiber : waiting) {
    const Fiber* lonely = !of_block(fiber->wait.meeting) ? fiber : fiber->wait.meets(wait) ? nullptr : waiting[0];
    if (lonely) fail("threads never meet: ", describe(*lonely), ", but ", missing(*lonely));
    count += fiber->wait.value;
  }
  for (Fiber* fiber : waiting) {
    fiber->result = count;
    if (wait.meeting == Meeting::block_or) fiber->result = count > 0;
    if (wait.meeting == Meeting::block_and) fiber->result = count == waiting.size();
    fiber->state = Fiber::kReady;
  }
}

}  // namespace doublehead::emulation
