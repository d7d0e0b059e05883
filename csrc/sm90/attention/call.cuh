// What the kernels are called with: dense decode as it is, and sparse attention in its likeness.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "params.h"

namespace flashmla::sm90 {

// Sparse attention as dense decode sees it: each query token is a sequence of its own, of as many
// tokens as it lists, in blocks of 64 places of its lists, one list after the other, each with
// blocks of its own. Partial results are in half precision, whatever rows() is; but permuted ones
// in single precision.
struct SparseCall : DenseDecodeParams {
  static constexpr bool causal = false, batch_invariant = false;
  TokenScope scopes[2];
  int tokens[2];     // that a list may name: those before this
  int query_tokens;  // that a sequence of the caller's has
  int head_dim;
  const float* attn_sink;
  float* max_logits;

  explicit SparseCall(const SparseAttentionParams& p)
      : DenseDecodeParams(p.like_dense()),
        scopes{p.scopes[0], p.scopes[1]},
        tokens{Named(p.scopes[0]), Named(p.scopes[1])},
        query_tokens(static_cast<int>(p.s_q)),
        head_dim(p.head_dim),
        attn_sink(p.attn_sink),
        max_logits(p.max_logits) {}

  static int Named(const TokenScope& scope) {
    return static_cast<int>(std::min<int64_t>(scope.num_pages * scope.page_size, INT32_MAX));
  }
  __host__ __device__ int64_t sequences() const { return batch / query_tokens; }
  // How many of the leftmost places of a list count.
  __device__ int count(int scope, int query) const {
    const int sequence = static_cast<uint32_t>(query) / static_cast<uint32_t>(query_tokens);
    const int32_t* length = scope == 0 ? scopes[0].length : scopes[1].length;
    const int64_t topk = scope == 0 ? scopes[0].topk : scopes[1].topk;
    return max(0, min(length[sequence], static_cast<int>(topk)));
  }
};

// Where results that are one number for a query row have that of a row.
__device__ __forceinline__ int64_t RowPlace(const DenseDecodeParams& p, int batch, int head,
                                            int token) {
  return (batch * p.h_q + head) * p.s_q + token;
}
__device__ __forceinline__ int64_t RowPlace(const SparseCall& p, int batch, int head, int) {
  const int sequence = static_cast<uint32_t>(batch) / static_cast<uint32_t>(p.query_tokens);
  return (sequence * p.h_q + head) * p.query_tokens + (batch - sequence * p.query_tokens);
}

// What a row's values keep beside an attention sink, which takes the rest of the weights: `lse` is
// in base 2, and not that of no token.
__device__ __forceinline__ float SinkShare(const DenseDecodeParams&, int, float) { return 1; }
__device__ __forceinline__ float SinkShare(const SparseCall& p, int head, float lse) {
  return 1.f / (1.f + exp2f(p.attn_sink[head] * static_cast<float>(M_LOG2E) - lse));
}

}  // namespace flashmla::sm90
