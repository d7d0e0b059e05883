// Dense decode on the CPU.
//
// How the work is divided among threads: cpu/call.h.
//
// A task is computed by the best of these kernels that the processor can run, all of them in one
// binary:
//
//   dense_decode/vector_kernel.h   float32 arithmetic in vectors, written once and compiled for the
//                                  baseline of the platform (SSE2, NEON), AVX2 and AVX-512
//   dense_decode/amx_kernel.h      bfloat16 on the matrix units of AMX
//
// A token that a row must not see is never multiplied by zero, but left out: its key may be NaN.
#include "cpu/call.h"
#include "cpu/dense_decode/amx_kernel.h"
#include "cpu/dense_decode/vector_kernel.h"
#include "cpu/instruction_sets.h"
#include "cpu/kernels.h"

namespace flashmla::cpu {
namespace {

// --- One kernel per instruction set ----------------------------------------------------------

using Kernels = KernelsFor<DenseDecodeParams>;

FLASHMLA_KERNELS(DenseDecodeParams, Baseline, 4, )
#if defined(__x86_64__)
FLASHMLA_KERNELS(DenseDecodeParams, Avx2, 8, [[gnu::target(FLASHMLA_AVX2)]])
FLASHMLA_KERNELS(DenseDecodeParams, Avx512, 16, [[gnu::target(FLASHMLA_AVX512)]])
#endif

#if FLASHMLA_WITH_AMX
constexpr Kernels kAmx{kAmxWorkspace, AttendWithAmx, Avx512<DType::kBF16>::Merge,
                       Avx512<DType::kBF16>::Finish};
#endif

template <DType D>
const Kernels& BestKernels(bool fp8_cache) {
#if FLASHMLA_WITH_AMX
  if (D == DType::kBF16 && !fp8_cache && HasAvx512() && HasAmx()) return kAmx;
#endif
#if defined(__x86_64__)
  if (HasAvx512()) return Avx512<D>::kKernels;
  if (HasAvx2()) return Avx2<D>::kKernels;
#endif
  return Baseline<D>::kKernels;
}

const Kernels& BestKernels(const DenseDecodeParams& p) {
  switch (p.dtype) {
    case DType::kBF16:
      return BestKernels<DType::kBF16>(p.fp8_cache);
    case DType::kF16:
      return BestKernels<DType::kF16>(p.fp8_cache);
    default:
      return BestKernels<DType::kF32>(p.fp8_cache);
  }
}

}  // namespace

void DenseDecode(const DenseDecodeParams& p, const ThreadPool& pool) {
  if (p.rows() > 0) RunCall(BestKernels(p), p, pool);
}

}  // namespace flashmla::cpu
