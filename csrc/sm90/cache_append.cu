// Writes new tokens into their pages, each by a team of threads, 16 bytes per thread at a time.
//
// The kernel is one chain of loads, (start, count) -> block table -> store. A token is 1152 bytes
// in bf16 with one KV head: all of it is loaded beside that chain, not after it. In a call of many
// tokens a team is a warp, and the 48 warps of an SM have 54 KB on the way, which hides the chain.
// In a call of few, a decoding step, a team is a block of 3 warps that load one vector per thread:
// the least to do before and after the chain.
#include <cstdint>

#include "sm90/kernels.h"
#include "sm90/page_row.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kFewTokens = 1024;

// 16-byte vectors of a token that one thread of a team has in registers.
template <int kTeam, int kVectors>
struct Vectors {
  uint4 values[kVectors];

  __device__ void Load(const uint4* source, int first, int end) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int v = first + k * kTeam;
      if (v < end) values[k] = __ldcs(source + v);
    }
  }

  __device__ void Store(uint4* target, int first, int end) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int v = first + k * kTeam;
      if (v < end) target[v] = values[k];
    }
  }
};

// A team of kTeam threads has kTeam * kVectors vectors in registers: the 72 of bf16 with one KV
// head at once.
template <int kTeams, int kTeam, int kVectors>
__global__ void __launch_bounds__(kTeams* kTeam) CacheAppendKernel(const CacheAppendParams p) {
  const auto size = static_cast<int>(p.token_bytes / sizeof(uint4));
  const auto num_tokens = static_cast<uint32_t>(p.num_tokens);
  const int rank = threadIdx.x % kTeam;
  const uint32_t token = blockIdx.x * kTeams + threadIdx.x / kTeam;
  const auto i = static_cast<int>(token / num_tokens);
  const auto j = static_cast<int>(token % num_tokens);
  if (i >= p.batch) return;

  const auto* source = static_cast<const uint4*>(p.new_kv) + int64_t{token} * size;
  Vectors<kTeam, kVectors> vectors;
  vectors.Load(source, rank, size);

  const PageRow place(p, i, j);
  if (!place.exists()) return;
  vectors.Store(place.data, rank, size);
  for (int v = rank + kTeam * kVectors; v < size; v += kTeam * kVectors) {
    vectors.Load(source, v, size);
    vectors.Store(place.data, v, size);
  }
  place.CopyShared<3>(rank, kTeam);
}

template <int kTeams, int kTeam, int kVectors>
void Launch(const CacheAppendParams& params, cudaStream_t stream) {
  const auto tokens = static_cast<uint32_t>(params.batch * params.num_tokens);
  CacheAppendKernel<kTeams, kTeam, kVectors>
      <<<(tokens + kTeams - 1) / kTeams, kTeams * kTeam, 0, stream>>>(params);
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
  if (tokens > INT32_MAX || params.token_bytes > INT32_MAX) {
    return {StatusCode::kInvalidArgument,
            "new_kv must be of fewer than 2^31 tokens, each of fewer bytes than that"};
  }
  if (tokens <= kFewTokens) {
    Launch<1, 3 * kWarp, 1>(params, stream);
  } else {
    Launch<8, kWarp, 3>(params, stream);
  }
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {StatusCode::kInternal, std::string("launch: ") + cudaGetErrorString(error)};
}

}  // namespace flashmla::sm90
