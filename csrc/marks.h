// Marks that machine code carries, so that benchmarks/sass.py can count the instructions between two places:
//
//   DOUBLEHEAD_MARK_BEGIN("backward fill");
//   ...
//   DOUBLEHEAD_MARK_END("backward fill");
//
// Device code alone, and only in a build with -DDOUBLEHEAD_MARKS, which is compiled to be read and never to be run: an
// ordinary build and the emulator have nothing there. A mark is one instruction, PMTRIG, with the name's number; neither
// memory accesses nor other marks are moved across it, arithmetic rarely. A name stands for one place in the source,
// which the compiler may copy (unrolled loops, inlined functions).
#pragma once

#if defined(DOUBLEHEAD_MARKS) && defined(__CUDACC__)

#include <cstdint>

namespace doublehead {

// 15 bits of FNV-1a, never 0; benchmarks/sass.py has the same, and a test that no two names share a number.
__host__ __device__ constexpr uint32_t mark_number(const char* name) {
  uint32_t hash = 0x811c9dc5u;
  for (; *name; ++name) hash = (hash ^ static_cast<unsigned char>(*name)) * 0x01000193u;
  return hash >> 17 ? hash >> 17 : 1;
}

}  // namespace doublehead

#define DOUBLEHEAD_MARK(name, end) \
  asm volatile("pmevent.mask %0;" ::"n"(2 * ::doublehead::mark_number(name) + (end)) : "memory")
#define DOUBLEHEAD_MARK_BEGIN(name) DOUBLEHEAD_MARK(name, 0)
#define DOUBLEHEAD_MARK_END(name) DOUBLEHEAD_MARK(name, 1)

#else

#define DOUBLEHEAD_MARK_BEGIN(name) static_cast<void>(0)
#define DOUBLEHEAD_MARK_END(name) static_cast<void>(0)

#endif
