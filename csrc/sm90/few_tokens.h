// What surrounds attention in a decoding step of DeepSeek's models, for so few tokens that its time
// is that of reading the weights. All weights are [out, in]. Numbers are 16 bits wide unless said
// otherwise.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"
#include "sm90/kernels.h"

namespace flashmla::sm90 {

inline constexpr int kMaxFewTokens = 4;
inline constexpr int kFewAlignment = 64;  // of all sizes
inline constexpr int kMaxFewSize = 1048576;
inline constexpr int kNopeDim = 128;
inline constexpr int kRopeDim = kHeadDim - kHeadDimV;
inline constexpr int kQueryDim = kNopeDim + kRopeDim;  // of an expanded query head
inline constexpr int kMaxFewHeads = 1024;
inline constexpr int kMaxExperts = 512;
inline constexpr int kMaxExpertsPerToken = 16;
inline constexpr int kMaxExpertGroups = 32;

// What is the same in all of a step's calls.
struct FewTokens {
  DType dtype;
  int tokens;
  int hidden_size;
};

// Hidden states to queries of the absorbed form, and to new tokens of the cache.
struct ProjectParams : FewTokens {
  int heads;
  int q_rank;  // 0 where the queries have no low rank
  float norm_eps;
  float latent_eps;

  const void* hidden;   // [tokens, hidden_size]
  const void* norm;     // [hidden_size]
  const void* w_q;      // [q_rank or heads * kQueryDim, hidden_size]
  const void* q_norm;   // [q_rank]
  const void* w_q_b;    // [heads * kQueryDim, q_rank]
  const void* w_kv;     // [kHeadDim, hidden_size]
  const void* kv_norm;  // [kHeadDimV]
  const void* w_uk;     // [heads, kHeadDimV, kNopeDim]
  const float* cos;     // [tokens, kRopeDim / 2]
  const float* sin;
  void* q;               // [tokens, heads, kHeadDim]
  CacheAppendParams kv;  // where the tokens go; nothing comes from new_kv
  bool fp8_cache;        // they are FP8 tokens, of bfloat16 numbers

  // Workspace
  void* q_low;       // [tokens, q_rank]
  void* q_expanded;  // [tokens, heads * kQueryDim]
  void* kv_raw;      // [tokens, kHeadDim]
};

// Attention's results of the absorbed form to the next hidden states.
struct OutputParams : FewTokens {
  int heads;
  int v_dim;

  // What DenseDecodeParts has left: results, and partial ones.
  DenseDecodeParams attention;
  int partitions;

  const void* w_uv;    // [heads, v_dim, kHeadDimV]
  const void* w_o;     // [hidden_size, heads * v_dim]
  const void* hidden;  // [tokens, hidden_size]
  void* out;           // [tokens, hidden_size]: hidden, and what attention adds

  void* values;  // workspace [tokens, heads * v_dim]
};

// How experts are chosen.
struct Router {
  bool sigmoid;    // scores, or else a softmax
  bool normalize;  // the weights of those chosen
  int groups;      // 1: no groups
  int groups_chosen;
  int group_best;  // a group is worth the sum of its best one or two
  float scale;     // of the weights
};

// Hidden states through the gated MLP, or the mixture of experts, to the next ones.
struct MlpParams : FewTokens {
  int experts;  // 0: only those that are shared
  int expert_size;
  int experts_per_token;
  int shared_size;
  float norm_eps;
  Router router;

  const void* hidden;     // [tokens, hidden_size]
  const void* norm;       // [hidden_size]
  const float* w_router;  // [experts, hidden_size]
  const float* bias;      // [experts], for the choice alone
  const void* gate;       // [experts, expert_size, hidden_size]
  const void* up;
  const void* down;         // [experts, hidden_size, expert_size]
  const void* shared_gate;  // [shared_size, hidden_size]
  const void* shared_up;
  const void* shared_down;  // [hidden_size, shared_size]
  void* out;                // [tokens, hidden_size]: hidden, and what the experts add

  // Workspace
  float* logits;    // [tokens, experts]
  int32_t* chosen;  // [tokens, experts_per_token]
  void* act;        // [tokens, experts_per_token * expert_size + shared_size]

  constexpr int act_size() const { return experts_per_token * expert_size + shared_size; }
};

// Hidden states after the final norm to logits.
struct LogitsParams : FewTokens {
  int vocab_size;

  const void* hidden;  // [tokens, hidden_size]
  const void* w;       // [vocab_size, hidden_size]
  float* logits;       // [tokens, vocab_size]
};

// In this order, and of a call for several layers the first one `is_first`.
Status FewProject(const ProjectParams& params, bool is_first, cudaStream_t stream);
Status FewOutput(const OutputParams& params, cudaStream_t stream);
Status FewMlp(const MlpParams& params, cudaStream_t stream);

Status FewLogits(const LogitsParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
