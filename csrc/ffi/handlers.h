// The handlers that the module registers, and the names that compiled programs call them by.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace flashmla::ffi {

// Exported programs outlive a release. A name ends in a version, to be raised when operands,
// results (the GPU workspace is some of them), attributes or what they mean change: a program of
// before then finds no such target, and is never misread. The same names stand in
// flashmla_jax/ops/_ffi.py; a test compares them.
inline constexpr char kDenseDecodeTarget[] = "flashmla_dense_decode_v1";
inline constexpr char kCacheAppendTarget[] = "flashmla_cache_append_v2";
inline constexpr char kSparseAttentionTarget[] = "flashmla_sparse_attention_v2";
// The same on a GPU, but never recorded in CUDA graphs.
inline constexpr char kDenseDecodeNoGraphTarget[] = "flashmla_dense_decode_no_graph_v1";
inline constexpr char kCacheAppendNoGraphTarget[] = "flashmla_cache_append_no_graph_v2";
// On a GPU only.
inline constexpr char kIndexTopkTarget[] = "flashmla_index_topk_v1";
inline constexpr char kFewTokensTarget[] = "flashmla_few_tokens_v2";
inline constexpr char kFewLogitsTarget[] = "flashmla_few_logits_v1";
inline constexpr char kGroupedMlpTarget[] = "flashmla_grouped_mlp_v1";

extern "C" {
XLA_FFI_Error* DenseDecodeCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CacheAppendCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SparseAttentionCpu(XLA_FFI_CallFrame* call_frame);
#if FLASHMLA_WITH_CUDA
XLA_FFI_Error* DenseDecodeCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CacheAppendCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SparseAttentionCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* DenseDecodeCudaNoGraph(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CacheAppendCudaNoGraph(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* IndexTopkCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* FewTokensCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* FewLogitsCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupedMlpCuda(XLA_FFI_CallFrame* call_frame);
#endif
}

}  // namespace flashmla::ffi
