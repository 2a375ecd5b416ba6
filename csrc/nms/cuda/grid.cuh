// What blocks of one kernel need to work together. All of them must run side by side, as those of a cooperative launch
// do, or there must be only one.
#pragma once

#include "../../marks.h"
#include "device.cuh"

namespace doublehead::nms {

// Of a tile of boxes, those kept and those struck for good; the others are undecided. Bits are only ever added.
struct alignas(16) Settled {
  uint64_t kept, struck;
};

#if defined(__CUDACC__)  // tests/cuda_emulation/intrinsics.h has the emulator's
// What other threads wrote before they wrote this value, the caller sees from now on.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Passes by caches that may be old. Either half of a pair may be newer than the other.
__device__ __forceinline__ ulonglong2 load_relaxed(const ulonglong2* address) {
  ulonglong2 value;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(value.x), "=l"(value.y) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed(ulonglong2* address, ulonglong2 value) {
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" : : "l"(address), "l"(value.x), "l"(value.y) : "memory");
}
#endif

__device__ __forceinline__ Settled load_settled(const Settled* address) {
  const ulonglong2 words = load_relaxed(reinterpret_cast<const ulonglong2*>(address));
  return {words.x, words.y};
}

__device__ __forceinline__ void store_settled(Settled* address, const Settled& value) {
  store_relaxed(reinterpret_cast<ulonglong2*>(address), make_ulonglong2(value.kept, value.struck));
}

// All threads of all blocks wait for each other, and see what any of them wrote before. `arrived` is 0 when the kernel
// starts, and nobody else's.
__device__ __forceinline__ void meet_grid(uint32_t* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const uint32_t all = (atomicAdd(arrived, 1u) / gridDim.x + 1) * gridDim.x;
    while (load_acquire(arrived) < all) {
    }
  }
  __syncthreads();
}

}  // namespace doublehead::nms
