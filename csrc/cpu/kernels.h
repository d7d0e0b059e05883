// The portable C++ kernels.
#pragma once

#include "params.h"

namespace flashmla::cpu {

// Attention of each query row over the cached tokens of its sequence.
void DenseDecode(const DenseDecodeParams& params, const ThreadPool& pool);

// Attention of each query token to tokens that it names.
void SparseAttention(const SparseAttentionParams& params, const ThreadPool& pool);

// Writes new tokens into their pages.
void CacheAppend(const CacheAppendParams& params, const ThreadPool& pool);

}  // namespace flashmla::cpu
