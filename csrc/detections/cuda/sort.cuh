// Keys of candidates, and a block's sort of them in shared memory. No torch, no launch.
#pragma once

#include <cstdint>
#include <cstring>

#include "marks.h"
#include "nms/nms.h"

namespace doublehead::detections {

// nms.h's sort_key of no score: candidates have none of it.
constexpr uint32_t kNoScore = 0xffffffffu;
constexpr uint64_t kNoKey = ~uint64_t(0);

// The score of a key; no candidate's is NaN.
__host__ __device__ __forceinline__ float score_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key : ~key & 0x7fffffffu;
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

// Ascending: descending scores, ties by ascending `place`.
__device__ __forceinline__ uint64_t key_of(uint32_t score, uint32_t place) { return uint64_t(score) << 32 | place; }

// The first power of two that is not below `count`, at least 2.
__device__ __forceinline__ uint32_t sorted_size(uint32_t count) {
  return count <= 2 ? 2 : 1u << (32 - __clz(static_cast<int>(count - 1)));
}

// The slot that this thread may write to, if it wants one: lanes of a warp take neighbouring ones. All of a warp call it.
__device__ __forceinline__ uint32_t take_slot(uint32_t* used, bool wanted) {
  const uint32_t lane = threadIdx.x % 32, lanes = __ballot_sync(0xffffffffu, wanted);
  uint32_t first = 0;
  if (lane == 0 && lanes) first = atomicAdd(used, static_cast<uint32_t>(__popc(lanes)));
  return __shfl_sync(0xffffffffu, first, 0) + __popc(lanes & ((1u << lane) - 1));
}

// Sorts keys[0 .. count), ascending, by a bitonic network; a block of kThreads threads calls it after a barrier, and may
// read what it likes afterwards. Keys behind them, up to sorted_size(count), are overwritten with kNoKey.
//
// A warp's 32 pairs lie in 64 neighbouring keys if the partners are at most 32 apart: then only the warp has to wait.
template <uint32_t kThreads>
__device__ __forceinline__ void sort_keys(uint64_t* keys, uint32_t count) {
  const uint32_t size = sorted_size(count);
  for (uint32_t i = count + threadIdx.x; i < size; i += kThreads) keys[i] = kNoKey;
  __syncthreads();
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t apart = run / 2; apart > 0; apart /= 2) {
      for (uint32_t pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        DOUBLEHEAD_MARK_BEGIN("detections pair of a sort");
        const uint32_t i = (pair & ~(apart - 1)) * 2 | (pair & (apart - 1));
        const uint64_t a = keys[i], b = keys[i + apart];
        if ((a > b) == ((i & run) == 0)) keys[i] = b, keys[i + apart] = a;
        DOUBLEHEAD_MARK_END("detections pair of a sort");
      }
      const uint32_t next = apart > 1 ? apart / 2 : run;
      if (apart > 32 || next > 32) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
  __syncthreads();
}

}  // namespace doublehead::detections
