// Writes new tokens into their pages: one warp per token, 16 bytes per lane at a time.
//
// The kernel is one chain of loads, (start, count) -> block table -> store. A token is 1152 bytes
// in bf16 with one KV head: all of it is loaded beside that chain, not after it, and the 40 warps
// of an SM have 46 KB on the way, enough to hide the chain. A call of few tokens, a decoding step,
// has one warp in a block, so that its tokens are spread over all SMs.
#include <algorithm>
#include <cstdint>

#include "sm90/kernels.h"

namespace flashmla::sm90 {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 8 * kWarp;
constexpr int64_t kFewTokens = 1024;
constexpr int64_t kMaxBlocks = INT32_MAX;  // what gridDim.x can hold

// A token's vectors that a lane has in registers: the 72 of bf16 with one KV head at once.
constexpr int kVectors = 3;

struct Vectors {
  uint4 values[kVectors];

  __device__ void Load(const uint4* source, int64_t first, int64_t end) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t v = first + k * kWarp;
      if (v < end) values[k] = __ldcs(source + v);
    }
  }

  __device__ void Store(uint4* target, int64_t first, int64_t end) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t v = first + k * kWarp;
      if (v < end) target[v] = values[k];
    }
  }
};

__global__ void __launch_bounds__(kMaxThreads) CacheAppendKernel(const CacheAppendParams p) {
  const int64_t size = p.token_bytes / sizeof(uint4);
  const int64_t tokens = p.batch * p.num_tokens;
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  for (; token < tokens; token += warps) {
    const auto* source = static_cast<const uint4*>(p.new_kv) + token * size;
    Vectors vectors;
    vectors.Load(source, lane, size);

    const int64_t i = token / p.num_tokens;
    const int64_t j = token % p.num_tokens;
    const int64_t position = static_cast<int64_t>(p.start[i]) + j;
    if (j >= p.count[i] || position < 0) continue;
    const int64_t slot = position / kPageSize;  // in the table
    const int64_t row = position % kPageSize;   // in the page
    if (slot >= p.max_pages_per_seq) continue;
    const int64_t page = p.block_table[i * p.max_pages_per_seq + slot];
    if (page < 0 || page >= p.num_pages) continue;

    auto* target = static_cast<uint4*>(p.k_cache) + (page * kPageSize + row) * size;
    vectors.Store(target, lane, size);
    for (int64_t v = lane + kVectors * kWarp; v < size; v += kVectors * kWarp) {
      vectors.Load(source, v, size);
      vectors.Store(target, v, size);
    }
  }
}

bool IsAligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0;
}

}  // namespace

Status CacheAppend(const CacheAppendParams& params, cudaStream_t stream) {
  const int64_t tokens = params.batch * params.num_tokens;
  if (tokens == 0 || params.token_bytes == 0) return {};
  if (!IsAligned(params.new_kv) || !IsAligned(params.k_cache)) {
    return {StatusCode::kInvalidArgument, "new_kv and k_cache must be aligned to 16 bytes"};
  }
  const int threads = tokens <= kFewTokens ? kWarp : kMaxThreads;
  const int64_t warps = threads / kWarp;
  const auto blocks = static_cast<unsigned>(std::min((tokens + warps - 1) / warps, kMaxBlocks));
  CacheAppendKernel<<<blocks, threads, 0, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {StatusCode::kInternal, std::string("launch: ") + cudaGetErrorString(error)};
}

}  // namespace flashmla::sm90
