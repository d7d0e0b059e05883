// Host side of dense decode: device limits, the tensor maps, and the launches.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/kernel.cuh"
#include "sm90/kernels.h"

namespace flashmla::sm90 {
namespace {

Status Failed(const char* what, cudaError_t error) {
  return {StatusCode::kInternal, std::string(what) + ": " + cudaGetErrorString(error)};
}

// The page pool as a 4-D tensor of panels: (64 columns of a panel, all tokens of the pool, 9
// panels, KV heads).
Status MakePageMaps(const DenseDecodeParams& p, PageMaps* maps) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry) : nullptr;
  }();
  if (encode == nullptr) {
    return {StatusCode::kInternal, "the driver does not offer cuTensorMapEncodeTiled"};
  }
  const cuuint64_t token_bytes = p.h_kv * kHeadDim * 2;
  const cuuint64_t sizes[4] = {kPanel, static_cast<cuuint64_t>(p.num_pages) * kPageSize, kPanels,
                               static_cast<cuuint64_t>(p.h_kv)};
  const cuuint64_t strides[3] = {token_bytes, kPanel * 2, kHeadDim * 2};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const auto make = [&](CUtensorMap* map, cuuint32_t tokens, cuuint32_t panels) {
    const cuuint32_t box[4] = {kPanel, tokens, panels, 1};
    return encode(map,
                  p.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  4, const_cast<void*>(p.k_cache), sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA);
  };
  CUresult result = make(&maps->half_panels, kPageSize, kHalfPanels / 2);
  if (result == CUDA_SUCCESS) result = make(&maps->rope, kPageSize / 2, 1);
  if (result != CUDA_SUCCESS) {
    return {StatusCode::kInternal, "cuTensorMapEncodeTiled failed with " + std::to_string(result)};
  }
  return {};
}

template <typename T, int kCluster>
Status Launch(const DenseDecodeParams& p, const PageMaps& maps, int partitions,
              cudaStream_t stream) {
  const auto kernel = DenseDecodeKernel<T, kCluster>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return Failed("shared memory", error);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.row_tiles()), partitions);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, p, maps);
  return error == cudaSuccess ? Status{} : Failed("launch", error);
}

template <typename T>
Status Launch(const DenseDecodeParams& p, const PageMaps& maps, int partitions,
              cudaStream_t stream) {
  return p.tiles_per_head() % 2 == 0 ? Launch<T, 2>(p, maps, partitions, stream)
                                     : Launch<T, 1>(p, maps, partitions, stream);
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
    return {StatusCode::kFailedPrecondition, "compiled for compute capability 9.0, this GPU has " +
                                                 std::to_string(major) + "." +
                                                 std::to_string(minor)};
  }
  if (p.num_pages >= INT32_MAX / kPageSize) {
    return {StatusCode::kInvalidArgument,
            "k_cache has too many pages: " + std::to_string(p.num_pages)};
  }
  if (p.s_q * p.h_q > INT32_MAX) {
    return {StatusCode::kInvalidArgument,
            "s_q * h_q is too large: " + std::to_string(p.s_q * p.h_q)};
  }

  PageMaps maps;
  Status status = MakePageMaps(p, &maps);
  if (!status.ok()) return status;

  // One thread block per multiprocessor, divided among the row tiles.
  const int partitions =
      static_cast<int>(std::clamp<int64_t>(multiprocessors / p.row_tiles(), 1, p.max_partitions()));
  status = p.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(p, maps, partitions, stream)
                                   : Launch<__half>(p, maps, partitions, stream);
  if (!status.ok()) return status;
  if (partitions > 1) LaunchCombine(p, partitions, multiprocessors, stream);
  error = cudaGetLastError();
  return error == cudaSuccess ? Status{} : Failed("launch", error);
}

}  // namespace flashmla::sm90
