// Copies from global to shared memory that go on while the thread computes. Each thread waits for its own; a barrier then
// tells the others. The emulator of the tests has functions of the same names.
#pragma once

#if defined(__CUDACC__)
namespace doublehead {

// 16 bytes, aligned so on both sides.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// Until all copies of this thread have arrived.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace doublehead
#endif
