// Host side of dense decode: device limits, the tensor map, and the launches.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/kernel.cuh"
#include "sm90/kernels.h"

namespace flashmla::sm90 {
namespace {

Status Failed(const char* what, cudaError_t error) {
  return std::string("flashmla_dense_decode: ") + what + ": " + cudaGetErrorString(error);
}

// The page pool as a 4-D tensor whose boxes are whole pages of one KV head, panel after panel:
// (64 columns of a panel, all tokens of the pool, 9 panels, KV heads).
Status MakePageMap(const DenseDecodeParams& p, CUtensorMap* map) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return Failed("cuTensorMapEncodeTiled", error);
  if (found != cudaDriverEntryPointSuccess) return "flashmla_dense_decode: the driver is too old";
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);

  const cuuint64_t token_bytes = p.h_kv * kHeadDim * 2;
  const cuuint64_t sizes[4] = {kPanel, static_cast<cuuint64_t>(p.num_pages) * kPageSize, kPanels,
                               static_cast<cuuint64_t>(p.h_kv)};
  const cuuint64_t strides[3] = {token_bytes, kPanel * 2, kHeadDim * 2};
  const cuuint32_t box[4] = {kPanel, kPageSize, kPanels, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(
      map,
      p.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      4, const_cast<void*>(p.k_cache), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return "flashmla_dense_decode: cuTensorMapEncodeTiled failed with " + std::to_string(result);
  }
  return {};
}

template <typename T>
Status Launch(const DenseDecodeParams& p, const CUtensorMap& map, dim3 grid, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(
      DenseDecodeKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return Failed("shared memory", error);
  DenseDecodeKernel<T><<<grid, kThreads, kSharedBytes, stream>>>(p, map);
  return {};
}

}  // namespace

Status DenseDecode(const DenseDecodeParams& p, cudaStream_t stream) {
  if (p.batch == 0) return {};
  int device = 0, multiprocessors = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error != cudaSuccess) return Failed("device", error);
  if (major != 9 || minor != 0) {
    return "flashmla_dense_decode: compiled for compute capability 9.0, this GPU has " +
           std::to_string(major) + "." + std::to_string(minor);
  }
  const int64_t row_tiles = p.row_tiles();
  if (row_tiles > 65535) {
    return "flashmla_dense_decode: s_q * h_q is too large: " + std::to_string(row_tiles) +
           " tiles of 64 rows, at most 65535";
  }
  if (p.num_pages >= INT32_MAX / kPageSize) {
    return "flashmla_dense_decode: too many pages: " + std::to_string(p.num_pages);
  }

  CUtensorMap map;
  Status status = MakePageMap(p, &map);
  if (!status.empty()) return status;

  // One thread block per multiprocessor, divided among the row tiles.
  const int partitions =
      static_cast<int>(std::clamp<int64_t>(multiprocessors / row_tiles, 1, p.max_partitions()));
  const dim3 grid(partitions, static_cast<unsigned>(row_tiles));
  status = p.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(p, map, grid, stream)
                                   : Launch<__half>(p, map, grid, stream);
  if (!status.empty()) return status;
  if (partitions > 1) LaunchCombine(p, partitions, multiprocessors, stream);
  error = cudaGetLastError();
  return error == cudaSuccess ? Status{} : Failed("launch", error);
}

}  // namespace flashmla::sm90
