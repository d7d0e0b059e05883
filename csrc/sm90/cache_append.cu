// Writes new tokens into their pages: one thread block per token, 16 bytes per thread at a time.
//
// A token is 1152 bytes in bf16 with one KV head: 72 of the 96 threads copy one vector each, and
// the whole kernel is one chain of loads, (start, count) -> block table -> store. The new token is
// loaded beside that chain, not after it.
#include <algorithm>
#include <cstdint>

#include "sm90/kernels.h"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 96;
constexpr int64_t kMaxBlocks = INT32_MAX;  // what gridDim.x can hold

__global__ void __launch_bounds__(kThreads) CacheAppendKernel(const CacheAppendParams p) {
  const int64_t vectors = p.token_bytes / sizeof(uint4);  // in a token
  const int64_t tokens = p.batch * p.num_tokens;
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const int64_t i = token / p.num_tokens;
    const int64_t j = token % p.num_tokens;
    const auto* source = static_cast<const uint4*>(p.new_kv) + token * vectors;
    const uint4 first = threadIdx.x < vectors ? source[threadIdx.x] : uint4{};

    const int64_t position = static_cast<int64_t>(p.start[i]) + j;
    if (j >= p.count[i] || position < 0) continue;
    const int64_t slot = position / kPageSize;  // in the table
    const int64_t row = position % kPageSize;   // in the page
    if (slot >= p.max_pages_per_seq) continue;
    const int64_t page = p.block_table[i * p.max_pages_per_seq + slot];
    if (page < 0 || page >= p.num_pages) continue;

    auto* target = static_cast<uint4*>(p.k_cache) + (page * kPageSize + row) * vectors;
    if (threadIdx.x < vectors) target[threadIdx.x] = first;
    for (int64_t v = threadIdx.x + kThreads; v < vectors; v += kThreads) target[v] = source[v];
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
  const auto blocks = static_cast<unsigned>(std::min(tokens, kMaxBlocks));
  CacheAppendKernel<<<blocks, kThreads, 0, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {StatusCode::kInternal, std::string("launch: ") + cudaGetErrorString(error)};
}

}  // namespace flashmla::sm90
