// Host side: tensor maps, by which the copy engine finds boxes of a tensor.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#include "params.h"
#include "sm90/kernels.h"

namespace flashmla::sm90 {

// A tensor of 16-bit numbers, copied in boxes of `box`; the innermost 64 numbers are 128 swizzled
// bytes in shared memory. What lies outside reads as `fill`, NaN or zero.
template <int kDimensions>
Status MakeMap(DType dtype, const void* data, const cuuint64_t (&sizes)[kDimensions],
               const cuuint64_t (&strides)[kDimensions - 1], const cuuint32_t (&box)[kDimensions],
               CUtensorMapFloatOOBfill fill, CUtensorMap* map) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) cudaGetLastError();
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry) : nullptr;
  }();
  if (encode == nullptr) {
    return {StatusCode::kInternal, "the driver does not offer cuTensorMapEncodeTiled"};
  }
  constexpr cuuint32_t kSteps[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      map,
      dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      kDimensions, const_cast<void*>(data), sizes, strides, box, kSteps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      fill);
  if (result == CUDA_SUCCESS) return {};
  return {StatusCode::kInternal, "cuTensorMapEncodeTiled failed with " + std::to_string(result)};
}

}  // namespace flashmla::sm90
