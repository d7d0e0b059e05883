// Host side: what the launches of the attention kernels have in common.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "sm90/kernels.h"

namespace flashmla::sm90 {

inline Status Failed(const char* what, cudaError_t error) {
  cudaGetLastError();  // or the next call on this thread would find it
  return {StatusCode::kInternal, std::string(what) + ": " + cudaGetErrorString(error)};
}

// How many multiprocessors the current device has, if it is one that the kernels run on.
inline Status FindDevice(int* multiprocessors) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
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
  return {};
}

// Dynamic shared memory of a launch, and the most that any launch of the kernel has. Threads that
// launch it at the same time all ask for the most, so that none lowers what another one needs.
struct SharedBytes {
  SharedBytes(int bytes) : SharedBytes(bytes, bytes) {}
  SharedBytes(int bytes, int most) : bytes(bytes), most(most) {}

  int bytes, most;
};

// The kernel may start while the one before it in the stream ends: it waits where it has to.
template <typename... Parameters, typename... Arguments>
Status Launch(void (*kernel)(Parameters...), dim3 grid, int threads, SharedBytes shared,
              int cluster, cudaStream_t stream, const Arguments&... arguments) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared.most);
  if (error != cudaSuccess) return Failed("shared memory", error);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared.bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? Status{} : Failed("launch", error);
}

}  // namespace flashmla::sm90
