// Kernels with and without the mistakes that emulation.h is to find; tests/cuda_emulation/test_emulation.py runs them.
#include "emulation.h"

#include "nms/cuda/grid.cuh"

// Every thread reads what its neighbour wrote, after a barrier of the block (1), of its warp (2) or none.
template <int kBarrier>
__global__ void rotate(const int* from, int* to) {
  __shared__ int values[96];
  values[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
  if (kBarrier == 1) __syncthreads();
  if (kBarrier == 2) __syncwarp();
  to[blockIdx.x * blockDim.x + threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

__global__ void sum_of_warps(const int* from, int* to, int lanes) {
  if (static_cast<int>(threadIdx.x) % 32 >= lanes) return;
  int sum = from[threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) to[threadIdx.x / 32] = sum;
}

// Half of a warp meets here, half there.
__global__ void two_places(int* to, bool same) {
  if (same || threadIdx.x % 32 < 16) {
    to[threadIdx.x] = __popc(__ballot_sync(same ? 0xffffffffu : 0xffffu, threadIdx.x % 2));
  } else {
    to[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
  }
}

__global__ void barrier_of_most(int* to) {
  if (threadIdx.x != 40) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  to[threadIdx.x] = 1;
}

__global__ void count_positive(const int* from, int* to) {
  const int count = __syncthreads_count(from[threadIdx.x] > 0);
  to[threadIdx.x] = count + 1000 * __syncthreads_or(from[threadIdx.x] > 94) + 10000 * __syncthreads_and(count > 95);
}

__global__ void fill_shared(int* to, int count) {
  DOUBLEHEAD_DYNAMIC_SHARED(int, values);
  if (threadIdx.x == 0) to[0] = values[0];  // as a block finds it
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = i;
}

// Wrong: every block relies on the one before it having ended.
__global__ void chain(int* to) {
  if (threadIdx.x == 0) to[blockIdx.x] = blockIdx.x == 0 ? 1 : to[blockIdx.x - 1] + 1;
}

// Adds one for each thread; wrong unless it is one atomic operation.
template <bool kAtomic>
__global__ void count_threads(int* to) {
  if (kAtomic) {
    atomicAdd(to, 1);
  } else {
    const int old = atomicAdd(to, 0);
    atomicExch(to, old + 1);
  }
}

// How many blocks are between their first barrier and their last: more than one wherever blocks overlap.
__global__ void count_blocks_inside(int* inside, int* most) {
  if (threadIdx.x == 0) atomicMax(most, atomicAdd(inside, 1) + 1);
  __syncthreads();
  if (threadIdx.x == 0) atomicSub(inside, 1);
}

// A block fills its dynamic shared memory, and after a barrier another thread reads it.
__global__ void rotate_dynamic(int* to) {
  DOUBLEHEAD_DYNAMIC_SHARED(int, values);
  values[threadIdx.x] = blockIdx.x * blockDim.x + threadIdx.x;
  __syncthreads();
  to[blockIdx.x * blockDim.x + threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// Every block reads what the next one wrote before they all met, `rounds` times.
template <bool kMeet>
__global__ void rotate_blocks(int* values, int* to, unsigned* arrived, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    values[blockIdx.x * blockDim.x + threadIdx.x] = 1000 * round + blockIdx.x;
    if (kMeet) doublehead::nms::meet_grid(arrived);
    to[blockIdx.x * blockDim.x + threadIdx.x] = values[(blockIdx.x + 1) % gridDim.x * blockDim.x + threadIdx.x];
    if (kMeet) doublehead::nms::meet_grid(arrived);
  }
}

__global__ void wait_for(const int* value) {
  while (__syncthreads_or(*value == 0)) {
  }
}

// Four numbers at once.
__global__ void copy_four(const int* from, int* to) {
  *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(from);
}

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

EXPORT run_rotate(const int* from, int* to, int64_t barrier) {
  return report_errors([&] { emulate(3, 96, 0, barrier == 0 ? rotate<0> : barrier == 1 ? rotate<1> : rotate<2>, from, to); });
}
EXPORT run_sum_of_warps(const int* from, int* to, int64_t lanes) {
  return report_errors([&] { emulate(1, 96, 0, sum_of_warps, from, to, static_cast<int>(lanes)); });
}
EXPORT run_two_places(int* to, int64_t same) {
  return report_errors([&] { emulate(1, 96, 0, two_places, to, same != 0); });
}
EXPORT run_barrier_of_most(int* to) {
  return report_errors([&] { emulate(1, 96, 0, barrier_of_most, to); });
}
EXPORT run_count_positive(const int* from, int* to) {
  return report_errors([&] { emulate(1, 96, 0, count_positive, from, to); });
}
EXPORT run_fill_shared(int* to, int64_t count, int64_t bytes) {
  return report_errors([&] { emulate(2, 64, bytes, fill_shared, to, static_cast<int>(count)); });
}
EXPORT run_chain(int* to) {
  return report_errors([&] { emulate(8, 32, 0, chain, to); });
}
EXPORT run_count_threads(int* to, int64_t atomic) {
  return report_errors([&] { emulate(8, 32, 0, atomic ? count_threads<true> : count_threads<false>, to); });
}
EXPORT run_count_blocks_inside(int* inside, int* most) {
  return report_errors([&] { emulate(8, 64, 0, count_blocks_inside, inside, most); });
}
EXPORT run_rotate_dynamic(int* to) {
  return report_errors([&] { emulate(3, 96, 96 * sizeof(int), rotate_dynamic, to); });
}
EXPORT run_rotate_blocks(int* values, int* to, int* arrived, int64_t meet, int64_t together, int64_t blocks) {
  return report_errors([&] {
    const auto kernel = meet ? rotate_blocks<true> : rotate_blocks<false>;
    const auto run = [&](const auto& how) { how(blocks, 64, 0, kernel, values, to, reinterpret_cast<unsigned*>(arrived), 3); };
    together ? run([](auto... all) { emulate_together(all...); }) : run([](auto... all) { emulate(all...); });
  });
}
EXPORT run_wait_for(const int* value) {
  return report_errors([&] { emulate(1, 32, 0, wait_for, value); });
}
EXPORT run_copy_four(const int* from, int* to, int64_t skipped) {
  return report_errors([&] { emulate(1, 32, 0, copy_four, from + skipped, to); });
}
