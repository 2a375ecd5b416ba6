// What every operator's C++ shares: argument checks, dtype dispatch, threads, run-time choice of instruction set.
// Only torch's stable ABI is used: one build serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "message.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <string>

#if __has_include(<pthread.h>)
#include <pthread.h>
#endif

// DOUBLEHEAD_MULTIVERSION before a function compiles it three times, for plain x86-64, AVX2 and AVX-512, and the loader
// chooses. What it calls must be inlined into it (DOUBLEHEAD_INLINE) to be compiled three times too; a lambda inside it
// is written `[&](int64_t i) DOUBLEHEAD_INLINE_LAMBDA { ... }`. It goes on free functions, templates and functions in
// unnamed namespaces as well, not on a lambda. The choice needs glibc's indirect functions and a GCC that knows the
// levels by name; elsewhere the macro is empty, and the same code runs in one version.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__CUDACC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define DOUBLEHEAD_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define DOUBLEHEAD_HAS_MULTIVERSION 1
#else
#define DOUBLEHEAD_MULTIVERSION
#define DOUBLEHEAD_HAS_MULTIVERSION 0
#endif

#if defined(__GNUC__)
#define DOUBLEHEAD_INLINE inline __attribute__((always_inline))
#define DOUBLEHEAD_INLINE_LAMBDA __attribute__((always_inline))
#define DOUBLEHEAD_RESTRICT __restrict__
#else
#define DOUBLEHEAD_INLINE inline
#define DOUBLEHEAD_INLINE_LAMBDA
#define DOUBLEHEAD_RESTRICT
#endif

// DOUBLEHEAD_CHECK(boxes.dim() == 2, "nms: boxes must be Tensor[N, 4], got ", boxes.dim(), " dimensions");
#define DOUBLEHEAD_CHECK(condition, ...)                 \
  do {                                                   \
    if (!(condition)) ::doublehead::fail(__VA_ARGS__);   \
  } while (false)

namespace doublehead {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "[2, 256, 50, 68]", for messages.
inline std::string shape(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

// `what` names operator and argument: "nms: boxes".
inline void check_cpu(const Tensor& tensor, const char* what) {
  DOUBLEHEAD_CHECK(tensor.is_cpu(), what, " must be on the CPU");
}

inline void check_cuda_device(const Tensor& tensor, const char* what) {
  DOUBLEHEAD_CHECK(tensor.is_cuda(), what, " must be on a CUDA device");
}

// On the device of `other`, which is known to be the kernel's.
inline void check_same_device(const Tensor& tensor, const Tensor& other, const char* what) {
  if (other.is_cpu()) return check_cpu(tensor, what);
  check_cuda_device(tensor, what);
  DOUBLEHEAD_CHECK(tensor.get_device_index() == other.get_device_index(), what, " must be on cuda:",
                   other.get_device_index(), " as the others are, got cuda:", tensor.get_device_index());
}

inline void check_dim(const Tensor& tensor, int64_t dim, const char* what) {
  DOUBLEHEAD_CHECK(tensor.dim() == dim, what, " must have ", dim, " dimensions, got shape ", shape(tensor));
}

inline void check_size(const Tensor& tensor, int64_t dim, int64_t size, const char* what) {
  DOUBLEHEAD_CHECK(tensor.size(dim) == size, what, " must have size ", size, " in dimension ", dim, ", got shape ",
                   shape(tensor));
}

inline void check_dtype(const Tensor& tensor, ScalarType type, const char* what) {
  DOUBLEHEAD_CHECK(tensor.scalar_type() == type, what, " must be ", torch::headeronly::toString(type), ", got ",
                   torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_contiguous(const Tensor& tensor, const char* what) {
  DOUBLEHEAD_CHECK(tensor.is_contiguous(), what, " must be contiguous");
}

// dispatch_floating(x.scalar_type(), "roi_align: input", [&]<typename T>() { kernel<T>(...); });
// T is float, double, Half or BFloat16.
template <typename Body>
auto dispatch_floating(ScalarType type, const char* what, Body&& body) {
  switch (type) {
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::Half: return body.template operator()<Half>();
    case ScalarType::BFloat16: return body.template operator()<BFloat16>();
    default:
      fail(what, " must be float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(type));
  }
}

// The type to compute in: float for the 16-bit types.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using compute_t = typename Compute<T>::type;

// Whether this process is a forked child. OpenMP's threads stayed with its parent, yet OpenMP would wait for them for
// ever, so a child does everything in one thread. (Were the parent single-threaded, more would do; that cannot be known.)
inline bool forked = false;
#if __has_include(<pthread.h>)
[[maybe_unused]] inline const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Calls body(begin, end) on disjoint ranges that cover [begin, end), on torch's threads (torch.set_num_threads), each
// of at least `grain` items. The first exception thrown by any range is thrown again here, as it was: torch's own
// function would turn it into one that says only that a call failed.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (forked) return body(begin, end);
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
  torch::stable::parallel_for(begin, end, std::max<int64_t>(grain, 1), [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

inline int64_t num_threads() { return forked ? 1 : torch::stable::get_num_threads(); }

}  // namespace doublehead
