// The instruction sets that a binary has kernels for.
#pragma once

#include "cpu/call.h"
#include "cpu/dense_decode/vector_kernel.h"
#include "cpu/simd.h"

namespace flashmla::cpu {

// NAME<D>::kKernels: those for elements of type D, of vectors of WIDTH floats, made of AttendWith,
// MergeWith and FinishWith as they are compiled for TARGET.
#define FLASHMLA_KERNELS(PARAMS, NAME, WIDTH, TARGET)                                      \
  template <DType D>                                                                       \
  struct NAME {                                                                            \
    TARGET static void Attend(const PARAMS& p, const Task& task, Scratch& s) {             \
      AttendWith<D, WIDTH>(p, task, s);                                                    \
    }                                                                                      \
    TARGET static void Merge(int64_t rows, const Partial& into, const Partial& from) {     \
      MergeWith<WIDTH>(rows, into, from);                                                  \
    }                                                                                      \
    TARGET static void Finish(const PARAMS& p, const Task& task, const Partial& r) {       \
      FinishWith<D, WIDTH>(p, task, r);                                                    \
    }                                                                                      \
    static constexpr KernelsFor<PARAMS> kKernels{kVectorWorkspace, Attend, Merge, Finish}; \
  };

#if defined(__x86_64__)
inline bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

inline bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace flashmla::cpu
