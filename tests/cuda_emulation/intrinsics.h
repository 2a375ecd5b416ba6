// CUDA's device functions for emulation.h: barriers, warp collectives, atomics, bits, vectors.
#pragma once

#include <bit>
#include <cmath>
#include <type_traits>

namespace doublehead::emulation {

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T shuffle(Meeting meeting, uint32_t mask, T value, int argument, int width, std::source_location where) {
  return from_bits<T>(meet({meeting, mask, to_bits(value), argument, width, where}));
}

}  // namespace doublehead::emulation

#define EMULATION_HERE std::source_location where = std::source_location::current()
#define EMULATION_MEET(meeting, mask, value) \
  doublehead::emulation::meet({doublehead::emulation::Meeting::meeting, mask, value, 0, 32, where})

// Barriers

inline void __syncthreads(EMULATION_HERE) { EMULATION_MEET(block_sync, 0, 0); }
inline int __syncthreads_or(int value, EMULATION_HERE) { return EMULATION_MEET(block_or, 0, value != 0); }
inline int __syncthreads_and(int value, EMULATION_HERE) { return EMULATION_MEET(block_and, 0, value != 0); }
inline int __syncthreads_count(int value, EMULATION_HERE) { return EMULATION_MEET(block_count, 0, value != 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_HERE) { EMULATION_MEET(warp_sync, mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Warp collectives

#define EMULATION_SHUFFLE(function, meeting)                                                         \
  template <typename T>                                                                              \
  T function(unsigned mask, T value, int argument, int width = 32, EMULATION_HERE) {                 \
    using doublehead::emulation::Meeting;                                                            \
    return doublehead::emulation::shuffle(Meeting::meeting, mask, value, argument, width, where);    \
  }
EMULATION_SHUFFLE(__shfl_sync, shuffle)
EMULATION_SHUFFLE(__shfl_up_sync, shuffle_up)
EMULATION_SHUFFLE(__shfl_down_sync, shuffle_down)
EMULATION_SHUFFLE(__shfl_xor_sync, shuffle_xor)

inline unsigned __ballot_sync(unsigned mask, int value, EMULATION_HERE) { return EMULATION_MEET(ballot, mask, value != 0); }
inline int __any_sync(unsigned mask, int value, EMULATION_HERE) { return EMULATION_MEET(ballot, mask, value != 0) != 0; }
inline int __all_sync(unsigned mask, int value, EMULATION_HERE) {
  return EMULATION_MEET(ballot, mask, value != 0) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, EMULATION_HERE) {
  return EMULATION_MEET(match_any, mask, doublehead::emulation::to_bits(value));
}

// int or unsigned: both are extended to 64 bits and compared there.
#define EMULATION_REDUCE(function, meeting)                                                                      \
  inline unsigned function(unsigned mask, unsigned value, EMULATION_HERE) { return EMULATION_MEET(meeting, mask, value); } \
  inline int function(unsigned mask, int value, EMULATION_HERE) {                                                \
    return static_cast<int>(EMULATION_MEET(meeting, mask, static_cast<uint64_t>(static_cast<int64_t>(value))));  \
  }
EMULATION_REDUCE(__reduce_add_sync, reduce_add)
EMULATION_REDUCE(__reduce_max_sync, reduce_max)
EMULATION_REDUCE(__reduce_min_sync, reduce_min)
EMULATION_REDUCE(__reduce_or_sync, reduce_or)
EMULATION_REDUCE(__reduce_and_sync, reduce_and)

// Atomics: plain, as one thread runs at a time

#define EMULATION_ATOMIC(function, expression)                        \
  template <typename T>                                               \
  T function(T* address, std::type_identity_t<T> value) {             \
    doublehead::emulation::pause();                                   \
    const T old = *address;                                           \
    *address = expression;                                            \
    return old;                                                       \
  }
EMULATION_ATOMIC(atomicAdd, old + value)
EMULATION_ATOMIC(atomicSub, old - value)
EMULATION_ATOMIC(atomicExch, value)
EMULATION_ATOMIC(atomicOr, old | value)
EMULATION_ATOMIC(atomicAnd, old & value)
EMULATION_ATOMIC(atomicXor, old ^ value)
EMULATION_ATOMIC(atomicMax, old > value ? old : value)
EMULATION_ATOMIC(atomicMin, old < value ? old : value)
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  doublehead::emulation::pause();
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// Bits and numbers

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline int __ffsll(long long x) { return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

// As on the device, a NaN loses against a number.
template <typename A, typename B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin<T, T>(a, b);
  else return T(a) < T(b) ? T(a) : T(b);
}
template <typename A, typename B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax<T, T>(a, b);
  else return T(a) > T(b) ? T(a) : T(b);
}

// Vectors

#define EMULATION_VECTOR(scalar, name)                                                                     \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                                             \
  struct alignas(4 * sizeof(scalar) > 16 ? 16 : 4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };        \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                                     \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMULATION_VECTOR(float, float)
EMULATION_VECTOR(double, double)
EMULATION_VECTOR(int, int)
EMULATION_VECTOR(unsigned, uint)
EMULATION_VECTOR(short, short)
EMULATION_VECTOR(unsigned short, ushort)
EMULATION_VECTOR(long long, longlong)
EMULATION_VECTOR(unsigned long long, ulonglong)

// Copies that go on while the thread computes (roi_align/cuda/async.cuh): nothing arrives before the thread waits for it.

namespace doublehead {

inline void copy_async(void* shared, const void* global) {
  const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  if (!aligned(shared) || !aligned(global)) emulation::fail("an asynchronous copy of 16 bytes that are not aligned so");
  emulation::machine.current->copies.push_back({shared, global});
}

inline void wait_for_copies() {
  auto& copies = emulation::machine.current->copies;
  for (const auto& [to, from] : copies) std::memcpy(to, from, 16);
  copies.clear();
}

}  // namespace doublehead

// Accesses that other blocks see (csrc/nms/cuda/grid.cuh), unlike a device's in that all others are seen at once too

namespace doublehead::nms {

template <typename T>
T load_acquire(const T* address) {
  emulation::pause();
  return *address;
}
template <typename T>
T load_relaxed(const T* address) {
  emulation::pause();
  return *address;
}
template <typename T>
void store_relaxed(T* address, const T& value) {
  emulation::pause();
  *address = value;
}

}  // namespace doublehead::nms

#undef EMULATION_HERE
